"""Triton form of `dequantize`, the same to the bit as the torch form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.quantize_pack import FLOATS, group_of
from vlmaccel.kernels.gpu.target import Example, target

# bytes of a program, warps
CONFIGS = {
    "sm_80": (1024, 4),
    "sm_86": (1024, 4),
    "sm_90": (1024, 4),
    "gfx942": (1024, 4),
    "interpreter": (64, 4),
}


@triton.jit
def _unpack(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    x_ptr,
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
    codes = tl.load(codes_ptr + byte, mask=inside, other=0).to(tl.int32)
    for part in tl.static_range(PARTS):
        channel = byte % BYTES + part * BYTES
        group = group_of(row, channel, WIDTH, GROUP, CHANNELS)
        scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group, mask=inside, other=0.0).to(tl.float32)
        x = ((codes >> (part * BITS)) & ((1 << BITS) - 1)).to(tl.float32) * scale + zero
        tl.store(x_ptr + row * WIDTH + channel, x.to(x_ptr.dtype.element_ty), mask=inside)


def fits(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dim: int, dtype: torch.dtype) -> bool:
    known = all(x in FLOATS for x in (scale.dtype, zero.dtype, dtype))
    return known and bits in (2, 4, 8) and dim in (-1, -2) and codes.numel() > 0


def launch(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dim: int, dtype: torch.dtype) -> Tensor:
    codes, scale, zero = codes.contiguous(), scale.contiguous(), zero.contiguous()
    x = codes.new_empty(*codes.shape[:-1], codes.shape[-1] * (8 // bits), dtype=dtype)
    group = x.shape[dim] // scale.shape[dim]
    meta, options = _arguments(target(codes), x.shape[-1], bits, group, dim)
    _unpack[(triton.cdiv(codes.numel(), meta["BLOCK"]),)](codes, scale, zero, x, codes.numel(), **meta, **options)
    return x


def _arguments(device: str, width: int, bits: int, group: int, dim: int) -> tuple[dict, dict]:
    """Constants and options of a launch. width: channels of a token."""
    block, num_warps = CONFIGS[device]
    meta = {"WIDTH": width, "GROUP": group, "CHANNELS": dim == -1, "BITS": bits, "BLOCK": block}
    return meta, {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}


def examples(target: str) -> list[Example]:
    """Keys and values of LLaVA and of a head dimension of 80, in the groups of the cache."""
    found = []
    for width, group, dim, choice in (
        (128, 32, -2, (2, 4, 8)),
        (128, 32, -1, (2, 4, 8)),
        (80, 32, -2, (4,)),
        (80, 20, -1, (4,)),
    ):
        for bits in choice:
            meta, options = _arguments(target, width, bits, group, dim)
            name = f"{width} {'channels' if dim == -1 else 'tokens'} {bits} bits"
            pointers = torch.uint8, torch.float16, torch.float16, torch.bfloat16
            found.append(Example(name, _unpack, (*pointers, 2**24), meta, options, False, False))
    return found
