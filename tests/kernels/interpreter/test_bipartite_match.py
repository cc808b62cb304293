"""The Triton form of the matching: indices where they are certain, cosines where roundings decide."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.test_bipartite_match import GOLDEN, groups, published
from tests.support.matching import assert_matches
from vlmaccel.kernels.bipartite_match import reference
from vlmaccel.kernels.gpu.bipartite_match import CONFIGS, fits, launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(metric, r, prefix, near=1e-6):
    assert fits(metric, r, prefix)
    keep, group = launch(metric, r, prefix)
    assert_matches(metric, r, prefix, keep, group, near)
    return keep, group


@pytest.mark.parametrize(("t", "r", "prefix", "want"), GOLDEN)
def test_published_values(t, r, prefix, want):
    keep, group = check(published(t, 4)[None].float(), r, prefix)
    assert groups(group[0], keep.shape[1]) == [[int(i) for i in g.split(",")] for g in want.split()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n"), [(1, 2), (2, 3), (1, 33), (2, 64), (1, 65), (3, 66), (1, 130)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_lengths(batch, n, prefix, dtype):
    check(torch.randn(batch, n, 24).to(dtype), n // 3 + 1, prefix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 32, 33, 64, 72, 80, 96, 128])
def test_widths(width, dtype):
    check(torch.randn(2, 41, width).to(dtype), 11, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 40])
def test_layouts(width, dtype):
    x = torch.randn(2, 3, 37, width + 8).to(dtype)
    for metric in (x[:, 1, :, :width], x[:, 2, 1:, 3 : 3 + width], x.transpose(1, 2)[:, :, 1, :width], x[:, 0].mT):
        check(metric, 9, 1)
    check(torch.randn(37, 2, width).to(dtype).transpose(0, 1), 9, 1)
    check(x[:1, 0].expand(3, -1, -1), 9, 0)


@pytest.mark.parametrize("r", [-3, 0, 1, 7, 1000])
def test_numbers_of_pairs(r):
    check(torch.randn(2, 21, 16), r, 0)


def test_nothing_to_match():
    for shape, prefix in (((2, 1, 8), 0), ((1, 5, 8), 5), ((1, 6, 8), 5)):
        keep, group = launch(torch.randn(shape), 4, prefix)
        assert torch.equal(group, keep)
    for shape in ((0, 4, 8), (1, 0, 8), (1, 4, 0)):
        assert not fits(torch.randn(shape), 1, 0)
    assert not fits(torch.randn(1, 4, 8, dtype=torch.double), 1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "prefix"), [(130, 1), (129, 0)])
def test_ties_go_to_the_lowest_index(n, prefix, dtype):
    """Across blocks of B tokens too: few different tokens, with cosines that are exact."""
    for metric in (torch.ones(1, n, 4), torch.eye(5)[torch.randint(0, 3, (2, n))], -torch.ones(1, n, 4)):
        keep, group = launch(metric.to(dtype), n // 3, prefix)
        want = reference(metric, n // 3, prefix)
        assert torch.equal(keep, want[0])
        assert torch.equal(group, want[1])
    assert n > 4 * CONFIGS["interpreter"][0].block_b


def test_a_lower_block_wins_a_tie_and_a_higher_one_what_is_better():
    metric = torch.zeros(1, 130, 4)
    metric[0, :, 3] = 1
    metric[0, 0] = metric[0, 71] = metric[0, 101] = torch.tensor([1.0, 0, 0, 0])
    metric[0, 2] = metric[0, 129] = torch.tensor([0, 1.0, 0, 0])
    keep, group = launch(metric, 65, 0)
    stands = keep[0, group[0]]
    assert stands[:4].tolist() == [71, 1, 129, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors(dtype):
    metric = torch.randn(2, 50, 8).to(dtype)
    metric[:, ::3] = 0
    check(metric, 12, 1)
    _, group = check(torch.zeros(1, 40, 8, dtype=dtype), 12, 1)
    assert torch.equal(group, reference(torch.zeros(1, 40, 8), 12, 1)[1])


def test_a_zero_vector_is_more_like_than_an_opposite_one():
    metric = torch.tensor([[[1.0, 0.0], [-1.0, 0.1], [0.5, 0.0], [0.0, 0.0], [0.0, -1.0], [-2.0, 2.0]]])
    keep, group = check(metric, 2, 0)
    assert keep[0, group[0]].tolist() == [3, 1, 3, 3, 4, 5]


def test_lengths_do_not_matter():
    metric = torch.randn(1, 60, 16)
    scaled = metric * torch.logspace(-4, 4, 60)[:, None]
    assert torch.equal(launch(scaled, 20, 0)[1], launch(metric, 20, 0)[1])


def test_nan_does_not_break_the_partition():
    for token in (4, 5):
        metric = torch.randn(1, 65, 4)
        metric[0, token] = math.nan
        keep, group = launch(metric, 20, 1)
        assert set(group[0].tolist()) == set(range(keep.shape[1]))
