"""Farthest-first order: agreement with the loop over points, ties and the edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.kernels.farthest_first import farthest_first, reference

KINDS = ["cosines", "any", "ties", "zeros", "infinite"]


def distances(m, kind, seed=0):
    """(m, m) float32, symmetric for cosines only."""
    generator = torch.Generator().manual_seed(1000 * seed + m)
    x = torch.randn(m, m, generator=generator)
    if kind == "cosines":
        x = torch.nn.functional.normalize(x[:, :4], dim=-1)
        return 1 - x @ x.mT
    if kind == "ties":
        return x.round()
    if kind == "zeros":  # of both signs, which are equal
        return torch.where(x.abs() < 1, 0.0, x.round()) * x.sign()
    return x.masked_fill(x > 1, math.inf) if kind == "infinite" else x


@given(
    st.integers(1, 40),
    st.floats(0, 1),
    st.integers(0, 39),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_agrees_with_the_loop(m, share, start, kind, dtype):
    distance, start = distances(m, kind).to(dtype), torch.tensor([start % m])
    kept = max(1, round(share * m))
    before = distance.clone()
    picked = farthest_first(distance, start, kept)
    assert picked.dtype == torch.long
    assert torch.equal(picked, reference(distance, start, kept))
    assert picked.unique().numel() == len(picked) == kept
    assert torch.equal(distance, before)


@pytest.mark.parametrize("form", [farthest_first, reference])
def test_points_on_a_line(form):
    """Both ends, then the middle of what is widest."""
    at = torch.tensor([0.0, 1, 2, 3, 10, 20, 22])
    distance, start = (at[:, None] - at).abs(), torch.tensor([4])
    assert form(distance, start, 7).tolist() == [4, 6, 0, 3, 5, 1, 2]
    assert form(distance, start, 1).tolist() == [4]


@pytest.mark.parametrize("form", [farthest_first, reference])
def test_ties_go_to_the_lowest_index(form):
    for distance in (torch.zeros(9, 9), torch.ones(9, 9), torch.full((9, 9), -2.0), 1 - torch.eye(9)):
        assert form(distance, torch.tensor([3]), 9).tolist() == [3, 0, 1, 2, 4, 5, 6, 7, 8]


def test_a_row_says_how_far_points_are():
    distance, start = torch.tensor([[0.0, 1, 5], [2, 0, 3], [9, 2, 0]]), torch.tensor([0])
    assert farthest_first(distance, start, 2).tolist() == reference(distance, start, 2).tolist() == [0, 2]


def test_the_diagonal_does_not_matter():
    distance, start = distances(12, "any"), torch.tensor([5])
    want = farthest_first(distance, start, 12)
    for value in (-3.0, 0.0, math.inf):
        assert torch.equal(farthest_first(distance.clone().fill_diagonal_(value), start, 12), want)


@pytest.mark.parametrize("kept", [1, 5, 9])
def test_is_an_operator(kept):
    args = distances(9, "cosines").mT, torch.tensor([2])
    torch.library.opcheck(farthest_first, (*args, kept))
    compiled = torch.compile(lambda *args: farthest_first(*args, kept), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), farthest_first(*args, kept))
