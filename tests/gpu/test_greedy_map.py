"""Greedy MAP on a GPU: the picks and rows of the torch form, and CDPruner's picks those of CPUs, at the sizes of pictures."""

from __future__ import annotations

import math

import pytest
import torch

from vlmaccel.kernels.gpu.greedy_map import MOST, fits
from vlmaccel.kernels.greedy_map import _torch_form, greedy_map
from vlmaccel.methods import cdpruner
from vlmaccel.methods.cdpruner import largest_determinant
from vlmaccel.methods.greedy import cosines

LEAST = 1e-5


def kernel_of(c, rank, seed=0):
    """(c, c) float32 on the CPU, of random items with a relevance; and the relevance. It falls by half a percent from one item to
    the next, so that of gains the largest stands out by more than rounding."""
    generator = torch.Generator().manual_seed(1000 * seed + c)
    relevance = torch.randperm(c, generator=generator).mul(-0.005).exp()
    return cosines(torch.randn(c, rank, generator=generator)) * relevance * relevance[:, None], relevance


def check(kernel, most, least=LEAST):
    """Against the CPU, so that rounding differs."""
    picked, rows = greedy_map(kernel.cuda(), torch.tensor(least, device="cuda"), most)
    assert fits(kernel, torch.tensor(least), most)
    want_picked, want_rows = _torch_form(kernel, torch.tensor(least), most)
    assert torch.equal(picked.cpu(), want_picked)
    torch.testing.assert_close(rows.cpu(), want_rows, rtol=0, atol=1e-3)


@pytest.mark.parametrize("c", [1, 2, 33, 100, 257, 576, 729, 768, 1023, 1024, 1521, MOST - 1, MOST])
def test_agrees_with_the_cpu(c):
    check(kernel_of(c, 2048)[0], 1)
    check(kernel_of(c, 2048)[0], min((c + 3) // 4, 256))


@pytest.mark.parametrize("c", [576, 729])
def test_stops_where_the_rank_ends(c):
    kernel = kernel_of(c, 4)[0]
    check(kernel, 40)
    assert int((greedy_map(kernel.cuda(), torch.tensor(LEAST, device="cuda"), 40)[0] >= 0).sum()) == 4


@pytest.mark.parametrize("c", [64, 577, MOST])
def test_ties_go_to_the_lowest_index(c):
    """Of items at right angles, whose gains stay what they are until all are picked."""
    kernel, zero = torch.eye(c, device="cuda"), torch.tensor(0.0, device="cuda")
    assert torch.equal(greedy_map(kernel, zero, c)[0], torch.arange(c, device="cuda"))
    gain = torch.arange(c, device="cuda").remainder(5).add(1).float()
    want = gain.argsort(descending=True, stable=True)
    assert torch.equal(greedy_map(kernel * gain, zero, c)[0], want)


@pytest.mark.parametrize("c", [200, 576])
def test_all_are_picked_and_the_rows_are_a_factor(c):
    """A row is read by other threads than those that have stored it: what they read late or never shows here."""
    kernel = kernel_of(c, 4 * c)[0].cuda() + 0.05 * torch.eye(c, device="cuda")
    for _ in range(5):
        picked, rows = greedy_map(kernel, torch.tensor(0.0, device="cuda"), c)
        assert torch.equal(picked.sort().values, torch.arange(c, device="cuda"))
        rows = rows.double()
        torch.testing.assert_close(rows.mT @ rows, kernel.double(), rtol=0, atol=1e-4)


def test_layouts():
    kernel = kernel_of(600, 2048)[0].cuda()
    wide = torch.full((600, 3, 700), math.nan, device="cuda")
    wide[:, 1, 3:603] = kernel
    least = torch.tensor(LEAST, device="cuda")
    want = greedy_map(kernel, least, 100)
    for same in (wide[:, 1, 3:603], wide[:, 1, 3:603].mT, torch.stack([kernel, kernel], -1)[..., 1]):
        picked, rows = greedy_map(same, least, 100)
        assert torch.equal(picked, want[0])
        torch.testing.assert_close(rows, want[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("c", [576, 577])
def test_nan_gives_indices_all_the_same(c):
    nan = torch.rand(c, c, device="cuda") < 0.3
    for where in (nan, nan.mT, nan[:1].expand(c, c), torch.ones_like(nan)):
        kernel = kernel_of(c, 2048)[0].cuda().masked_fill(where, math.nan)
        picked = greedy_map(kernel, torch.tensor(0.0, device="cuda"), c)[0]
        picked = picked[picked >= 0]
        assert picked.unique().numel() == len(picked) and bool((picked < c).all())


def test_what_has_no_triton_form():
    kernel, least = kernel_of(300, 2048)[0].cuda().double(), torch.tensor(LEAST, device="cuda").double()
    assert not fits(kernel, least, 20)
    assert torch.equal(greedy_map(kernel, least, 20)[0], _torch_form(kernel, least, 20)[0])


def test_is_an_operator_and_always_the_same():
    kernel, least = kernel_of(577, 2048)[0].cuda(), torch.tensor(LEAST, device="cuda")
    torch.library.opcheck(greedy_map, (kernel, least, 288))
    want = greedy_map(kernel, least, 288)
    for _ in range(5):
        assert all(map(torch.equal, greedy_map(kernel, least, 288), want))


@pytest.mark.parametrize(("m", "kept"), [(16, 5), (576, 64), (729, 200), (2048, 400), (4096, 1024)])
def test_cdpruner_picks_what_it_picks_on_a_cpu(m, kept):
    kernel, relevance = kernel_of(m, 2048)
    on_gpu = largest_determinant(kernel.cuda(), kept, relevance.cuda())
    assert torch.equal(on_gpu.cpu(), largest_determinant(kernel, kept, relevance))


@pytest.mark.parametrize("candidates", [1, 40, 768])
def test_cdpruner_where_tokens_are_there_twice(monkeypatch, candidates):
    """Of two that are equal but for rounding either may be picked."""
    monkeypatch.setattr(cdpruner, "CANDIDATES_ON_GPUS", candidates)
    kernel, relevance = kernel_of(512, 2048)
    kernel, relevance = kernel.repeat(2, 2), relevance.repeat(2)
    on_gpu = largest_determinant(kernel.cuda(), 200, relevance.cuda()).cpu()
    assert torch.equal(on_gpu % 512, largest_determinant(kernel, 200, relevance) % 512)
    assert (on_gpu % 512).unique().numel() == 200
    same = torch.eye(60).repeat(2, 2)  # here they are equal
    assert largest_determinant(same.cuda(), 90, torch.arange(120.0).cuda()).tolist() == [
        *range(60),
        *range(119, 89, -1),
    ]


@pytest.mark.parametrize("candidates", [1, 40, 768])
@pytest.mark.parametrize("m", [576, 1000])
def test_cdpruner_goes_on_by_relevance_where_the_rank_ends(monkeypatch, m, candidates):
    monkeypatch.setattr(cdpruner, "CANDIDATES_ON_GPUS", candidates)
    kernel, relevance = kernel_of(m, 4)
    on_gpu = largest_determinant(kernel.cuda(), 64, relevance.cuda()).cpu()
    assert torch.equal(on_gpu, largest_determinant(kernel, 64, relevance))
    rest = relevance.index_fill(0, on_gpu[:4], -1).argsort(descending=True)[:60]
    assert torch.equal(on_gpu[4:], rest)
