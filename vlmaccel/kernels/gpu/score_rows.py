"""Triton form of `score_rows`: two passes over the logits, which are never stored; one where their log-sum-exp is known.

`_normalise` has a program for a block of rows: the log-sum-exp of each of its rows, over blocks of keys. `_reduce` has a
program for a block of keys: it works the same logits out again, makes probabilities of them and reduces them over blocks of
rows, in a fixed order. Where there is more than one block of rows, `_extents` finds the positions that each block covers,
and the programs go from the first block that can matter to them to the last. Where rows are few, several programs share the
keys of a block of rows. Logarithms are to base 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmaccel.kernels.gpu.target import Example, target
from vlmaccel.kernels.score_rows import check_reduce


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
        (2, 128): Config(64, 64, 4, 3),
        (2, 256): Config(64, 32, 4, 2),
        (4, 64): Config(32, 32, 4, 2),
        (4, 128): Config(32, 16, 4, 2),
    },
    "sm_86": {
        (2, 128): Config(64, 64, 4, 2),
        (2, 256): Config(64, 32, 4, 2),
        (4, 64): Config(32, 32, 4, 2),
        (4, 128): Config(32, 16, 4, 2),
    },
    "sm_90": {
        (2, 128): Config(64, 64, 4, 3),
        (2, 256): Config(64, 64, 4, 2),
        (4, 64): Config(64, 64, 4, 2),
        (4, 128): Config(64, 64, 4, 2),
    },
    "gfx942": {
        (2, 128): Config(64, 64, 4, 1, "ieee"),
        (2, 256): Config(64, 32, 4, 1, "ieee"),
        (4, 64): Config(64, 64, 4, 1, "ieee"),
        (4, 128): Config(64, 32, 4, 1, "ieee"),
    },
    "interpreter": {(2, 256): Config(16, 32, 4, 1), (4, 128): Config(16, 32, 4, 1)},
}
WIDEST = {
    torch.float16: 256,
    torch.bfloat16: 256,
    torch.float32: 128,
}  # channels; more float32 do not fit into registers
PROGRAMS = 256  # of `_normalise`, that keep a large GPU busy
MOST_SPLITS = 16
SCAN = 128  # extents read at a time
NEVER = tl.constexpr(2**31 - 1)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _extents(
    place_ptr, bias_ptr, first_ptr, last_ptr, place_b, place_g, bias_b, bias_g, n, groups, blocks,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block, sample and group): the lowest and the highest position in the block, of what is not hidden or -1."""
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    sample, g = group // groups, group % groups
    place = tl.load(place_ptr + sample * place_b + g * place_g + at, mask=at < n, other=-1).to(tl.int32)
    there = place >= 0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + sample * bias_b + g * bias_g + at, mask=at < n, other=float("-inf"))
        there = there & (bias > float("-inf"))
    tl.store(first_ptr + group * blocks + block, tl.min(tl.where(there, place, NEVER), 0))
    tl.store(last_ptr + group * blocks + block, tl.max(tl.where(there, place, -1), 0))


@triton.jit
def _span(first_ptr, last_ptr, blocks, low, high, SCAN: tl.constexpr):
    """From the first to behind the last block that holds a position from `low` to `high`, as far as extents tell."""
    start, end = NEVER, 0
    for block in range(0, blocks, SCAN):
        at = block + tl.arange(0, SCAN)
        first = tl.load(first_ptr + at, mask=at < blocks, other=NEVER)
        last = tl.load(last_ptr + at, mask=at < blocks, other=-1)
        may = (first <= high) & (last >= low)
        start = tl.minimum(start, tl.min(tl.where(may, at, NEVER), 0))
        end = tl.maximum(end, tl.max(tl.where(may, at + 1, 0), 0))
    return start, end


@triton.jit
def _normalise(
    query_ptr, key_ptr, row_ptr, index_ptr, bias_ptr, first_ptr, last_ptr, total_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, index_b, index_g, bias_b, bias_g, extent_b, extent_g,
    scale, window, heads, share, rows, keys, blocks,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, WINDOWED: tl.constexpr, SKIP: tl.constexpr,
    SPLITS: tl.constexpr, SCAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, part of the keys, sample and head): log-sum-exp (B, H, SPLITS, Q) over that part."""
    part, pair = tl.program_id(1), tl.program_id(2).to(tl.int64)
    sample, head = pair // heads, pair % heads
    group = head // share
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see most: they come first
    at = block * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    query_ptr += (sample * query_b + head * query_h) * UNIT
    key_ptr += (sample * key_b + group * key_h) * UNIT
    index_ptr += sample * index_b + group * index_g
    bias_ptr += sample * bias_b + group * bias_g
    query = tl.load(
        query_ptr + at.to(tl.int64)[:, None] * query_n * UNIT + channel[None, :],
        mask=(at < rows)[:, None] & (channel < WIDTH)[None, :],
        other=0.0,
    )
    place = tl.load(row_ptr + sample * rows + at, mask=at < rows, other=-1)
    start, end = 0, blocks
    if SKIP:
        low = 0
        if WINDOWED:
            low = tl.min(tl.where(place >= 0, place, NEVER), 0) - window + 1
        extents = sample * extent_b + group * extent_g
        start, end = _span(first_ptr + extents, last_ptr + extents, blocks, low, tl.max(place, 0), SCAN)
    if SPLITS > 1:
        each = tl.cdiv(tl.maximum(end - start, 0), SPLITS)
        start += part * each
        end = tl.minimum(end, start + each)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for block in range(start, end):
        other = block * KEYS + tl.arange(0, KEYS)
        inside = other < keys
        key = tl.load(
            key_ptr + other.to(tl.int64)[:, None] * key_n * UNIT + channel[None, :],
            mask=inside[:, None] & (channel < WIDTH)[None, :],
            other=0.0,
        )
        index = tl.load(index_ptr + other, mask=inside, other=NEVER).to(tl.int32)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        seen = index[None, :] <= place[:, None]
        if WINDOWED:
            seen = seen & (index[None, :] > place[:, None] - window)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + other, mask=inside, other=float("-inf"))
            seen = seen & (bias > float("-inf"))[None, :]
            logits += (bias * LOG2E)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(most, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        most = new
    result = tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(total_ptr + (pair * SPLITS + part) * rows + at, result, mask=at < rows)


@triton.jit
def _reduce(
    query_ptr, key_ptr, row_ptr, index_ptr, bias_ptr, first_ptr, last_ptr, total_ptr, out_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, index_b, index_g, bias_b, bias_g,
    scale, window, heads, share, rows, keys, blocks,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, WINDOWED: tl.constexpr, SKIP: tl.constexpr,
    SPLITS: tl.constexpr, SCAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Program (block of keys, sample and head)."""
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    group = head // share
    other = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside = other < keys
    channel = tl.arange(0, CHANNELS)
    query_ptr += (sample * query_b + head * query_h) * UNIT
    key_ptr += (sample * key_b + group * key_h) * UNIT
    key = tl.load(
        key_ptr + other.to(tl.int64)[:, None] * key_n * UNIT + channel[None, :],
        mask=inside[:, None] & (channel < WIDTH)[None, :],
        other=0.0,
    )
    index = tl.load(index_ptr + sample * index_b + group * index_g + other, mask=inside, other=NEVER).to(tl.int32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + sample * bias_b + group * bias_g + other, mask=inside, other=float("-inf"))
        index = tl.where(bias > float("-inf"), index, NEVER)
        bias = tl.where(bias > float("-inf"), bias, 0.0) * LOG2E
    start, end = 0, blocks
    if SKIP:
        high = NEVER
        if WINDOWED:
            high = tl.max(tl.where(index < NEVER, index, -1), 0) + window - 1
        start, end = _span(
            first_ptr + sample * blocks, last_ptr + sample * blocks, blocks, tl.min(index, 0), high, SCAN
        )
    best = tl.zeros([KEYS, ROWS], tl.float32)
    count = tl.zeros([KEYS], tl.float32)
    for block in range(start, end):
        at = block * ROWS + tl.arange(0, ROWS)
        query = tl.load(
            query_ptr + at.to(tl.int64)[:, None] * query_n * UNIT + channel[None, :],
            mask=(at < rows)[:, None] & (channel < WIDTH)[None, :],
            other=0.0,
        )
        place = tl.load(row_ptr + sample * rows + at, mask=at < rows, other=-1)
        part = tl.arange(0, SPLITS)
        totals = tl.load(
            total_ptr + (pair * SPLITS + part.to(tl.int64))[:, None] * rows + at[None, :],
            mask=(at < rows)[None, :] & (part >= 0)[:, None],
            other=float("-inf"),
        )
        if SPLITS > 1:
            most = tl.max(totals, 0)
            most = tl.where(most == float("-inf"), 0.0, most)
            total = most + tl.log2(tl.maximum(tl.sum(tl.exp2(totals - most[None, :]), 0), 1e-37))
        else:
            total = tl.sum(totals, 0)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E)
        seen = index[:, None] <= place[None, :]
        if WINDOWED:
            seen = seen & (index[:, None] > place[None, :] - window)
        if HAS_BIAS:
            logits += bias[:, None]
        probability = tl.exp2(tl.where(seen, logits - total[None, :], float("-inf")))
        if REDUCE == "max":
            best = tl.maximum(best, probability)
        else:
            best += probability
        if REDUCE == "mean":
            count += tl.sum(seen.to(tl.float32), 1)
    result = tl.max(best, 1) if REDUCE == "max" else tl.sum(best, 1)
    if REDUCE == "mean":
        result /= tl.maximum(count, 1.0)
    tl.store(out_ptr + pair * keys + other, result, mask=inside)


def fits(query: Tensor, key: Tensor, *rest: object) -> bool:
    fitting = key.dtype == query.dtype and query.shape[3] <= WIDEST.get(query.dtype, 0)
    return fitting and query.shape[0] * query.shape[1] < 2**16 and 0 not in (query.numel(), key.numel())


def launch(
    query: Tensor,
    key: Tensor,
    row: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scale: float,
    window: int,
    reduce: str,
    lse: Tensor | None = None,
) -> Tensor:
    check_reduce(reduce)
    query, key, index = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, index))
    row = row.int().contiguous()
    if bias is not None:
        bias = bias.float()
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    plan = Plan(
        target(query),
        query.dtype,
        query.shape,
        key.shape,
        query.stride()[:3],
        key.stride()[:3],
        _strides(index),
        None if bias is None else _strides(bias),
        min(window, 2**30),  # positions are below that too, so that their sum is one of 32 bits
        known=lse is not None,
    )
    out = query.new_empty(*query.shape[:2], plan.keys, dtype=torch.float32)
    if lse is None:
        total = query.new_empty(*query.shape[:2], plan.splits, plan.rows, dtype=torch.float32)
    else:
        total = lse.float().mul(LOG2E.value).contiguous()
    place, weight = index, index if bias is None else bias  # without a bias nothing is read there
    key_extents = row_extents = (row, row)
    if plan.skips:
        key_extents = tuple(row.new_empty(plan.batch, plan.groups, plan.key_blocks) for _ in range(2))
        row_extents = tuple(row.new_empty(plan.batch, plan.row_blocks) for _ in range(2))
        if lse is None:
            groups = plan.batch * plan.groups
            _start(_extents, (plan.key_blocks, groups), (place, weight, *key_extents), plan.key_extents())
        _start(_extents, (plan.row_blocks, plan.batch), (row, row, *row_extents), plan.row_extents())
    pairs, pointers = plan.batch * plan.heads, (query, key, row, index, weight)
    if lse is None:
        grid = plan.row_blocks, plan.splits, pairs
        _start(_normalise, grid, (*pointers, *key_extents, total), plan.normalise(scale))
    _start(_reduce, (plan.key_blocks, pairs), (*pointers, *row_extents, total, out), plan.reduce(scale, reduce))
    return out


def _strides(x: Tensor) -> tuple[int, int]:
    """Of samples and groups of x (B, 1 or H_kv, K)."""
    return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


def _start(kernel: Any, grid: tuple, pointers: tuple, rest: tuple[tuple, dict, dict]) -> None:
    scalars, meta, options = rest
    kernel[grid](*pointers, *scalars, **meta, **options)


class Plan:
    """Sizes of a call, and what they make the numbers, constants and options of its launches.

    strides: of samples, heads and tokens; of index and bias, of samples and groups. known: whether the rows' log-sum-exp is.
    """

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        query: tuple[int, ...],
        key: tuple[int, ...],
        query_strides: tuple[int, ...],
        key_strides: tuple[int, ...],
        index_strides: tuple[int, int],
        bias_strides: tuple[int, int] | None,
        window: int,
        known: bool = False,
    ) -> None:
        self.batch, self.heads, self.rows, self.width = query
        self.kv_heads, self.keys = key[1:3]
        self.window = window
        channels = max(16, triton.next_power_of_2(self.width))
        table = CONFIGS[device]
        self.config = table[min(size for size in table if size[0] == dtype.itemsize and size[1] >= self.width)]
        self.block_rows = min(self.config.rows, max(16, triton.next_power_of_2(self.rows)))
        self.row_blocks = triton.cdiv(self.rows, self.block_rows)
        self.key_blocks = triton.cdiv(self.keys, self.config.keys)
        self.skips = self.row_blocks > 1
        wanted = triton.cdiv(PROGRAMS, self.row_blocks * self.batch * self.heads)
        splits = min(MOST_SPLITS, *(triton.next_power_of_2(n) for n in (wanted, triton.cdiv(self.key_blocks, 4))))
        self.splits = 1 if known else splits
        self.index, self.bias = index_strides, bias_strides
        self.groups = self.kv_heads if index_strides[1] or (bias_strides and bias_strides[1]) else 1
        strides = (*query_strides, *key_strides)
        self.unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
        self.strides = tuple(stride // self.unit for stride in strides)
        self.meta = {
            "WIDTH": self.width,
            "UNIT": self.unit,
            "HAS_BIAS": bias_strides is not None,
            "WINDOWED": window > 0,
            "SKIP": self.skips,
            "SPLITS": self.splits,
            "SCAN": SCAN,
            "ROWS": self.block_rows,
            "KEYS": self.config.keys,
            "CHANNELS": channels,
            "PRECISION": self.config.precision,
        }
        self.options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}

    def key_extents(self) -> tuple[tuple, dict, dict]:
        scalars = (*self.index, *(self.bias or (0, 0)), self.keys, self.groups, self.key_blocks)
        return scalars, {"HAS_BIAS": self.bias is not None, "BLOCK": self.config.keys}, {"num_warps": 1}

    def row_extents(self) -> tuple[tuple, dict, dict]:
        scalars = (self.rows, 0, 0, 0, self.rows, 1, self.row_blocks)
        return scalars, {"HAS_BIAS": False, "BLOCK": self.block_rows}, {"num_warps": 1}

    def normalise(self, scale: float) -> tuple[tuple, dict, dict]:
        extents = self.groups * self.key_blocks, self.key_blocks if self.groups > 1 else 0
        return (*self._strides(), *extents, scale, *self._sizes(), self.key_blocks), self.meta, self.options

    def reduce(self, scale: float, reduce: str) -> tuple[tuple, dict, dict]:
        meta = {**self.meta, "REDUCE": reduce}
        return (*self._strides(), scale, *self._sizes(), self.row_blocks), meta, self.options

    def _strides(self) -> tuple[int, ...]:
        return (*self.strides, *self.index, *(self.bias or (0, 0)))

    def _sizes(self) -> tuple[int, ...]:
        return self.window, self.heads, self.heads // self.kv_heads, self.rows, self.keys


def examples(target: str) -> list[Example]:
    """The last rows of LLaVA-7B and all rows of Qwen2-VL, a sliding window, wide heads and odd ones."""
    found = []
    i32, f32 = torch.int32, torch.float32
    for name, dtype, shape, window, reduce in (
        ("64 rows of LLaVA-7B", torch.bfloat16, (1, 32, 32, 64, 2900, 128), 0, "sum"),
        ("64 rows of LLaVA-7B float32", torch.float32, (1, 32, 32, 64, 2900, 128), 0, "max"),
        ("all rows of Qwen2-VL-2B", torch.bfloat16, (2, 12, 2, 8192, 8192, 128), 0, "mean"),
        ("all rows of width 64 float32", torch.float32, (1, 4, 4, 4096, 4096, 64), 0, "mean"),
        ("all rows in a window", torch.float16, (2, 32, 8, 8192, 8192, 128), 4096, "sum"),
        ("all rows of width 72", torch.bfloat16, (1, 16, 16, 729, 729, 72), 0, "sum"),
        ("all rows of width 256", torch.bfloat16, (1, 8, 4, 4096, 4096, 256), 0, "mean"),
    ):
        batch, heads, kv_heads, rows, keys, width = shape
        strides = (rows * heads * width, width, heads * width), (kv_heads * keys * width, keys * width, width)
        sizes = (batch, heads, rows, width), (batch, kv_heads, keys, width)
        plan = Plan(target, dtype, *sizes, *strides, (keys, 0), (keys, 0), window)
        pointers = dtype, dtype, i32, i32, f32, i32, i32, f32
        for kernel, arguments, rest in (
            (_normalise, pointers, plan.normalise(width**-0.5)),
            (_reduce, (*pointers, f32), plan.reduce(width**-0.5, reduce)),
        ):
            scalars, meta, options = rest
            called = f"{name}, {kernel.fn.__name__.strip('_')}"
            found.append(Example(called, kernel, (*arguments, *scalars), meta, options, True))
    scalars, meta, options = plan.key_extents()
    return [*found, Example("extents", _extents, (i32, f32, i32, i32, *scalars), meta, options, False, False)]
