"""The Triton form of the weighted segment means against the loop."""

from __future__ import annotations

import pytest
import torch

from tests.support.close import assert_close
from vlmaccel.kernels.gpu.merge_tokens import fits, launch
from vlmaccel.kernels.merge_tokens import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, group, size, n):
    assert fits(x, group, size, n)
    out = launch(x, group, size, n)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    assert_close(out, reference(x.double(), group, size, n))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "n", "width"),
    [(1, 1, 1, 1), (2, 7, 3, 5), (3, 17, 20, 33), (2, 30, 9, 72)],
)
@pytest.mark.parametrize("sizes", [None, torch.int64, torch.float32])
def test_shapes(batch, tokens, n, width, sizes, dtype):
    group = torch.randint(-1, n, (batch, tokens))
    size = None if sizes is None else torch.randint(0, 4, (batch, tokens)).to(sizes)
    check(torch.randn(batch, tokens, width).to(dtype), group, size, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    x = torch.randn(2, 3, 19, 48).to(dtype)
    group, size = torch.randint(-1, 6, (19, 2)).mT, torch.randint(1, 4, (19, 2)).mT
    for part in (x[:, 1, :, :40], x[:, 2, :, 3:36], x.transpose(1, 2)[:, :, 1], x[:, 0, :, :20].mT.contiguous().mT):
        check(part, group, size, 6)
    check(x[:1, 0].expand(2, -1, -1), group, None, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sized", [True, False])
def test_a_group_of_one_is_exact(sized, dtype):
    x = torch.randn(2, 40, 7).to(dtype)
    order = torch.stack([torch.randperm(40), torch.randperm(40)])
    size = torch.rand(2, 40) * torch.randint(1, 600, (2, 40)) if sized else None
    assert torch.equal(launch(x, order, size, 40).gather(1, order[..., None].expand_as(x)), x)


def test_a_token_that_is_dropped_is_not_read():
    x = torch.randn(2, 9, 5)
    group = torch.randint(0, 3, (2, 9))
    group[:, ::2] = -1
    x[:, ::2] = torch.nan
    assert launch(x, group, torch.ones(2, 9), 3).isfinite().all()


def test_slots_without_members_or_with_members_of_size_0():
    x = torch.randn(1, 4, 5)
    out = check(x, torch.tensor([[1, 1, 3, 3]]), torch.tensor([[0, 0, 2, 0]]), 5)
    assert torch.equal(out[0, [0, 1, 2, 4]], torch.zeros(4, 5))
    assert torch.equal(out[0, 3], x[0, 2])
    assert torch.equal(launch(x, torch.full((1, 4), -1), None, 2), torch.zeros(1, 2, 5))


def test_one_slot_takes_all():
    check(torch.randn(2, 100, 8), torch.zeros(2, 100, dtype=torch.long), torch.randint(1, 9, (2, 100)), 1)


def test_what_does_not_fit():
    group = torch.zeros(1, 4, dtype=torch.long)
    assert not fits(torch.randn(1, 4, 3, dtype=torch.double), group, None, 1)
    assert not fits(torch.randn(1, 4, 3), group, None, 0)
    assert not fits(torch.randn(1, 4, 0), group, None, 1)
