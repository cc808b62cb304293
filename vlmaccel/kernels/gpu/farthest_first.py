"""Triton form of `farthest_first`, the same to the index as the torch form: one program makes all picks after the first.

A pick has to wait for the one before it, so the latency of a pick is all that counts: a row of distances is read, and the
farthest point is found. How far points are from the picked ones stays in registers. The farthest is looked for first in each
thread, then in each warp, where integers are reduced by one instruction, and only then across warps, which wait for each
other once. That is a matter of speed alone: it hangs on the compiler to lay the values out as the shapes here suggest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.target import Example, target

CONFIGS = {"sm_80": 32, "sm_86": 32, "sm_90": 32, "gfx942": 64, "interpreter": 2}  # threads of a warp
EACH = 16  # points of a thread, if there are enough; few, as the threads of a warp wait for each other
WARPS = 4, 16  # at least, if there are enough points, and at most
MOST = 2**14  # points that fit into registers


@triton.jit(do_not_specialize=["row_stride", "m", "kept"])
def _pick(
    distance_ptr,
    start_ptr,
    picked_ptr,
    row_stride,
    m,
    kept,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program. row_stride and m are in UNIT values, so that the compiler sees what they are multiples of; WIDTH: points
    that lie side by side in a warp, UNIT in each of its threads."""
    place = tl.arange(0, BLOCK // (WARPS * WIDTH))[:, None] * (WARPS * WIDTH) + tl.arange(0, WARPS * WIDTH)[None, :]
    inside = place < m * UNIT
    left = tl.where(inside, float("inf"), float("-inf"))  # to the nearest of the picked points; -inf for these
    at = tl.load(start_ptr).to(tl.int32)
    for number in range(kept):
        tl.store(picked_ptr + number, at.to(tl.int64))
        row = tl.load(distance_ptr + at.to(tl.int64) * row_stride * UNIT + place, mask=inside, other=float("-inf"))
        left = tl.where(place == at, float("-inf"), tl.minimum(left, row))  # the number of the two where one is NaN
        # in a thread
        most = tl.max(left, 0)
        lowest = tl.min(tl.where(left == most[None, :], place, BLOCK - 1), 0)
        # in a warp: integers in the order of the values, with one zero
        bits = (most + 0.0).to(tl.int32, bitcast=True)
        value = tl.reshape(bits ^ ((bits >> 31) & 0x7FFFFFFF), [WARPS, WIDTH])
        most = tl.max(value, 1)
        lowest = tl.min(tl.where(value == most[:, None], tl.reshape(lowest, [WARPS, WIDTH]), BLOCK - 1), 1)
        # in all: of equal values the lowest place has the largest key
        key = (most.to(tl.int64) << 32) | (BLOCK - 1 - lowest).to(tl.int64)
        at = BLOCK - 1 - (tl.max(key, 0) & (BLOCK - 1)).to(tl.int32)


def fits(distance: Tensor, start: Tensor, kept: int) -> bool:
    return distance.dtype == torch.float32 and 0 < kept <= len(distance) <= MOST


def launch(distance: Tensor, start: Tensor, kept: int) -> Tensor:
    distance = distance if distance.stride(1) == 1 else distance.contiguous()
    picked = distance.new_empty(kept, dtype=torch.long)
    scalars, meta, options = _arguments(target(distance), len(distance), distance.stride(0), kept)
    _pick[(1,)](distance, start, picked, *scalars, **meta, **options)
    return picked


def _arguments(device: str, m: int, row_stride: int, kept: int) -> tuple[tuple[int, ...], dict, dict]:
    """Numbers, constants and options of a launch."""
    unit = 4 if m % 4 == row_stride % 4 == 0 else 1
    width = unit * CONFIGS[device]
    block = max(width, triton.next_power_of_2(m))
    least, most = WARPS
    warps = min(block // width, most, max(least, block // (EACH * CONFIGS[device])))
    meta = {"UNIT": unit, "WIDTH": width, "WARPS": warps, "BLOCK": block}
    return (row_stride // unit, m // unit, kept), meta, {"num_warps": warps, "num_stages": 1}


def examples(target: str) -> list[Example]:
    """Tokens of a picture: LLaVA, SigLIP so400m, Qwen2-VL, and up to all that fit."""
    found = []
    for m in (576, 729, 4096, MOST - 1, MOST):
        scalars, meta, options = _arguments(target, m, m, (m + 1) // 2)
        pointers = torch.float32, torch.long, torch.long
        found.append(Example(f"{m:,} points", _pick, (*pointers, *scalars), meta, options, False, m % 4 == 0))
    return found
