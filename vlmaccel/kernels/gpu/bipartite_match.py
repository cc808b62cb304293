"""Triton form of `bipartite_match`: the likest B token of every A token, without the matrix of their cosines.

Products of tokens in half precision are exact and added up in float32; in float32 they are three products of tf32 on
NVIDIA GPUs, which leaves out less than 2^-21 of each, and plain float32 on AMD. Cosines are these sums divided by the
lengths, so they are as good as those of the torch form, but not the same to the bit: where two B tokens are as like to
within a few 1e-7 the forms may choose differently. B tokens that are the same to the bit always tie, and the first wins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels import bipartite_match
from vlmaccel.kernels.gpu.target import Example, target


class Config(NamedTuple):
    """A program looks for the likest of `block_a` tokens, among `block_b` at a time, by `block_d` channels at a time."""

    block_a: int
    block_b: int
    block_d: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"


CONFIGS = {  # for half precision, and for float32, of which three products take more registers
    "sm_80": (Config(64, 32, 128, 4, 2), Config(64, 64, 32, 8, 3)),
    "sm_86": (Config(64, 32, 128, 4, 2), Config(64, 64, 32, 8, 3)),
    "sm_90": (Config(64, 64, 128, 4, 3), Config(64, 64, 32, 4, 3)),
    "gfx942": (Config(64, 64, 128, 4, 1, "ieee"), Config(64, 64, 64, 4, 1, "ieee")),
    "interpreter": (Config(16, 32, 32, 4, 1), Config(16, 32, 16, 4, 1)),
}


@triton.jit
def _likest(
    a_ptr,
    b_ptr,
    norm_a_ptr,
    norm_b_ptr,
    best_ptr,
    partner_ptr,
    batch_stride,
    token_stride,
    norm_stride,
    count_a,
    count_b,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (sample, block of A tokens). Strides of tokens are in UNIT values, so that the compiler sees what they are
    multiples of; token_stride is that from one A token to the next one."""
    sample = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    in_a = place < count_a
    channel = tl.arange(0, BLOCK_D)
    a_rows = a_ptr + (sample * batch_stride + place.to(tl.int64) * token_stride)[:, None] * UNIT + channel[None, :]
    b_ptr += sample * batch_stride * UNIT
    norm_b_ptr += sample * norm_stride
    best = tl.full([BLOCK_A], float("-inf"), tl.float32)
    partner = tl.zeros([BLOCK_A], tl.int32)
    if WIDTH <= BLOCK_D:
        a = tl.load(a_rows, mask=in_a[:, None] & (channel < WIDTH)[None, :], other=0.0)
    for start in range(0, count_b, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        in_b = other < count_b
        b_rows = b_ptr + other.to(tl.int64)[:, None] * token_stride * UNIT + channel[None, :]
        if WIDTH <= BLOCK_D:
            b = tl.load(b_rows, mask=in_b[:, None] & (channel < WIDTH)[None, :], other=0.0)
            product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        else:
            product = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
            for first in range(0, WIDTH, BLOCK_D):
                in_width = (first + channel < WIDTH)[None, :]
                part_a = tl.load(a_rows + first, mask=in_a[:, None] & in_width, other=0.0)
                part_b = tl.load(b_rows + first, mask=in_b[:, None] & in_width, other=0.0)
                product = tl.dot(part_a, tl.trans(part_b), product, input_precision=PRECISION)
        norm = tl.load(norm_b_ptr + other * 2, mask=in_b, other=1.0)
        likeness = product / tl.maximum(norm, 1e-6)[None, :]
        likeness = tl.where(in_b[None, :] & (likeness == likeness), likeness, float("-inf"))  # NaN is like nothing
        here, at = tl.max(likeness, 1, return_indices=True)
        better = here > best  # not where they are equal: the lowest place wins
        best = tl.where(better, here, best)
        partner = tl.where(better, start + at, partner)
    norm = tl.load(norm_a_ptr + sample * norm_stride + place * 2, mask=in_a, other=1.0)
    out = sample * count_a + place
    tl.store(best_ptr + out, best / tl.maximum(norm, 1e-6), mask=in_a)
    tl.store(partner_ptr + out, partner.to(tl.int64), mask=in_a)


def fits(metric: Tensor, r: int, prefix: int) -> bool:
    return metric.dtype in (torch.float32, torch.bfloat16, torch.float16) and metric.numel() > 0


def launch(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    return bipartite_match.match(metric if metric.stride(2) == 1 else metric.contiguous(), r, prefix, _launch)


def _launch(metric: Tensor, first_a: int, first_b: int) -> tuple[Tensor, Tensor]:
    batch, n, width = metric.shape
    count_a, count_b = (n - first_a + 1) // 2, (n - first_b + 1) // 2
    norm = torch.linalg.vector_norm(metric, dim=-1, dtype=torch.float32).contiguous()
    best = metric.new_empty(batch, count_a, dtype=torch.float32)
    partner = metric.new_empty(batch, count_a, dtype=torch.long)
    strides, counts = metric.stride()[:2], (count_a, count_b)
    scalars, meta, options = _arguments(target(metric), metric.dtype, width, strides, n, counts)
    pointers = metric[:, first_a:], metric[:, first_b:], norm[:, first_a:], norm[:, first_b:], best, partner
    _likest[(batch, triton.cdiv(count_a, meta["BLOCK_A"]))](*pointers, *scalars, **meta, **options)
    return best, partner


def _arguments(
    device: str, dtype: torch.dtype, width: int, strides: tuple[int, int], n: int, counts: tuple[int, int]
) -> tuple[tuple[int, ...], dict, dict]:
    """Numbers, constants and options of a launch. strides: of samples and tokens. n: tokens, counts: of them A and B."""
    config = CONFIGS[device][dtype == torch.float32]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    meta = {
        "WIDTH": width,
        "UNIT": unit,
        "BLOCK_A": config.block_a,
        "BLOCK_B": config.block_b,
        "BLOCK_D": max(16, min(config.block_d, triton.next_power_of_2(width))),
        "PRECISION": config.precision,
    }
    scalars = (strides[0] // unit, 2 * strides[1] // unit, n, *counts)
    return scalars, meta, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def examples(target: str) -> list[Example]:
    """Keys of ViT-L/14 at 336 pixels and of SigLIP so400m, averaged over heads, and whole hidden states."""
    found = []
    for dtype, n, width in (
        (torch.bfloat16, 577, 64),
        (torch.bfloat16, 729, 72),
        (torch.bfloat16, 577, 1024),
        (torch.float32, 577, 64),
        (torch.float32, 577, 1024),
    ):
        scalars, meta, options = _arguments(target, dtype, width, (n * width, width), n, ((n + 1) // 2, n // 2))
        pointers = dtype, dtype, torch.float32, torch.float32, torch.float32, torch.long
        name = f"{n} x {width} {str(dtype).removeprefix('torch.')}"
        found.append(Example(name, _likest, (*pointers, *scalars), meta, options, tensor_core=True))
    return found
