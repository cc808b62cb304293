"""What the kernels of sparse prefill have in common: a tile of gathered keys and values, and one step of online softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # channels of a head


class Config(NamedTuple):
    """A tile of `rows` and `keys`. precision: of products of float32."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


Table = dict[str, dict[tuple[int, int], Config]]  # by target; by bytes of a number and channels, that many or fewer


def config_for(table: Table, target: str, width: int, dtype: torch.dtype) -> Config:
    """The configuration for heads of `width` channels."""
    row = table[target]
    return row[min(key for key in row if key[0] == dtype.itemsize and key[1] >= width)]


def attention_fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels of sparse prefill take these: not float64, no gaps between channels, not empty."""
    plain = all(x.dtype == query.dtype and x.stride(3) == 1 and x.numel() for x in (query, key, value))
    return plain and query.shape[3] <= WIDEST.get(query.dtype, 0) and query.shape[0] * query.shape[1] < 2**16


def unit_of(width: int, *strides: int) -> int:
    """8 where all strides are multiples of 8: kernels get strides in units, since only then the compiler knows."""
    return 8 if all(x % 8 == 0 for x in (width, *strides)) else 1


@triton.jit
def _tile(tile_ptr, inside, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr):
    """What is `inside` (KEYS,) of a tile (KEYS, CHANNELS), without a mask where none is needed."""
    if MASKED:
        tile = tl.load(tile_ptr, mask=inside[:, None] & (tl.arange(0, CHANNELS) < WIDTH)[None, :], other=0.0)
    elif WIDTH < CHANNELS:
        tile = tl.load(tile_ptr, mask=(tl.arange(0, CHANNELS) < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(tile_ptr)
    return tile


@triton.jit
def attend(
    query, key_ptr, value_ptr, key_n, value_n, key_at, inside, upto, most, total, mixed, scale,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys `key_at` (KEYS,) int64 to the state of an online softmax: each row's highest logit so far, the sum of
    exponentials and the sum of values weighted by them. If MASKED, a row sees a key where it is `inside` (KEYS,) and in
    `upto` (ROWS, KEYS), else every row sees every key. scale: of logits to base 2, above 0."""
    channel = tl.arange(0, CHANNELS)[None, :]
    key = _tile(key_ptr + key_at[:, None] * (key_n * UNIT) + channel, inside, WIDTH, CHANNELS, MASKED)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        logits = tl.where(inside[None, :] & upto, logits, float("-inf"))
    new = tl.maximum(most, tl.max(logits, 1) * scale)
    base = new
    if MASKED:
        base = tl.where(new > float("-inf"), new, 0.0)  # of rows that see nothing so far
    weight = tl.exp2(logits * scale - base[:, None])  # one instruction for the product and the difference
    shrink = tl.exp2(most - base)
    total = total * shrink + tl.sum(weight, 1)
    value = _tile(value_ptr + key_at[:, None] * (value_n * UNIT) + channel, inside, WIDTH, CHANNELS, MASKED)
    mixed = tl.dot(weight.to(value.dtype), value, mixed * shrink[:, None], input_precision=PRECISION)
    return new, total, mixed
