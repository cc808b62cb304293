"""Triton form of `greedy_map`: one program makes all picks, so that one launch takes the place of a dozen for every pick.

A pick has to wait for the one before it, and needs all rows since the first: their values at the new pick by the rows. These
are read anew for every pick, from L2, at what one multiprocessor can read (about 100 GB/s): p picks among c items read
2 p² c bytes. Gains stay in registers. Every thread has four items that lie side by side, the same ones of all rows, so that
only the search for the best has to look across threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.target import Example, target

CONFIGS = {"sm_80": 32, "sm_86": 32, "sm_90": 32, "gfx942": 64, "interpreter": 2}  # threads of a warp
UNIT = 4  # items of a thread, 16 bytes
EACH = 16  # rows that are read at a time; 64 KB of 1,024 items are on their way at once
MOST = 2048  # items: 16 warps of NVIDIA


@triton.jit(do_not_specialize=["row_stride", "c", "units", "most"])
def _pick(
    kernel_ptr,
    least_ptr,
    picked_ptr,
    rows_ptr,
    row_stride,
    column_stride,
    c,
    units,
    most,
    UNIT: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program. rows are units * UNIT wide, so that the compiler sees what that is a multiple of; 0 from c on."""
    place = tl.arange(0, BLOCK)
    inside, width = place < c, units * UNIT
    gain = tl.load(kernel_ptr + place.to(tl.int64) * (row_stride + column_stride), mask=inside, other=float("-inf"))
    least = tl.load(least_ptr)
    number = 0
    top, best = tl.max(gain, 0, return_indices=True)  # the lowest of equals
    while (number < most) & (top > least):  # false for NaN; inside, as all else is -inf
        from_best = kernel_ptr + best.to(tl.int64) * row_stride
        row = tl.load(from_best + place.to(tl.int64) * column_stride, mask=inside, other=0.0)
        for start in range(0, number, EACH):
            earlier = start + tl.arange(0, EACH)
            there = earlier < number
            value = tl.load(rows_ptr + earlier * width + best, mask=there, other=0.0)
            tile_ptr = rows_ptr + earlier[:, None] * width + place[None, :]
            tile = tl.load(tile_ptr, mask=there[:, None] & (place < width)[None, :], other=0.0)
            row -= tl.sum(value[:, None] * tile, 0)
        row = row / tl.sqrt(top)
        tl.store(rows_ptr + number * width + place, row, mask=place < width)
        tl.store(picked_ptr + number, best.to(tl.int64))
        gain = tl.where(place == best, float("-inf"), gain - row * row)
        top, best = tl.max(gain, 0, return_indices=True)
        number += 1
        # The next turn reads what other threads have stored, the values at its best item. Behind a barrier all threads of a
        # block see the stores of all; the search for the best has barriers too, but only where the compiler needs them.
        tl.debug_barrier()


def fits(kernel: Tensor, least: Tensor, most: int) -> bool:
    return kernel.dtype == least.dtype == torch.float32 and most > 0 and 0 < len(kernel) <= MOST


def launch(kernel: Tensor, least: Tensor, most: int) -> tuple[Tensor, Tensor]:
    c = len(kernel)
    picked = kernel.new_full((most,), -1, dtype=torch.long)
    scalars, meta, options = _arguments(target(kernel), c, kernel.stride(0), kernel.stride(1), most)
    rows = kernel.new_zeros(most, scalars[3] * UNIT)
    _pick[(1,)](kernel, least, picked, rows, *scalars, **meta, **options)
    return picked, rows[:, :c].contiguous()


def _arguments(
    device: str, c: int, row_stride: int, column_stride: int, most: int
) -> tuple[tuple[int, ...], dict, dict]:
    """Numbers, constants and options of a launch."""
    block = max(UNIT * CONFIGS[device], triton.next_power_of_2(c))
    meta = {"UNIT": UNIT, "EACH": EACH, "BLOCK": block}
    options = {"num_warps": min(16, block // (UNIT * CONFIGS[device])), "num_stages": 1}
    return (row_stride, column_stride, c, triton.cdiv(c, UNIT), most), meta, options


def examples(target: str) -> list[Example]:
    """The candidates on CPUs and on GPUs, the pictures of LLaVA and SigLIP so400m, and all that fit."""
    found = []
    for c in (256, 576, 729, 768, MOST):
        scalars, meta, options = _arguments(target, c, c, 1, (c + 1) // 2)
        pointers = torch.float32, torch.float32, torch.long, torch.float32
        found.append(Example(f"{c:,} items", _pick, (*pointers, *scalars), meta, options, False))
    return found
