"""Triton form of `quantize_pack`, the same to the bit as the torch form on a CPU: one kernel finds the range of every group,
one makes and packs the codes. The values are read twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.target import Example, target
from vlmaccel.kernels.quantize_pack import TINY

# values of a program of the first kernel, bytes of a program of the second one, warps
CONFIGS = {
    "sm_80": (2048, 1024, 4),
    "sm_86": (2048, 1024, 4),
    "sm_90": (2048, 512, 2),
    "gfx942": (2048, 1024, 4),
    "interpreter": (256, 64, 4),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: there float32 has whole numbers only, and adding rounds half to even


@triton.jit
def _range(
    x_ptr,
    scale_ptr,
    zero_ptr,
    count,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
):
    """Program: BLOCK groups of GROUP values, STEP apart, by the order of their scales. count: of groups."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = x_ptr + group // STEP * (GROUP * STEP) + group % STEP
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, GROUP, BLOCK_GROUP):
        number = start + tl.arange(0, BLOCK_GROUP)
        here = (group < count)[:, None] & (number < GROUP)[None, :]
        x = tl.load(first[:, None] + number[None, :] * STEP, mask=here, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(here, x, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(here, x, float("-inf")), 1))
    zero = low.to(zero_ptr.dtype.element_ty)
    scale = tl.maximum(tl.div_rn(high - zero.to(tl.float32), tl.full([BLOCK], TOP, tl.float32)), TINY)
    tl.store(zero_ptr + group, zero, mask=group < count)
    tl.store(scale_ptr + group, scale.to(scale_ptr.dtype.element_ty), mask=group < count)


@triton.jit
def group_of(row, channel, WIDTH: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Number of the group that a channel of a token is in, of all groups. CHANNELS: whether channels share a scale."""
    group = row * (WIDTH // GROUP) + channel // GROUP if CHANNELS else row // GROUP * WIDTH + channel
    return group


@triton.jit
def _pack(
    x_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    count,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program: BLOCK of all `count` bytes. WIDTH: channels of a token."""
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = WIDTH // PARTS
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < count
    row = byte // BYTES
    packed = tl.zeros([BLOCK], tl.int32)
    for part in tl.static_range(PARTS):
        channel = byte % BYTES + part * BYTES
        group = group_of(row, channel, WIDTH, GROUP, CHANNELS)
        x = tl.load(x_ptr + row * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + group, mask=inside, other=1.0).to(tl.float32)
        zero = tl.load(zero_ptr + group, mask=inside, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(tl.div_rn(x - zero, scale), 0.0), (1 << BITS) - 1.0)
        packed |= ((code + ROUND) - ROUND).to(tl.int32) << (part * BITS)
    tl.store(codes_ptr + byte, packed.to(tl.uint8), mask=inside)


def fits(x: Tensor, bits: int, group: int, dim: int, dtype: torch.dtype) -> bool:
    whole = bits in (2, 4, 8) and x.shape[-1] % (8 // bits) == 0 and x.shape[dim] % group == 0
    return whole and dim in (-1, -2) and x.dtype in FLOATS and dtype in FLOATS and x.numel() > 0


def launch(x: Tensor, bits: int, group: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    width, shape = x.shape[-1], list(x.shape)
    shape[dim] //= group
    scale, zero = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
    codes = x.new_empty(*x.shape[:-1], width * bits // 8, dtype=torch.uint8)
    ranges, packs, options = _arguments(target(x), width, bits, group, dim, dtype)
    grid = triton.cdiv(scale.numel(), ranges["BLOCK"]), triton.cdiv(codes.numel(), packs["BLOCK"])
    _range[grid[:1]](x, scale, zero, scale.numel(), **ranges, **options)
    _pack[grid[1:]](x, scale, zero, codes, codes.numel(), **packs, **options)
    return codes, scale, zero


def _arguments(device: str, width: int, bits: int, group: int, dim: int, dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """Constants of both kernels and the options of their launch. width: channels of a token."""
    values, bytes_, num_warps = CONFIGS[device]
    wide = min(triton.next_power_of_2(group), 128)
    ranges = {"GROUP": group, "STEP": 1 if dim == -1 else width, "TOP": 2.0**bits - 1, "TINY": TINY[dtype]}
    packs = {"WIDTH": width, "GROUP": group, "CHANNELS": dim == -1, "BITS": bits, "BLOCK": bytes_}
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}
    return {**ranges, "BLOCK": max(1, values // wide), "BLOCK_GROUP": wide}, packs, options


def examples(target: str) -> list[Example]:
    """Keys and values of LLaVA and of a head dimension of 80, in the groups of the cache."""
    found = []
    for width, group, dim, choice in (
        (128, 32, -2, (2, 4, 8)),
        (128, 32, -1, (2, 4, 8)),
        (80, 32, -2, (4,)),
        (80, 20, -1, (4,)),
    ):
        name = f"{width} {'channels' if dim == -1 else 'tokens'}"
        pointers, count = (torch.bfloat16, torch.float16, torch.float16), 2**20 * width // group
        for bits in choice:
            ranges, packs, options = _arguments(target, width, bits, group, dim, torch.float16)
            args = (*pointers, torch.uint8, 2**20 * width * bits // 8)
            found.append(Example(f"pack {name} {bits} bits", _pack, args, packs, options, False, False))
        found.append(Example(f"range {name}", _range, (*pointers, count), ranges, options, False, False))
    return found
