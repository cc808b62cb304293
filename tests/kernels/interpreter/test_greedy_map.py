"""The Triton form of greedy MAP: the same picks and rows as by elimination in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.test_greedy_map import KINDS, LEAST, kernels
from vlmaccel.kernels.gpu import greedy_map as module
from vlmaccel.kernels.gpu.greedy_map import MOST, fits, launch
from vlmaccel.kernels.greedy_map import _torch_form, reference


def check(kernel, most, least=LEAST, form=reference):
    least = torch.tensor(least)
    assert fits(kernel, least, most)
    picked, rows = launch(kernel, least, most)
    want_picked, want_rows = form(kernel, least, most)
    assert picked.dtype == torch.long and rows.dtype == torch.float32
    assert torch.equal(picked, want_picked)
    assert rows.is_contiguous()
    torch.testing.assert_close(rows, want_rows, rtol=0, atol=1e-4 * float(kernel.diagonal().max().sqrt()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [1, 2, 3, 8, 33])
def test_sizes(c, kind):
    for most in {1, (c + 1) // 2, c}:
        check(kernels(c, kind, seed=1), most)


@pytest.mark.parametrize("c", [40, 41])
def test_more_rows_than_are_read_at_a_time(c, monkeypatch):
    monkeypatch.setattr(module, "EACH", 4)
    check(kernels(c, "full rank"), c - 1, form=_torch_form)


def test_ties_go_to_the_lowest_index():
    check(torch.eye(30), 30)
    check(torch.eye(30) * torch.arange(30).remainder(3).add(1), 30)


def test_stops_where_no_gain_is_above_the_least():
    kernel = torch.diag(torch.tensor([1.0, 4, 3, 2, 0]))
    for least in (0.0, 1.0, 2.5, 4.0, math.inf):
        check(kernel, 5, least)
        check(kernel, 9, least)
    check(torch.zeros(6, 6), 3, 0.0)


def test_layouts():
    kernel = kernels(40, "full rank")
    wide = torch.full((40, 3, 90), math.nan)
    wide[:, 1, 5:45] = kernel
    for same in (wide[:, 1, 5:45], wide[:, 1, 5:45].mT, torch.stack([kernel, kernel], -1)[..., 1]):
        check(same, 20)


@pytest.mark.parametrize("c", [24, 25])
def test_nan_gives_indices_all_the_same(c):
    some = torch.rand(c, c) < 0.3
    for nan in (some, some.mT, torch.eye(c)[4].bool().expand(c, c), torch.ones(c, c, dtype=torch.bool)):
        picked = launch(kernels(c, "full rank").masked_fill(nan, math.nan), torch.tensor(0.0), c)[0]
        number = int((picked >= 0).sum())
        assert bool((picked[number:] == -1).all()) and bool((picked < c).all())
        assert picked[:number].unique().numel() == number
    assert launch(torch.eye(c), torch.tensor(math.nan), c)[0].tolist() == [-1] * c


def test_what_does_not_fit():
    kernel, least = kernels(8, "full rank"), torch.tensor(LEAST)
    assert not fits(kernel.double(), least.double(), 3)
    assert not fits(kernel, least.double(), 3)
    assert not fits(kernel.bfloat16(), least.bfloat16(), 3)
    assert not fits(kernel, least, 0)
    assert not fits(torch.zeros(1).expand(MOST + 1, MOST + 1), least, 3)
    assert fits(torch.zeros(1).expand(MOST, MOST), least, 3)
