"""Bipartite soft matching: the published values, the edge cases, and agreement with the loop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.kernels.bipartite_match import bipartite_match, merged, reference

# t, r, prefix, groups in the order of the slots: what the official code gives for G(t, 4) in float64
GOLDEN = [
    (8, 2, 0, "0 2 1,6 3,4 5 7"),
    (8, 2, 1, "0 2 1,6 3,4 5 7"),
    (8, 100, 1, "0 1,6 3,4 5 2,7"),
    (8, 100, 0, "1,6 3,4 0,5 2,7"),
    (3, 1, 1, "0 1,2"),
    (2, 1, 1, "0 1"),
    (2, 1, 0, "0,1"),
    (1, 1, 0, "0"),
    (12, 2, 0, "8 2 4 0 1,6,10 3 5 7 9 11"),
    (12, 2, 1, "0 2 4 8 1,6,10 3 5 7 9 11"),
]


def published(t, c):
    i, j = torch.arange(t, dtype=torch.double)[:, None], torch.arange(c, dtype=torch.double)
    return (1.3 * i + 0.7 * j + 0.1 * i * j).sin()


def groups(group, n):
    return [[i for i, slot in enumerate(group.tolist()) if slot == s] for s in range(n)]


@pytest.mark.parametrize("form", [bipartite_match, reference])
@pytest.mark.parametrize(("t", "r", "prefix", "want"), GOLDEN)
def test_published_values(t, r, prefix, want, form):
    keep, group = form(published(t, 4)[None], r, prefix)
    assert groups(group[0], keep.shape[1]) == [[int(i) for i in g.split(",")] for g in want.split()]
    assert torch.equal(group[0, keep[0]], torch.arange(keep.shape[1]))


@given(
    st.integers(1, 3),
    st.integers(1, 33),
    st.integers(-2, 40),
    st.integers(0, 6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["random", "ties", "zeros"]),
)
def test_agrees_with_the_loop(batch, n, r, prefix, dtype, kind):
    generator = torch.Generator().manual_seed(batch + 7 * n + 31 * (r + 2))
    metric = torch.randn(batch, n, 5, generator=generator)
    if kind == "ties":  # few different tokens, so that many cosines are equal to the bit
        metric = torch.eye(5)[torch.randint(0, 3, (batch, n), generator=generator)]
    if kind == "zeros":
        metric[:, ::3] = 0
    metric = metric.to(dtype)
    keep, group = bipartite_match(metric, r, min(prefix, n))
    want_keep, want_group = reference(metric, r, min(prefix, n))
    assert torch.equal(keep, want_keep)
    assert torch.equal(group, want_group)
    for k, g in zip(keep, group, strict=True):
        assert k.unique().numel() == len(k) == n - merged(n, r, min(prefix, n))
        assert set(g.tolist()) == set(range(len(k)))
        assert g[: min(prefix, n)].tolist() == list(range(min(prefix, n)))


def test_ties_go_to_the_lowest_index():
    keep, group = bipartite_match(torch.ones(1, 200, 4), 3, 1)
    assert groups(group[0], keep.shape[1])[97:100] == [[1, 2, 4, 6], [3], [5]]


def test_a_zero_vector_is_like_nothing():
    metric = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.0]]])
    keep, group = bipartite_match(metric, 1, 0)
    assert keep.isfinite().all()
    assert group[0, 2] == group[0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairs_differ_between_samples_and_not_between_precisions(dtype):
    base = torch.eye(16)[torch.tensor([[0, 1, 2, 3, 1, 5, 6, 7], [0, 1, 2, 3, 4, 5, 3, 7]])]
    _, group = bipartite_match((base + 0.1).to(dtype), 1, 0)
    assert group[0, 4] == group[0, 1]
    assert group[1, 6] == group[1, 3]


@pytest.mark.parametrize("r", [0, 3])
def test_is_an_operator(r):
    metric = torch.randn(2, 8, 9).transpose(1, 2)
    torch.library.opcheck(bipartite_match, (metric, r, 1))
    compiled = torch.compile(lambda m: bipartite_match(m, r, 1), fullgraph=True, backend="eager")
    for got, want in zip(compiled(metric), bipartite_match(metric, r, 1), strict=True):
        assert torch.equal(got, want)


def test_nan_does_not_break_the_partition():
    metric = torch.randn(1, 9, 4)
    metric[0, 4] = math.nan
    keep, group = bipartite_match(metric, 3, 1)
    assert set(group[0].tolist()) == set(range(keep.shape[1]))
