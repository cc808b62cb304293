"""Triton form of `key_bias_attention`: one pass over keys and values, with the running softmax of FlashAttention.

A program has a block of rows of one head. Blocks of keys that every one of its rows sees come first, without a mask; then
those in which some rows' keys end, as the last keys of all or by causality. Blocks that come after all its rows are skipped.
Logarithms are to base 2. Dao et al., "FlashAttention", NeurIPS 2022, arXiv 2205.14135, algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.target import Example, target


class Config(NamedTuple):
    """Blocks of `rows` and `keys`. precision: of products of float32."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"


# by target, by bytes of a channel and by channels, that many or fewer; a float32 product is three
CONFIGS: dict[str, dict[tuple[int, int], Config]] = {
    "sm_80": {
        (2, 64): Config(64, 64, 4, 3),
        (2, 128): Config(128, 32, 8, 3),
        (2, 256): Config(32, 32, 4, 1),
        (4, 64): Config(32, 32, 4, 2),
        (4, 128): Config(16, 32, 4, 1),
    },
    "sm_86": {
        (2, 64): Config(64, 64, 4, 3),
        (2, 128): Config(64, 32, 4, 3),
        (2, 256): Config(32, 32, 4, 1),
        (4, 64): Config(32, 32, 4, 2),
        (4, 128): Config(16, 32, 4, 1),
    },
    "sm_90": {
        (2, 64): Config(64, 32, 4, 3),
        (2, 128): Config(64, 64, 4, 2),
        (2, 256): Config(64, 32, 8, 2),
        (4, 64): Config(64, 32, 4, 2),
        (4, 128): Config(16, 32, 4, 2),
    },
    "gfx942": {
        (2, 64): Config(64, 64, 4, 1, "ieee"),
        (2, 128): Config(128, 32, 8, 1, "ieee"),
        (2, 256): Config(64, 32, 8, 1, "ieee"),
        (4, 64): Config(64, 32, 4, 1, "ieee"),
        (4, 128): Config(32, 32, 4, 1, "ieee"),
    },
    "interpreter": {(2, 256): Config(32, 16, 4, 1), (4, 128): Config(32, 16, 4, 1)},
}
WIDEST = {
    torch.float16: 256,
    torch.bfloat16: 256,
    torch.float32: 128,
}  # channels; more float32 do not fit into registers
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(tile_ptr, in_width, inside, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr):
    """A tile (KEYS, CHANNELS), without a mask where none is needed."""
    if MASKED:
        tile = tl.load(tile_ptr, mask=inside[:, None] & in_width, other=0.0)
    elif WIDTH < CHANNELS:
        tile = tl.load(tile_ptr, mask=in_width, other=0.0)
    else:
        tile = tl.load(tile_ptr)
    return tile


@triton.jit
def _blocks(
    mixed, most, total, query, key_ptr, value_ptr, bias_ptr, key_n, value_n, scale, at, keys, ahead, start, end,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and mixture of values after the keys from `start`, a multiple of KEYS, to `end`."""
    channel = tl.arange(0, CHANNELS)[None, :]
    lane = tl.arange(0, KEYS)
    key_tile = lane.to(tl.int64)[:, None] * key_n * UNIT + channel
    value_tile = lane.to(tl.int64)[:, None] * value_n * UNIT + channel
    for first in range(start, end, KEYS):
        other = first + lane
        key_at, value_at = tl.cast(first, tl.int64) * key_n * UNIT, tl.cast(first, tl.int64) * value_n * UNIT
        key = _tile(key_ptr + key_at + key_tile, channel < WIDTH, other < keys, WIDTH, CHANNELS, MASKED)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        if HAS_BIAS:
            if MASKED:
                bias = tl.load(bias_ptr + other, mask=other < keys, other=float("-inf"))
            else:
                bias = tl.load(bias_ptr + other)
            logits += (bias * LOG2E)[None, :]
        if MASKED:
            seen = (other < keys)[None, :]
            if CAUSAL:
                seen = seen & (other[None, :] <= at[:, None] + ahead)
            logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(most, tl.max(logits, 1))
        safe = new
        if MASKED or HAS_BIAS:  # a row may have seen nothing yet
            safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(logits - safe[:, None])
        before = tl.exp2(most - safe)
        total = total * before + tl.sum(weight, 1)
        value = _tile(value_ptr + value_at + value_tile, channel < WIDTH, other < keys, WIDTH, CHANNELS, MASKED)
        mixed = tl.dot(weight.to(value.dtype), value, mixed * before[:, None], input_precision=PRECISION)
        most = new
    return mixed, most, total


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, bias_ptr, out_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n, bias_b,
    scale, heads, share, rows, keys,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, sample and head); under causality those with most to do come first."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block
    sample, head = pair // heads, pair % heads
    at = block * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (at < rows)[:, None] & (channel < WIDTH)[None, :]
    place = at.to(tl.int64)[:, None]
    query_ptr += (sample * query_b + head * query_h) * UNIT
    query = tl.load(query_ptr + place * query_n * UNIT + channel[None, :], mask=inside, other=0.0)
    key_ptr += (sample * key_b + head // share * key_h) * UNIT
    value_ptr += (sample * value_b + head // share * value_h) * UNIT
    bias_ptr += sample * bias_b
    ahead = keys - rows
    end, by_all = keys, keys
    if CAUSAL:
        end = tl.maximum(tl.minimum(keys, (block + 1) * ROWS + ahead), 0)
        by_all = tl.maximum(tl.minimum(keys, block * ROWS + ahead + 1), 0)
    by_all = by_all // KEYS * KEYS
    mixed = tl.zeros([ROWS, CHANNELS], tl.float32)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed, most, total = _blocks(
        mixed, most, total, query, key_ptr, value_ptr, bias_ptr, key_n, value_n, scale, at, keys, ahead, 0, by_all,
        WIDTH, UNIT, HAS_BIAS, CAUSAL, False, ROWS, KEYS, CHANNELS, PRECISION,
    )  # fmt: skip
    mixed, most, total = _blocks(
        mixed, most, total, query, key_ptr, value_ptr, bias_ptr, key_n, value_n, scale, at, keys, ahead, by_all, end,
        WIDTH, UNIT, HAS_BIAS, CAUSAL, True, ROWS, KEYS, CHANNELS, PRECISION,
    )  # fmt: skip
    mixed /= tl.where(total > 0, total, 1.0)[:, None]
    out_ptr += (sample * out_b + head * out_h) * UNIT
    tl.store(out_ptr + place * out_n * UNIT + channel[None, :], mixed.to(out_ptr.dtype.element_ty), mask=inside)


def fits(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool = False) -> bool:
    alike = key.dtype == value.dtype == query.dtype and key.shape == value.shape
    fitting = query.shape[3] <= WIDEST.get(query.dtype, 0) and query.shape[0] * query.shape[1] < 2**16
    return alike and fitting and 0 not in (query.numel(), key.numel())


def launch(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    bias = None if bias is None else bias.float()
    bias = bias if bias is None or bias.stride(1) == 1 else bias.contiguous()
    batch, heads, rows, width = query.shape
    out = query.new_empty(batch, rows, heads, width).transpose(1, 2)
    strides = tuple(stride for x in (query, key, value, out) for stride in x.stride()[:3])
    row = 0 if bias is None else bias.stride(0)
    scalars, meta, options = _arguments(
        target(query), query.dtype, query.shape, key.shape, strides, None if bias is None else row, scale, causal
    )
    grid = triton.cdiv(rows, meta["ROWS"]), batch * heads
    _attend[grid](query, key, value, query if bias is None else bias, out, *scalars, **meta, **options)
    return out


def _arguments(
    device: str,
    dtype: torch.dtype,
    query: tuple[int, ...],
    key: tuple[int, ...],
    strides: tuple[int, ...],
    bias_stride: int | None,
    scale: float,
    causal: bool,
) -> tuple[tuple, dict, dict]:
    """Numbers, constants and options of a launch, from shapes and from strides of samples, heads and tokens of query, key,
    value and output."""
    width, channels = query[3], max(16, triton.next_power_of_2(query[3]))
    table = CONFIGS[device]
    config = table[min(size for size in table if size[0] == dtype.itemsize and size[1] >= width)]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    scalars = (*(s // unit for s in strides), bias_stride or 0, scale, query[1], query[1] // key[1], query[2], key[2])
    meta = {
        "WIDTH": width,
        "UNIT": unit,
        "HAS_BIAS": bias_stride is not None,
        "CAUSAL": causal,
        "ROWS": min(config.rows, max(16, triton.next_power_of_2(query[2]))),
        "KEYS": config.keys,
        "CHANNELS": channels,
        "PRECISION": config.precision,
    }
    return scalars, meta, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def examples(target: str) -> list[Example]:
    """ViT-L and SigLIP so400m with merged patches, prefills of LLaVA-7B and Qwen2-VL with merged tokens, wide heads."""
    found = []
    for name, dtype, (batch, heads, kv_heads, rows, keys, width), biased, causal in (
        ("ViT-L", torch.bfloat16, (8, 16, 16, 577, 577, 64), True, False),
        ("ViT-L float32", torch.float32, (8, 16, 16, 577, 577, 64), True, False),
        ("SigLIP", torch.float16, (1, 16, 16, 729, 729, 72), True, False),
        ("LLaVA-7B", torch.bfloat16, (1, 32, 32, 2900, 2900, 128), True, True),
        ("LLaVA-7B float32", torch.float32, (1, 32, 32, 2900, 2900, 128), True, True),
        ("Qwen2-VL-2B, second turn", torch.bfloat16, (2, 12, 2, 500, 8692, 128), True, True),
        ("wide heads", torch.bfloat16, (1, 8, 4, 4096, 4096, 256), False, True),
    ):
        strides = (rows * heads * width, width, heads * width), *2 * ((kv_heads * keys * width, keys * width, width),)
        flat = tuple(stride for x in (*strides, strides[0]) for stride in x)
        sizes = (batch, heads, rows, width), (batch, kv_heads, keys, width)
        scalars, meta, options = _arguments(target, dtype, *sizes, flat, keys if biased else None, width**-0.5, causal)
        pointers = dtype, dtype, dtype, torch.float32 if biased else dtype, dtype
        found.append(Example(name, _attend, (*pointers, *scalars), meta, options, tensor_core=True))
    return found
