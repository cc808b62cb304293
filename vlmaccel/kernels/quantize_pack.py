"""Low-bit codes of keys and values on the asymmetric uniform grid, packed into bytes, and back.

The grid of KIVI (Liu et al., ICML 2024, arXiv 2402.02750): a group has zero = its smallest value and scale =
(largest - smallest) / (2^bits - 1); a code is round((x - zero) / scale). Keys are grouped along tokens (per channel,
since some channels are large in every token), values along channels (per token).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define(
    "quantize_pack(Tensor x, int bits, int group, int dim, ScalarType dtype) -> (Tensor codes, Tensor scale, Tensor zero)"
)
_LIB.define("dequantize(Tensor codes, Tensor scale, Tensor zero, int bits, int dim, ScalarType dtype) -> Tensor")

quantize_pack = torch.ops.vlmaccel.quantize_pack.default
"""quantize_pack(x, bits, group, dim, dtype) -> (codes, scale, zero).

x: (..., n, d) float; d is a multiple of 8 / bits. bits: 2, 4 or 8. group: values that share a scale, of which the size
of the dimension `dim` is a multiple: dim -2 groups neighbouring tokens of a channel, -1 neighbouring channels of a token.
dtype: of scale and zero. codes: (..., n, d * bits / 8) uint8; byte j holds, from the lowest bits on, the codes of channels
j, j + w, j + 2w, ... with w = d * bits / 8. scale, zero: (..., n / group, d) or (..., n, d / group). Codes are those of
the rounded scale and zero, so that |x - dequantize(...)| is at most half a scale, but for what rounding them cut off.
"""
dequantize = torch.ops.vlmaccel.dequantize.default
"""dequantize(codes, scale, zero, bits, dim, dtype) -> (..., n, d) in `dtype`: code * scale + zero, worked out in float32."""

Bits = Literal[2, 4, 8]
TINY = {torch.float16: 2.0**-20, torch.bfloat16: 1e-30, torch.float32: 1e-30}  # smallest scale: 0 would divide by 0


def reference(x: Tensor, bits: int, group: int, dim: int) -> Tensor:
    """What is left of x after quantisation with exact scales, value by value, in float64."""
    x = x.double() if dim == -1 else x.double().mT
    grouped = x.unflatten(-1, (-1, group))
    zero = grouped.amin(-1, keepdim=True)
    scale = (grouped.amax(-1, keepdim=True) - zero) / (2**bits - 1)
    code = torch.where(scale > 0, ((grouped - zero) / scale), torch.zeros_like(grouped)).round()
    left = (code * scale + zero).flatten(-2)
    return left if dim == -1 else left.mT


def scale_dtype(x: Tensor) -> torch.dtype:
    """float16, with its finer steps, for scales and zeros that it can hold; else bfloat16, which holds any."""
    fits = x.numel() == 0 or bool(x.detach().abs().amax() < torch.finfo(torch.float16).max / 2)
    return torch.float16 if fits else torch.bfloat16


def _groups(x: Tensor, group: int, dim: int) -> tuple[Tensor, int]:
    """x with its dimension `dim` in two, the second one of `group` values; and where that is."""
    return x.unflatten(dim, (-1, group)), dim if dim == -1 else -2


def _torch_form(x: Tensor, bits: int, group: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if bits not in (2, 4, 8) or x.shape[-1] % (8 // bits):
        raise ValueError(f"codes have 2, 4 or 8 bits and fill whole bytes, not {bits} bits of {x.shape[-1]} channels")
    grouped, inner = _groups(x.float(), group, dim)
    low, high = grouped.aminmax(dim=inner, keepdim=True)
    zero = low.to(dtype)
    scale = ((high - zero.float()) / (2**bits - 1)).clamp(min=TINY[dtype]).to(dtype)
    code = ((grouped - zero.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
    return pack(code.to(torch.uint8).view(x.shape), bits), scale.squeeze(inner), zero.squeeze(inner)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., d * bits / 8) uint8, the bytes of codes (..., d) uint8."""
    parts = codes.chunk(8 // bits, -1)
    packed = parts[0].clone()
    for number, part in enumerate(parts[1:], 1):
        packed |= part << (bits * number)
    return packed


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dim: int, dtype: torch.dtype) -> Tensor:
    mask = 2**bits - 1
    parts = [codes >> (bits * i) & mask for i in range(8 // bits)]
    x = torch.cat(parts, -1).float()
    if x.numel() == 0:
        return x.to(dtype)
    grouped, inner = _groups(x, x.shape[dim] // scale.shape[dim], dim)
    grouped.mul_(scale.float().unsqueeze(inner)).add_(zero.float().unsqueeze(inner))
    return x.to(dtype)


def _fake_quantize(x: Tensor, bits: int, group: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shape = list(x.shape)
    shape[dim] //= group
    codes = x.new_empty(*x.shape[:-1], x.shape[-1] * bits // 8, dtype=torch.uint8)
    return codes, x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _fake_dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dim: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], codes.shape[-1] * (8 // bits), dtype=dtype)


_LIB.impl("quantize_pack", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_LIB.impl("quantize_pack", gpu_form("quantize_pack", _torch_form), "CUDA")
_LIB.impl("dequantize", gpu_form("dequantize", _dequantize), "CUDA")
torch.library.register_fake("vlmaccel::quantize_pack", _fake_quantize, lib=_LIB)
torch.library.register_fake("vlmaccel::dequantize", _fake_dequantize, lib=_LIB)
