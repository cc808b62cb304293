"""Weighted segment means against a loop, and the published values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.test_bipartite_match import published
from vlmaccel.kernels.bipartite_match import bipartite_match
from vlmaccel.kernels.merge_tokens import merge_tokens, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def test_published_values():
    i = torch.arange(8, dtype=torch.double)
    x = torch.stack([i, i**2], 1)[None]
    keep, group = bipartite_match(published(8, 4)[None], 2, 0)
    merged = merge_tokens(x, group, None, keep.shape[1])
    assert merged[0, :, 0].tolist() == [0, 2, 3.5, 3.5, 5, 7]
    assert merged[0, :, 1].tolist() == [0, 4, 18.5, 12.5, 25, 49]
    assert merged[0, group[0], 0].tolist() == [0, 3.5, 2, 3.5, 3.5, 5, 3.5, 7]


@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 8),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.booleans(),
)
def test_agrees_with_the_loop(batch, tokens, n, dtype, sized, dropping):
    generator = torch.Generator().manual_seed(batch + 5 * tokens + 77 * n)
    x = torch.randn(batch, tokens, 3, generator=generator, dtype=torch.double).to(dtype)
    group = torch.randint(-int(dropping), n, (batch, tokens), generator=generator)
    size = torch.randint(0, 4, (batch, tokens), generator=generator) if sized else None
    got, want = merge_tokens(x, group, size, n), reference(x, group, size, n)
    assert got.dtype == dtype
    assert got.shape == (batch, n, 3)
    assert torch.allclose(got.double(), want.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_group_of_one_is_exact(dtype):
    x = torch.randn(2, 7, 5).to(dtype)
    order = torch.stack([torch.randperm(7), torch.randperm(7)])
    merged = merge_tokens(x, order, torch.tensor([[3, 1, 7, 2, 1, 1, 5]] * 2), 7)
    assert torch.equal(merged.gather(1, order[..., None].expand_as(x)), x)


def test_gradient():
    group = torch.tensor([[0, 1, 0, -1, 2, 1], [2, 2, 2, 0, 1, 0]])
    size = torch.tensor([[1, 2, 3, 1, 1, 5], [1, 1, 4, 1, 2, 1]])
    x = torch.randn(2, 6, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, group, size, 3), x)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, group, None, 4), x)


@pytest.mark.parametrize("size", [None, torch.ones(2, 6, dtype=torch.long)])
def test_is_an_operator(size):
    group = torch.tensor([[0, 1, 0, 1, 2, 1], [2, 2, 2, 0, 1, 0]])
    x = torch.randn(2, 4, 6).transpose(1, 2).requires_grad_()
    torch.library.opcheck(merge_tokens, (x, group, size, 3))
    compiled = torch.compile(lambda x: merge_tokens(x, group, size, 3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), merge_tokens(x, group, size, 3))
