"""Triton form of `token_prefill`: flash attention that gathers its rows and keys by a list, and scatters its rows.

Tokens are listed in order, so a row sees the entries of the list up to its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.online_softmax import Config, Table, attend, attention_fits, config_for, unit_of
from vlmaccel.kernels.gpu.target import Example, target

CONFIGS: Table = {
    "sm_80": {
        (2, 128): Config(128, 32, 8, 3),
        (2, 256): Config(64, 32, 8, 2),
        (4, 64): Config(32, 32, 8, 2),
        (4, 128): Config(16, 32, 4, 2),
    },
    "sm_86": {
        (2, 128): Config(128, 32, 8, 3),
        (2, 256): Config(64, 32, 8, 2),
        (4, 64): Config(32, 32, 8, 2),
        (4, 128): Config(16, 32, 4, 2),
    },
    "sm_90": {
        (2, 128): Config(128, 64, 8, 4),
        (2, 256): Config(64, 32, 8, 2),
        (4, 64): Config(32, 32, 8, 2),
        (4, 128): Config(16, 32, 4, 2),
    },
    "gfx942": {
        (2, 128): Config(128, 64, 8, 1, "ieee"),
        (2, 256): Config(64, 32, 4, 1, "ieee"),
        (4, 128): Config(64, 32, 4, 1, "ieee"),
    },
    "interpreter": {(2, 256): Config(32, 16, 4, 1), (4, 128): Config(32, 16, 4, 1)},
}
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _token_prefill(
    query_ptr, key_ptr, value_ptr, token_ptr, out_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    scale, heads, share, rows, earlier, tokens,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of the list, sample and head). earlier: keys before that of row 0."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # those with most to do start first
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    entry, channel = first + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    token_ptr += sample * tokens
    key_ptr += (sample * key_b + head // share * key_h) * UNIT
    value_ptr += (sample * value_b + head // share * value_h) * UNIT
    row = tl.load(token_ptr + entry, mask=entry < tokens, other=-1).to(tl.int64) - earlier
    in_tile = (row >= 0)[:, None] & (channel < WIDTH)[None, :]
    at = (sample * query_b + head * query_h + row[:, None] * query_n) * UNIT + channel[None, :]
    query = tl.load(query_ptr + at, mask=in_tile, other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, CHANNELS], tl.float32)
    end = tl.where(tl.max(row, 0) >= 0, tl.minimum(first + ROWS, tokens), 0)
    lane = tl.arange(0, KEYS)
    # those in front of all rows need no mask: up to the last of the rows no entry is -1
    by_all = tl.minimum(first // KEYS * KEYS, end)
    upcoming = tl.load(token_ptr + lane, mask=lane < end, other=0)  # read ahead, since places of keys depend on it
    for start in range(0, by_all, KEYS):
        key_at = upcoming.to(tl.int64)
        upcoming = tl.load(token_ptr + start + KEYS + lane, mask=start + KEYS + lane < end, other=0)
        most, total, mixed = attend(
            query, key_ptr, value_ptr, key_n, value_n, key_at, None, None,
            most, total, mixed, scale * LOG2E, WIDTH, UNIT, CHANNELS, PRECISION, False,
        )  # fmt: skip
    for start in range(by_all, end, KEYS):
        other = start + lane
        key_at = tl.load(token_ptr + other, mask=other < tokens, other=-1).to(tl.int64)
        most, total, mixed = attend(
            query, key_ptr, value_ptr, key_n, value_n, key_at, key_at >= 0, other[None, :] <= entry[:, None],
            most, total, mixed, scale * LOG2E, WIDTH, UNIT, CHANNELS, PRECISION, True,
        )  # fmt: skip
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    at = ((sample * rows + row[:, None]) * heads + head) * WIDTH + channel[None, :]
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=in_tile)


def fits(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, scale: float) -> bool:
    return attention_fits(query, key, value) and tokens.numel() > 0 and scale > 0


def launch(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, scale: float) -> Tensor:
    batch, heads, n, width = query.shape
    out = query.new_zeros(batch, n, heads, width)
    tokens = tokens.contiguous()
    parts = (query, key, value)
    strides = [x.stride() for x in parts]
    args, meta, options = _arguments(
        target(query), query.dtype, query.shape, key.shape, tokens.shape[1], strides, scale
    )
    grid = (triton.cdiv(tokens.shape[1], meta["ROWS"]), batch * heads)
    _token_prefill[grid](*parts, tokens, out, *args, **meta, **options)
    return out.transpose(1, 2)


def _arguments(
    gpu: str, dtype: torch.dtype, query: tuple, key: tuple, tokens: int, strides: list[tuple], scale: float
) -> tuple[list, dict, dict]:
    """What follows the tensors at the launch: numbers, constants, options. query, key: shapes."""
    config = config_for(CONFIGS, gpu, query[3], dtype)
    flat = [x for stride in strides for x in stride[:3]]
    unit = unit_of(query[3], *flat)
    numbers = [*(x // unit for x in flat), scale, query[1], query[1] // key[1], query[2], key[2] - query[2], tokens]
    channels = triton.next_power_of_2(max(16, query[3]))
    sizes = {"ROWS": config.rows, "KEYS": config.keys, "CHANNELS": channels, "PRECISION": config.precision}
    return numbers, {"WIDTH": query[3], "UNIT": unit, **sizes}, config.options


def examples(gpu: str) -> list[Example]:
    found = []
    for width, dtype in ((128, torch.bfloat16), (64, torch.float16), (72, torch.bfloat16), (96, torch.bfloat16),
                         (256, torch.bfloat16), (128, torch.float32), (64, torch.float32)):  # fmt: skip
        query, key = (1, 12, 2880, width), (1, 2, 2880, width)
        strides = [(2880 * 12 * width, width, 12 * width, 1)] + 2 * [(2880 * 2 * width, 2880 * width, width, 1)]
        args, meta, options = _arguments(gpu, dtype, query, key, 1501, strides, 0.125)
        name = f"{width} {str(dtype)[6:]}"
        found.append(
            Example(name, _token_prefill, (dtype, dtype, dtype, torch.int64, dtype, *args), meta, options, True)
        )
    return found
