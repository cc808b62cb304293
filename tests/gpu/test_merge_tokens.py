"""Weighted segment means on a GPU, against sums in float64."""

from __future__ import annotations

import pytest
import torch

from tests.support.close import assert_close
from vlmaccel.kernels.merge_tokens import _torch_form, merge_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(batch, tokens, n, width, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, tokens, width, device="cuda", generator=generator).to(dtype)
    group = torch.randint(-1, n, (batch, tokens), device="cuda", generator=generator)
    return x, group, torch.randint(0, 9, (batch, tokens), device="cuda", generator=generator)


def golden(x, group, size, n):
    return _torch_form(x.cpu().double(), group.cpu(), None if size is None else size.cpu(), n).cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "n", "width"),
    [(4, 577, 300, 1024), (2, 729, 400, 1152), (1, 2880, 700, 4096), (3, 100, 1, 33), (2, 5, 9, 1), (1, 1, 1, 64)],
)
def test_agrees_with_float64(batch, tokens, n, width, dtype):
    x, group, size = case(batch, tokens, n, width, dtype)
    for sizes in (None, size, size.float()):
        assert_close(merge_tokens(x, group, sizes, n), golden(x, group, sizes, n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_one_is_exact(dtype):
    x, _, size = case(2, 577, 577, 1000, dtype)
    order = torch.stack([torch.randperm(577), torch.randperm(577)]).cuda()
    for sizes in (None, size + 1, (size + 1) / 7):
        assert torch.equal(merge_tokens(x, order, sizes, 577).gather(1, order[..., None].expand_as(x)), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    x, group, size = case(2, 577, 100, 1100, dtype)
    for part in (x[..., :1024], x[..., 3:75], x.mT.contiguous().mT):
        assert_close(merge_tokens(part, group, size, 100), golden(part, group, size, 100))


def test_is_an_operator_and_always_the_same():
    x, group, size = case(2, 577, 50, 1024, torch.float32)
    torch.library.opcheck(merge_tokens, (x.requires_grad_(), group, size, 50))
    sizes = size / 7
    first = merge_tokens(x, group, sizes, 50)
    for _ in range(5):
        assert torch.equal(merge_tokens(x, group, sizes, 50), first)


def test_gradient():
    x, group, size = case(2, 60, 9, 32, torch.float32)
    grads = []
    for device in ("cuda", "cpu"):
        y = x.detach().to(device).requires_grad_()
        merge_tokens(y, group.to(device), size.to(device), 9).square().sum().backward()
        grads.append(y.grad.cpu())
    torch.testing.assert_close(*grads)
