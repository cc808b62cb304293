"""Greedy MAP: agreement with elimination in float64, what the rows are, ties, where it stops and the edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.kernels.greedy_map import greedy_map, reference

KINDS = ["full rank", "any scale", "low rank", "twins", "all alike"]
LEAST = 1e-4  # above what rounding leaves of a gain


def kernels(c, kind, seed=0):
    """(c, c) float32 of random items; twins: orthogonal ones, each there several times, with gains that tie exactly."""
    generator = torch.Generator().manual_seed(1000 * seed + c)
    if kind == "twins":
        which = torch.randint(0, max(1, c // 2), (c,), generator=generator)
        return 4.0 * (which[:, None] == which).float()
    if kind == "all alike":
        return torch.ones(c, c)
    x = torch.randn(c, 3 if kind == "low rank" else 2 * c, generator=generator)
    x = torch.nn.functional.normalize(x, dim=-1)
    r = torch.rand(c, 1, generator=generator) * (30 if kind == "any scale" else 1)
    return (x * r) @ (x * r).mT


@given(st.integers(1, 40), st.floats(0, 1), st.sampled_from(KINDS), st.sampled_from([torch.float32, torch.float64]))
def test_agrees_with_elimination(c, share, kind, dtype):
    kernel, least = kernels(c, kind).to(dtype), torch.tensor(LEAST, dtype=dtype)
    most = max(1, round(share * c))
    before = kernel.clone()
    picked, rows = greedy_map(kernel, least, most)
    want_picked, want_rows = reference(kernel, least, most)
    assert picked.dtype == torch.long and rows.dtype == dtype
    assert torch.equal(picked, want_picked)
    torch.testing.assert_close(rows, want_rows, rtol=0, atol=1e-4 * float(kernel.diagonal().max().sqrt()))
    number = int((picked >= 0).sum())
    assert bool((picked[number:] == -1).all()) and not rows[number:].any()
    assert picked[:number].unique().numel() == number
    assert torch.equal(kernel, before)


@pytest.mark.parametrize("form", [greedy_map, reference])
def test_the_determinant_is_the_largest_of_all(form):
    kernel = kernels(9, "full rank").double()
    picked, rows = form(kernel, torch.zeros((), dtype=torch.double), 5)
    for number, best in enumerate(picked.tolist()):
        before = picked[:number].tolist()
        worth = {}
        for j in set(range(9)) - set(before):
            among = torch.tensor([*before, j])
            worth[j] = float(torch.linalg.det(kernel[among][:, among]))
        assert max(worth, key=worth.get) == best
        gains = rows[: number + 1].gather(1, picked[: number + 1, None]).square()
        assert float(gains.prod()) == pytest.approx(worth[best])


@pytest.mark.parametrize("form", [greedy_map, reference])
def test_rows_explain_the_kernel(form):
    kernel = kernels(12, "full rank").double()
    picked, rows = form(kernel, torch.zeros((), dtype=torch.double), 7)
    torch.testing.assert_close((rows.mT @ rows)[picked], kernel[picked])
    assert bool((kernel - rows.mT @ rows).diagonal().min() > -1e-12)
    full = form(kernel, torch.zeros((), dtype=torch.double), 12)[1]
    torch.testing.assert_close(full.mT @ full, kernel)


@pytest.mark.parametrize("form", [greedy_map, reference])
def test_ties_go_to_the_lowest_index(form):
    zero = torch.tensor(0.0)
    assert form(torch.eye(9), zero, 9)[0].tolist() == list(range(9))
    kernel = torch.diag(torch.tensor([1.0, 2, 2, 1, 3, 3, 1, 1, 2]))
    assert form(kernel, zero, 9)[0].tolist() == [4, 5, 1, 2, 8, 0, 3, 6, 7]


@pytest.mark.parametrize("form", [greedy_map, reference])
def test_stops_where_no_gain_is_above_the_least(form):
    kernel = torch.diag(torch.tensor([1.0, 4, 3, 2]))
    for least, order in ((0, [1, 2, 3, 0]), (1, [1, 2, 3, -1]), (2.5, [1, 2, -1, -1]), (4, [-1] * 4)):
        assert form(kernel, torch.tensor(float(least)), 4)[0].tolist() == order
    assert form(kernel, torch.tensor(0.0), 6)[0].tolist() == [1, 2, 3, 0, -1, -1]
    assert form(torch.zeros(3, 3), torch.tensor(0.0), 2)[0].tolist() == [-1, -1]


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_nan_gives_indices_all_the_same(share):
    for seed in range(5):
        kernel = kernels(20, "full rank", seed)
        kernel[torch.rand(20, 20, generator=torch.Generator().manual_seed(seed)) < share] = math.nan
        picked = greedy_map(kernel, torch.tensor(0.0), 20)[0]
        picked = picked[picked >= 0]
        assert picked.unique().numel() == len(picked) and bool((picked < 20).all())


@pytest.mark.parametrize("most", [1, 5, 9])
def test_is_an_operator(most):
    kernel, least = kernels(9, "full rank"), torch.tensor(LEAST)
    torch.library.opcheck(greedy_map, (kernel, least, most))
    compiled = torch.compile(lambda k: greedy_map(k, least, most), fullgraph=True, backend="eager")
    assert torch.equal(compiled(kernel)[0], greedy_map(kernel, least, most)[0])
