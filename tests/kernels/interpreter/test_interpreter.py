"""The tests' own tools: the repaired interpreter computes in bfloat16, and the sanitizer finds what it is there to find."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _bf16(a_ptr, b_ptr, dot_ptr, sum_ptr, chain_ptr, less_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tile = at[:, None] * N + at[None, :]
    a, b = tl.load(a_ptr + tile), tl.load(b_ptr + tile)
    tl.store(dot_ptr + tile, tl.dot(a, b))
    tl.store(sum_ptr + at, tl.sum(a, 1))
    tl.store(chain_ptr + tile, a * b - tl.maximum(a, b))
    tl.store(less_ptr + tile, (a < b).to(tl.int8))


def test_bf16_computes():
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    dot, chain, total = torch.empty(16, 16), torch.empty_like(a), a.new_empty(16)
    less = torch.empty(16, 16, dtype=torch.int8)
    _bf16[(1,)](a, b, dot, total, chain, less, 16)
    torch.testing.assert_close(dot, a.float() @ b.float())
    torch.testing.assert_close(total, a.float().sum(1).bfloat16(), atol=0, rtol=2**-8)
    assert torch.equal(chain, a * b - torch.maximum(a, b))
    assert torch.equal(less.bool(), a < b)


@triton.jit
def _cast(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("special", [0.0, float("nan"), float("inf"), 1 + 2**-8, 1 + 3 * 2**-8])
def test_float32_is_rounded_to_bf16_as_torch_does(special):
    x = torch.cat([torch.randn(255), torch.tensor([special])])
    y = torch.empty(256, dtype=torch.bfloat16)
    _cast[(1,)](x, y, 256)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16)) or special != special
    torch.testing.assert_close(y, x.bfloat16(), atol=0, rtol=0, equal_nan=True)
    back = torch.empty(256)
    _cast[(1,)](y, back, 256)
    torch.testing.assert_close(back, y.float(), atol=0, rtol=0, equal_nan=True)


@triton.jit
def _count(n_ptr, out_ptr):
    total = 0
    for i in range(tl.load(n_ptr)):
        total += i
    tl.store(out_ptr, total)


def test_a_loop_over_a_tensor():
    out = torch.empty(1, dtype=torch.int64)
    _count[(1,)](torch.tensor([5]), out)
    assert out.item() == 10


@triton.jit
def _double(x_ptr, y_ptr, n, SAFE: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0) if SAFE else tl.load(x_ptr + at)
    tl.store(y_ptr + at, x * 2, mask=at < n)


def test_a_load_out_of_bounds_is_found():
    x, y = torch.randn(100), torch.empty(100)
    _double[(2,)](x, y, 100, True, 64)
    assert torch.equal(y, x * 2)
    with pytest.raises(Exception, match=r"load: 28 of 64 addresses out of bounds.*program \(1, 0, 0\)"):
        _double[(2,)](x, y, 100, False, 64)


def test_bounds_are_those_of_a_view():
    packed = torch.randn(200)
    with pytest.raises(Exception, match="load: 28 of 64 addresses out of bounds"):
        _double[(2,)](packed[:100], torch.empty(100), 100, False, 64)
    both = torch.randn(100, 2)  # views that overlap: the second ends behind the first
    y = torch.empty(199)
    _double[(4,)](both.flatten()[:199], y, 199, True, 64)
    assert torch.equal(y, both.flatten()[:199] * 2)


def test_a_launch_without_memory():
    with pytest.raises(Exception, match="load: 64 of 64 addresses out of bounds"):
        _double[(1,)](torch.empty(0), torch.empty(0), 64, True, 64)
    _double[(1,)](torch.empty(0), torch.empty(0), 0, True, 64)


@triton.jit
def _write(out_ptr, STRIDE: tl.constexpr, ADD: tl.constexpr):
    at = out_ptr + tl.program_id(0) * STRIDE + tl.arange(0, 2)
    tl.store(at, (tl.load(at) if ADD else 0) + tl.arange(0, 2))


@pytest.mark.parametrize(("add", "kind"), [(False, "write/write"), (True, "write/read")])
def test_a_race_is_found(add, kind):
    out = torch.zeros(8, dtype=torch.int32)
    _write[(4,)](out, 2, add)
    for stride in (0, 1):
        with pytest.raises(Exception, match=rf"{kind} race .*\(0, 0, 0\) and \(1, 0, 0\)"):
            _write[(4,)](out, stride, add)


@triton.jit
def _shift(x_ptr, N: tl.constexpr):
    program = tl.program_id(0)
    tl.store(x_ptr + program, tl.load(x_ptr + program + 1, mask=program < N - 1, other=0))


def test_a_write_after_another_program_read_is_a_race():
    with pytest.raises(Exception, match=r"read/write race .*\(0, 0, 0\) and \(1, 0, 0\)"):
        _shift[(4,)](torch.zeros(4), 4)


@triton.jit
def _twice(out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N) // 2, tl.arange(0, N))


def test_two_values_for_one_address_are_found():
    with pytest.raises(Exception, match="one store has two values for an address"):
        _twice[(1,)](torch.zeros(4, dtype=torch.int32), 8)


@triton.jit
def _rows(x_ptr, out_ptr, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, tl.load(x_ptr + (row.to(tl.int64) if WIDE else row) * stride))


def test_an_offset_that_overflows_32_bits_is_found():
    stride = 1_100_000_000
    x = torch.from_numpy(np.zeros(2 * stride + 1, dtype=np.uint8))  # zeros of numpy take no memory before they are used
    for row in range(3):
        x[row * stride] = row + 1
    out = torch.empty(3, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _rows[(3,)](x, out, stride, True)
    assert out.tolist() == [1, 2, 3]
    with pytest.raises(Exception, match=r"load: 1 of 1 addresses out of bounds.*program \(2, 0, 0\)"):
        _rows[(3,)](x, out, stride, False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8])
def test_new_memory_is_poisoned(dtype):
    x = torch.zeros(3, dtype=dtype)
    for out in (torch.empty(3, dtype=dtype), torch.empty_like(x), x.new_empty(3), x.new_empty(1, dtype=dtype)):
        assert out.isnan().all() if dtype.is_floating_point else (out > 100).all()
