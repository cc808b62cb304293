"""Triton form of `merge_tokens`: every slot gathers its members, in the order of the tokens, so that sums are always the
same to the bit. Sums and shares are in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels import merge_tokens
from vlmaccel.kernels.gpu.target import Example, target

# Bytes of x that a program has of each token, and warps: 128 bits a thread. AMD's warps have 64 threads.
CONFIGS = {
    "sm_80": (2048, 4),
    "sm_86": (2048, 4),
    "sm_90": (2048, 4),
    "gfx942": (2048, 2),
    "interpreter": (64, 4),
}


@triton.jit
def _gather(
    x_ptr,
    size_ptr,
    order_ptr,
    start_ptr,
    out_ptr,
    batch_stride,
    token_stride,
    width,
    tokens,
    n,
    SIZED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (slot, block of channels). Strides and the width are in UNIT values, so that the compiler sees what they
    are multiples of."""
    slot = tl.program_id(0)
    sample = slot // n
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width * UNIT
    first, end = tl.load(start_ptr + slot), tl.load(start_ptr + slot + 1)
    x_ptr += sample.to(tl.int64) * batch_stride * UNIT + channel
    mean = tl.zeros([BLOCK], tl.float32)
    # divisions round to nearest, so that the share of a lone member is 1
    total = 0.0
    share = tl.div_rn(1.0, tl.maximum(end - first, 1).to(tl.float32))
    if SIZED:
        for i in range(first, end):
            total += tl.load(size_ptr + tl.load(order_ptr + i)).to(tl.float32)
    for i in range(first, end):
        token = tl.load(order_ptr + i)
        if SIZED:
            share = tl.div_rn(tl.load(size_ptr + token).to(tl.float32), tl.maximum(total, 1e-9))
        row = x_ptr + (token - sample.to(tl.int64) * tokens) * token_stride * UNIT
        mean += share * tl.load(row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + slot.to(tl.int64) * width * UNIT + channel, mean.to(out_ptr.dtype.element_ty), mask=inside)


def fits(x: Tensor, group: Tensor, size: Tensor | None, n: int) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0 and n > 0


def launch(x: Tensor, group: Tensor, size: Tensor | None, n: int) -> Tensor:
    batch, tokens, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    order, start = merge_tokens.by_slot(merge_tokens.slots(group, n), batch * n)
    out = x.new_empty(batch, n, width)
    scalars, meta, options = _arguments(target(x), x.dtype, width, x.stride()[:2], tokens, n, size is not None)
    sizes = None if size is None else size.contiguous()
    _gather[(batch * n, triton.cdiv(width, meta["BLOCK"]))](x, sizes, order, start, out, *scalars, **meta, **options)
    return out


def _arguments(
    device: str, dtype: torch.dtype, width: int, strides: tuple[int, int], tokens: int, n: int, sized: bool
) -> tuple[tuple[int, ...], dict, dict]:
    """Numbers, constants and options of a launch. strides: of samples and tokens."""
    size, num_warps = CONFIGS[device]
    unit = 8 if all(x % 8 == 0 for x in (*strides, width)) else 1
    meta = {"SIZED": sized, "UNIT": unit, "BLOCK": min(size // dtype.itemsize, triton.next_power_of_2(width))}
    scalars = (strides[0] // unit, strides[1] // unit, width // unit, tokens, n)
    return scalars, meta, {"num_warps": num_warps, "num_stages": 1}


def examples(target: str) -> list[Example]:
    """Hidden states of ViT-L/14 at 336 pixels, SigLIP so400m and LLaVA's decoder."""
    found = []
    for dtype, size, tokens, width in (
        (torch.bfloat16, torch.long, 577, 1024),
        (torch.bfloat16, torch.float32, 640, 4096),
        (torch.bfloat16, None, 729, 1152),
        (torch.float32, None, 577, 1024),
        (torch.float32, torch.long, 577, 1024),
    ):
        strides = (tokens * width, width)
        scalars, meta, options = _arguments(target, dtype, width, strides, tokens, tokens // 2, size is not None)
        name = f"{tokens} x {width} {str(dtype).removeprefix('torch.')}{' sized' if size else ''}"
        pointers = dtype, size, torch.long, torch.long, dtype
        found.append(Example(name, _gather, (*pointers, *scalars), meta, options, tensor_core=False))
    return found
