"""The gate finds what it is there to find: small kernels, each with one thing wrong."""

from __future__ import annotations

import subprocess

import pytest
import torch
import triton
import triton.language as tl

from tests.support.occupancy import blocks_per_multiprocessor, occupancy
from tests.support.triton_gate import GPUS, SHARED_MEMORY, Report, compile_for
from vlmaccel.kernels.gpu.target import TARGETS, Example


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, n, stride, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    row, k = tl.arange(0, M), tl.arange(0, K)
    acc = tl.zeros([M, M], tl.float32)
    for start in range(0, n, K):
        tile = row[:, None] * stride + start + k[None, :]
        acc = tl.dot(tl.load(a_ptr + tile), tl.trans(tl.load(b_ptr + tile)), acc, input_precision=PRECISION)
    tl.store(c_ptr + row[:, None] * M + row[None, :], acc)


def product(dtype=torch.bfloat16, m=64, stride=1024, precision="tf32", warps=4, stages=1):
    meta = {"M": m, "K": 64, "PRECISION": precision}
    options = {"num_warps": warps, "num_stages": stages}
    return Example("product", _product, (dtype, dtype, torch.float32, 1024, stride), meta, options, True)


def violations(target, example):
    return compile_for(target, example).violations(example.tensor_core, example.wide_loads)


@pytest.mark.parametrize("target", TARGETS)
def test_a_good_kernel_passes(target):
    example = product()
    report = compile_for(target, example)
    assert report.violations(True, True) == []
    kind = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma", "gfx942": "mfma"}[target]
    assert report.tensor_core.startswith(kind)
    assert report.num_warps == 4
    assert 32 <= report.registers <= 255
    assert report.shared >= 2 * 64 * 64 * 2 // 2
    assert report.occupancy is None if target == "gfx942" else 0 < report.occupancy <= 1


@pytest.mark.parametrize(("target", "few"), [("sm_80", {"maxnreg": 64}), ("gfx942", {"waves_per_eu": 8})])
def test_spills_are_found(target, few):
    example = product(m=128)
    assert not any("spills" in text for text in violations(target, example))
    example.options.update(few)
    assert any("spills" in text for text in violations(target, example))


@pytest.mark.parametrize(("target", "stages"), [("sm_86", 5), ("gfx942", 6)])
def test_too_much_shared_memory_is_found(target, stages):
    assert any("shared memory" in text for text in violations(target, product(m=128, warps=8, stages=stages)))


@pytest.mark.parametrize("target", TARGETS)
def test_scalar_loads_are_found(target):
    assert violations(target, product(stride=1023)) == ["no load of 128 bits"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_products_without_matrix_units_are_found(target):
    found = violations(target, product(torch.float32, m=16, precision="ieee"))
    assert "no matrix instruction" in found


def test_what_a_kernel_need_not_have():
    report = Report("sm_80", 32, 0, 0, 0, 4, "", 0)
    assert report.violations(False, False) == []
    assert len(report.violations(True, True)) == 2


def test_every_target_has_its_limits():
    assert set(TARGETS) <= set(GPUS) == set(SHARED_MEMORY)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(133, 57856, 4, 3), (180, 131072, 8, 1), (212, 11584, 4, 2), (32, 0, 4, 16), (32, 0, 1, 32), (255, 0, 16, 0)],
)
def test_occupancy_of_hopper(registers, shared, warps, blocks):
    """The first three are what NVIDIA's occupancy calculator says for attention kernels of those sizes."""
    assert blocks_per_multiprocessor("sm_90", registers, shared, warps) == blocks
    assert occupancy("sm_90", registers, shared, warps) == blocks * warps / 64


def test_a_kernel_that_does_not_compile_raises():
    bad = product(m=3)
    with pytest.raises((ValueError, triton.CompilationError, subprocess.CalledProcessError)):
        compile_for("sm_80", bad)
