"""Farthest-first order on a GPU: the same indices as those of the torch form, at the sizes of real pictures."""

from __future__ import annotations

import math

import pytest
import torch

from vlmaccel.kernels.farthest_first import _torch_form, farthest_first
from vlmaccel.kernels.gpu.farthest_first import MOST, fits


def cosine_distances(m):
    generator = torch.Generator("cuda").manual_seed(m)
    x = torch.randn(m, 64, device="cuda", generator=generator)
    x = torch.nn.functional.normalize(x, dim=-1)
    return 1 - x @ x.mT


def start_at(number):
    return torch.tensor([number], device="cuda")


def check(distance, kept, start=0):
    args = distance, start_at(start), kept
    assert fits(*args)
    assert torch.equal(farthest_first(*args), _torch_form(*args))


@pytest.mark.parametrize("m", [1, 2, 33, 100, 257, 576, 729, 1024, 1521, 2048, 2880, 4095, 4096, 5000, 8192])
def test_agrees_with_the_torch_form(m):
    check(cosine_distances(m), (m + 1) // 2, m // 3)
    check(cosine_distances(m), 1)


@pytest.mark.parametrize("m", [MOST - 1, MOST])
def test_the_most_that_fit(m):
    check(cosine_distances(m), 200)


@pytest.mark.parametrize("m", [64, 577, 4096])
def test_all_are_picked(m):
    check(cosine_distances(m), m)
    assert torch.equal(
        farthest_first(cosine_distances(m), start_at(0), m).sort().values, torch.arange(m, device="cuda")
    )


@pytest.mark.parametrize("m", [100, 577, 2048])
def test_ties_go_to_the_lowest_index(m):
    generator = torch.Generator("cuda").manual_seed(0)
    number = torch.randint(-2, 3, (m, m), device="cuda", generator=generator)
    check(number.float(), m)
    check(number.float() * number.flip(0).sign(), m)  # zeros of both signs
    for value in (0.0, -1.0):
        assert torch.equal(
            farthest_first(torch.full((m, m), value, device="cuda"), start_at(0), m), torch.arange(m, device="cuda")
        )


def test_layouts():
    x = torch.rand(600, 3, 700, device="cuda")
    for distance in (x[:, 1, :600], x[:, 2, 3:603], x[:, 0, :600].mT, x[0, :1, :600].expand(600, 600)):
        check(distance, 300)


@pytest.mark.parametrize("m", [576, 577])
def test_nan_gives_indices_all_the_same(m):
    nan = torch.rand(m, m, device="cuda") < 0.3
    for where in (nan, nan[:1].expand(m, m), nan[:, :1].expand(m, m), torch.ones_like(nan)):
        distance = torch.rand(m, m, device="cuda").masked_fill(where, math.nan)
        assert torch.equal(farthest_first(distance, start_at(0), m).sort().values, torch.arange(m, device="cuda"))


def test_what_has_no_triton_form():
    args = cosine_distances(300).double(), start_at(7), 20
    assert not fits(*args)
    assert torch.equal(farthest_first(*args), _torch_form(*args))


def test_is_an_operator_and_always_the_same():
    args = cosine_distances(576), start_at(7), 288
    torch.library.opcheck(farthest_first, args)
    want = farthest_first(*args)
    for _ in range(5):
        assert torch.equal(farthest_first(*args), want)
