"""Triton form of `quantize_keys`, the same to the bit as the torch form on a CPU: a program walks through the channels of a
group, its tokens side by side, and finds the range of each channel on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.target import Example, target
from vlmaccel.kernels.quantize_keys import CLIP, plan
from vlmaccel.kernels.quantize_pack import TINY, pack

# warps of a program: one for 32 tokens, as channels come one after the other
CONFIGS = {"sm_80": 1, "sm_86": 1, "sm_90": 1, "gfx942": 1, "interpreter": 1}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: there float32 has whole numbers only, and adding rounds half to even


@triton.jit
def _round_by_mean(
    x_ptr,
    order_ptr,
    gain_ptr,
    weight_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    groups,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
    MARGIN: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program: a group of GROUP tokens of WIDTH channels. groups: of each head. Codes fill a byte each."""
    group = tl.program_id(0).to(tl.int64)
    plan_of = group // groups * WIDTH
    token = tl.arange(0, BLOCK)
    here = token < GROUP
    rows = (group * GROUP + token) * WIDTH
    top = tl.full([BLOCK], TOP, tl.float32)
    off = tl.zeros([BLOCK], tl.float32)
    for number in range(WIDTH):
        channel = tl.load(order_ptr + plan_of + number)
        gain, weight = tl.load(gain_ptr + plan_of + number), tl.load(weight_ptr + plan_of + number)
        x = tl.load(x_ptr + rows + channel, mask=here, other=0.0).to(tl.float32)
        low = tl.min(tl.where(here, x, float("inf")), 0)
        high = tl.max(tl.where(here, x, float("-inf")), 0)
        margin = (high - low) * MARGIN
        kept = (low + margin).to(zero_ptr.dtype.element_ty)
        zero = kept.to(tl.float32)
        step = tl.div_rn(tl.zeros([BLOCK], tl.float32) + (high - margin - zero), top)
        step = tl.maximum(step, TINY).to(scale_ptr.dtype.element_ty)
        scale = step.to(tl.float32)
        code = tl.minimum(tl.maximum(tl.div_rn(x - gain * off - zero, scale), 0.0), TOP)
        code = (code + ROUND) - ROUND
        off += weight * (code * scale + zero - x)
        tl.store(codes_ptr + rows + channel, code.to(tl.uint8), mask=here)
        tl.store(scale_ptr + group * WIDTH + channel + token, step, mask=token == 0)
        tl.store(zero_ptr + group * WIDTH + channel, kept)


def fits(x: Tensor, mean: Tensor, variance: Tensor, bits: int, group: int, dtype: torch.dtype) -> bool:
    whole = bits in CLIP and x.shape[-1] % (8 // bits) == 0 and x.shape[2] % group == 0 and group <= 1024
    return whole and x.dtype in FLOATS and dtype in FLOATS and x.numel() > 0


def launch(
    x: Tensor, mean: Tensor, variance: Tensor, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    batch, heads, n, dim = x.shape
    order, gain, weight = (t.contiguous() for t in plan(mean.float(), variance.float()))
    scale, zero = (x.new_empty(batch, heads, n // group, dim, dtype=dtype) for _ in range(2))
    codes = torch.empty_like(x, dtype=torch.uint8)
    meta, options = _arguments(target(x), dim, bits, group, dtype)
    programs = batch * heads * (n // group)
    _round_by_mean[(programs,)](x, order, gain, weight, codes, scale, zero, n // group, **meta, **options)
    return pack(codes, bits), scale, zero


def _arguments(device: str, width: int, bits: int, group: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """Constants of the kernel and the options of its launch."""
    meta = {"WIDTH": width, "GROUP": group, "TOP": 2.0**bits - 1, "MARGIN": (1 - CLIP[bits]) / 2, "TINY": TINY[dtype]}
    options = {"num_warps": CONFIGS[device], "num_stages": 1, "enable_fp_fusion": False}
    return {**meta, "BLOCK": triton.next_power_of_2(group)}, options


def examples(target: str) -> list[Example]:
    """Keys of LLaVA and of a head dimension of 80, in the groups of the cache."""
    found = []
    for width, bits in ((128, 2), (80, 2), (128, 4)):
        meta, options = _arguments(target, width, bits, 32, torch.float16)
        pointers = (
            torch.bfloat16,
            torch.int64,
            torch.float32,
            torch.float32,
            torch.uint8,
            torch.float16,
            torch.float16,
        )
        name = f"keys of {width} channels, {bits} bits"
        found.append(Example(name, _round_by_mean, (*pointers, 60), meta, options, False, False))
    return found
