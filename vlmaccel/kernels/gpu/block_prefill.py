"""Triton form of `block_prefill`: flash attention over listed blocks of keys, then over listed keys, in one softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.online_softmax import Config, Table, attend, attention_fits, config_for, unit_of
from vlmaccel.kernels.gpu.target import Example, target

# at most the `block` of the lists is taken of either
CONFIGS: Table = {
    "sm_80": {
        (2, 64): Config(64, 64, 4, 2),
        (2, 128): Config(64, 32, 4, 3),
        (2, 256): Config(64, 32, 8, 2),
        (4, 64): Config(32, 32, 4, 2),
        (4, 128): Config(32, 32, 8, 2),
    },
    "sm_86": {
        (2, 64): Config(64, 64, 4, 2),
        (2, 128): Config(64, 32, 4, 3),
        (2, 256): Config(64, 32, 8, 2),
        (4, 64): Config(32, 32, 4, 2),
        (4, 128): Config(32, 32, 8, 2),
    },
    "sm_90": {(2, 128): Config(64, 64, 4, 2), (2, 256): Config(32, 32, 4, 2), (4, 128): Config(32, 32, 8, 2)},
    "gfx942": {
        (2, 128): Config(64, 64, 4, 1, "ieee"),
        (2, 256): Config(64, 32, 4, 1, "ieee"),
        (4, 128): Config(64, 32, 4, 1, "ieee"),
    },
    "interpreter": {(2, 256): Config(16, 16, 4, 1), (4, 128): Config(16, 16, 4, 1)},
}
BLOCKS = (16, 32, 64, 128)
SCAN = 128  # entries of a list read at a time to count them
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _entries(list_ptr, length, limit, SCAN: tl.constexpr):
    """How many entries there are in front of the -1 and of the first that is `limit` or more."""
    count = 0
    for start in range(0, length, SCAN):
        at = start + tl.arange(0, SCAN)
        entry = tl.load(list_ptr + at, mask=at < length, other=-1)
        count += tl.sum(((entry >= 0) & (entry < limit)).to(tl.int32), 0)
    return count


@triton.jit
def _block_prefill(
    query_ptr, key_ptr, value_ptr, block_ptr, column_ptr, start_ptr, out_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    scale, heads, share, rows, keys, blocks, columns,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CHANNELS: tl.constexpr, SCAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, sample and head). blocks, columns: lengths of the lists."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # those with most to do start first
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    row, channel = first + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    position = row + keys - rows
    begin = tl.maximum(tl.load(start_ptr + sample), 0)
    key_ptr += (sample * key_b + head // share * key_h) * UNIT
    value_ptr += (sample * value_b + head // share * value_h) * UNIT
    list_at = pair * tl.cdiv(rows, BLOCK) + first // BLOCK
    block_ptr += list_at * blocks
    column_ptr += list_at * columns
    in_tile = (row < rows)[:, None] & (channel < WIDTH)[None, :]
    at = (sample * query_b + head * query_h + row.to(tl.int64)[:, None] * query_n) * UNIT + channel[None, :]
    query = tl.load(query_ptr + at, mask=in_tile, other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, CHANNELS], tl.float32)
    TILES: tl.constexpr = BLOCK // KEYS
    lane = tl.arange(0, KEYS)
    # blocks from `hidden` to `seen` are seen by all rows: those before have padding, those behind keys after a row
    hidden = _entries(block_ptr, blocks, tl.cdiv(begin, BLOCK), SCAN)
    seen = tl.maximum(_entries(block_ptr, blocks, (first + keys - rows + 1) // BLOCK, SCAN), hidden)
    upcoming = tl.load(block_ptr + hidden, mask=hidden < seen, other=0)  # read ahead, since places of keys depend on it
    for tile in range(hidden * TILES, seen * TILES):
        begins = (upcoming.to(tl.int64) * BLOCK + tile % TILES * KEYS) * UNIT
        following = (tile + 1) // TILES
        upcoming = tl.load(block_ptr + following, mask=following < seen, other=0)
        most, total, mixed = attend(
            query, key_ptr + begins * key_n, value_ptr + begins * value_n, key_n, value_n, lane.to(tl.int64), None, None,
            most, total, mixed, scale * LOG2E, WIDTH, UNIT, CHANNELS, PRECISION, False,
        )  # fmt: skip
    others = (_entries(block_ptr, blocks, keys, SCAN) - (seen - hidden)) * TILES
    singles = _entries(column_ptr, columns, keys, SCAN)
    # one loop over the rest of both lists: two would need the registers of both
    for tile in range(others + tl.cdiv(singles, KEYS)):
        whole = tile < others
        entry = (tile - others) * KEYS + lane
        block = tile // TILES
        block += tl.where(block < hidden, 0, seen - hidden)
        number = tl.load(block_ptr + block, mask=whole, other=0).to(tl.int64)
        single = tl.load(column_ptr + entry, mask=(entry >= 0) & (entry < singles), other=-1).to(tl.int64)
        key_at = tl.where(whole, number * BLOCK + tile % TILES * KEYS + lane, single)
        inside = (key_at >= begin) & (key_at < keys)
        place = tl.where(inside, key_at, keys).to(tl.int32)
        most, total, mixed = attend(
            query, key_ptr, value_ptr, key_n, value_n, key_at, inside, place[None, :] <= position[:, None],
            most, total, mixed, scale * LOG2E, WIDTH, UNIT, CHANNELS, PRECISION, True,
        )  # fmt: skip
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    at = ((sample * rows + row[:, None]) * heads + head) * WIDTH + channel[None, :]
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=in_tile)


def fits(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> bool:
    return attention_fits(query, key, value) and block in BLOCKS and scale > 0


def launch(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> Tensor:
    batch, heads, n, width = query.shape
    out = query.new_empty(batch, n, heads, width)
    lists = (blocks.contiguous(), columns.contiguous(), start.contiguous())
    parts = (query, key, value)
    lengths = (blocks.shape[3], columns.shape[3])
    strides = [x.stride() for x in parts]
    args, meta, options = _arguments(target(query), query.dtype, query.shape, key.shape, lengths, strides, block, scale)
    grid = (triton.cdiv(n, meta["ROWS"]), batch * heads)
    _block_prefill[grid](*parts, *lists, out, *args, **meta, **options)
    return out.transpose(1, 2)


def _arguments(
    gpu: str,
    dtype: torch.dtype,
    query: tuple,
    key: tuple,
    lengths: tuple,
    strides: list[tuple],
    block: int,
    scale: float,
) -> tuple[list, dict, dict]:
    """What follows the tensors at the launch: numbers, constants, options. query, key: shapes. lengths: of the two lists."""
    config = config_for(CONFIGS, gpu, query[3], dtype)
    flat = [x for stride in strides for x in stride[:3]]
    unit = unit_of(query[3], *flat)
    numbers = [*(x // unit for x in flat), scale, query[1], query[1] // key[1], query[2], key[2], *lengths]
    sizes = {"BLOCK": block, "ROWS": min(config.rows, block), "KEYS": min(config.keys, block), "SCAN": SCAN}
    channels = triton.next_power_of_2(max(16, query[3]))
    meta = {"WIDTH": query[3], "UNIT": unit, **sizes, "CHANNELS": channels, "PRECISION": config.precision}
    return numbers, meta, config.options


def examples(gpu: str) -> list[Example]:
    found = []
    for width, dtype, block in ((128, torch.bfloat16, 64), (128, torch.bfloat16, 128), (64, torch.float16, 128),
                                (72, torch.bfloat16, 64), (96, torch.bfloat16, 64), (256, torch.bfloat16, 64),
                                (128, torch.float32, 64), (64, torch.float32, 16)):  # fmt: skip
        query, key = (1, 12, 8000, width), (1, 2, 8000, width)
        strides = [(8000 * 12 * width, width, 12 * width, 1)] + 2 * [(8000 * 2 * width, 8000 * width, width, 1)]
        args, meta, options = _arguments(gpu, dtype, query, key, (23, 1001), strides, block, 0.125)
        tensors = (dtype, dtype, dtype, torch.int32, torch.int32, torch.int64, dtype)
        name = f"{width} {str(dtype)[6:]}, blocks of {block}"
        found.append(Example(name, _block_prefill, (*tensors, *args), meta, options, True))
    return found
