"""The Triton form of farthest-first order: the same indices as the loop over points."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.test_farthest_first import KINDS, distances
from vlmaccel.kernels.farthest_first import _torch_form, reference
from vlmaccel.kernels.gpu import farthest_first as module
from vlmaccel.kernels.gpu.farthest_first import fits, launch

START = torch.tensor([0])


def check(distance, kept, start=START):
    assert fits(distance, start, kept)
    picked = launch(distance, start, kept)
    assert picked.dtype == torch.long
    assert torch.equal(picked, reference(distance, start, kept))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 33, 60])
def test_sizes(m, kind):
    for kept in {1, (m + 1) // 2, m}:
        check(distances(m, kind, seed=1), kept, torch.tensor([m // 2]))


@pytest.mark.parametrize("m", [300, 331])
def test_many_points_in_a_thread(m, monkeypatch):
    monkeypatch.setattr(module, "WARPS", (2, 4))
    distance = distances(m, "ties")
    _, meta, _ = module._arguments("interpreter", m, m, 40)
    assert meta["BLOCK"] > 8 * meta["WARPS"] * meta["WIDTH"]
    assert torch.equal(launch(distance, START, 40), _torch_form(distance, START, 40))


def test_ties_go_to_the_lowest_index():
    for distance in (torch.zeros(40, 40), torch.full((40, 40), -2.0), 1 - torch.eye(40)):
        assert launch(distance, START, 40).tolist() == list(range(40))


def test_a_tie_of_two_zeros():
    """In one thread, in one warp and between warps: the lowest index of 0.0 and -0.0."""
    for low, high in ((1, 2), (1, 9), (1, 33), (1, 65)):
        for zero in (0.0, -0.0):
            distance = torch.full((80, 80), -1.0)
            distance[0] = -0.5
            distance[:, low], distance[:, high] = zero, -zero
            assert launch(distance, START, 3).tolist() == [0, low, high]


def test_values_of_any_size():
    value = torch.tensor([0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e-7, -1e-7, 3e38, -3e38, math.inf])
    order = torch.randperm(40)
    check(value.repeat(4)[order].expand(40, 40), 40)


def test_layouts():
    x = torch.randn(50, 3, 60)
    for distance in (x[:, 1, :50], x[:, 2, 3:53], x[:, 0, :50].mT, x[0, :1, :50].expand(50, 50), x[:48, 1, 4:52]):
        check(distance, 20)


@pytest.mark.parametrize("m", [24, 25])
def test_nan_gives_indices_all_the_same(m):
    for nan in (torch.rand(m, m) < 0.3, torch.eye(m)[4].bool().expand(m, m), torch.ones(m, m, dtype=torch.bool)):
        for distance in (torch.rand(m, m).masked_fill(nan, math.nan), torch.rand(m, m).masked_fill(nan.mT, math.nan)):
            assert launch(distance, START, m).sort().values.tolist() == list(range(m))


def test_what_does_not_fit():
    distance = distances(8, "any")
    assert not fits(distance.double(), START, 3)
    assert not fits(distance.bfloat16(), START, 3)
    assert not fits(distance, START, 0)
    assert not fits(distance, START, 9)
    assert not fits(torch.zeros(1).expand(module.MOST + 1, module.MOST + 1), START, 3)
    assert fits(torch.zeros(1).expand(module.MOST, module.MOST), START, 3)
