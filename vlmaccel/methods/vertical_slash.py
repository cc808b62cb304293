"""Vertical-slash prefill: some keys that all rows see, and some diagonals.

Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", NeurIPS 2024,
arXiv 2407.02490.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.hooks import AttentionCall, BlockLists, Method
from vlmaccel.kernels.attention_rows import attention_rows
from vlmaccel.kernels.block_index import vertical_slash_index
from vlmaccel.kernels.places import places
from vlmaccel.methods.eviction import check_count, check_finite
from vlmaccel.methods.selection import check_choice

SINKS, NEAR = 30, 100  # first keys and last diagonals that are always computed (the paper's code)
TOGETHER = 2**21  # probabilities at a time on CPUs, where new memory costs more than what is done in it
BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class VerticalSlash(Method):
    """At each decoder layer and head, compute the attention of `vertical` keys and `slash` diagonals (distances between row
    and key), those with most attention from the `last` rows; the first 30 keys and the 100 nearest diagonals are among them.

    Diagonals are computed in blocks. Every head gets the pattern; the paper looks for the best of three for each head of a
    model beforehand. For inference, in models with attn_implementation="sdpa"; a layer with a sliding window shorter than
    the prompt computes everything. It pays for long prompts: lists cost time, too. Blocks are counted from the first column
    of a batch, so that padding by other than whole blocks changes a little what is computed. On CPUs, from 1,024 keys on, a
    head whose lists would take longer than all of its attention computes all of it; `vlmaccel.stats` counts what was computed.
    vertical: default 1000; slash: default 6096 (both from the paper's code). last: rows that are looked at, default 64
        (section 3.2). mass: in place of the two numbers, the fewest keys, and the fewest diagonals, that hold this share of
        the attention in these rows. block: rows, and keys, of a block: 64 (default, the paper's) or 128.
    """

    name = "vertical-slash"

    vertical: int = 1000
    slash: int = 6096
    last: int = 64
    mass: float | None = None
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("vertical", "slash"):
            check_count(name, getattr(self, name), 0)
        check_count("last", self.last, 1)
        check_mass("mass", self.mass)
        check_choice("block", self.block, BLOCKS)

    def sparse_layers(self, depth: int) -> Sequence[int]:
        return range(depth)

    def sparse_attention(self, at: AttentionCall) -> BlockLists | None:
        if not in_one_piece(at.real) or self.mass == 1:
            return None
        keys, diagonals = lines(at, self.last)
        check_finite(self, at, keys)
        start = at.real.byte().argmax(1)[:, None, None]
        place = torch.arange(keys.shape[2], device=keys.device)
        sink = (place >= start) & (place < start + SINKS)
        vertical = best(keys, sink.expand_as(keys), self.vertical, self.mass)
        slash = best(diagonals, (place < NEAR).expand_as(keys), self.slash, self.mass)
        blocks, columns = vertical_slash_index(vertical, slash, at.query.shape[2], at.key.shape[2], self.block)
        return BlockLists(blocks, columns, self.block)


def check_mass(name: str, mass: float | None) -> None:
    """Raise ValueError unless `mass` is a share or None."""
    if mass is not None and (isinstance(mass, bool) or not isinstance(mass, (int, float)) or not 0 < mass <= 1):
        raise ValueError(f"{name} is a share of the attention, above 0, at most 1, not {mass!r}")


def in_one_piece(real: Tensor) -> bool:
    """Whether the real keys (B, m) bool of every sample are its last ones, and there are some."""
    return bool((real == (real.cumsum(1) > 0)).all()) and bool(real[:, -1].all())


def lines(at: AttentionCall, count: int) -> tuple[Tensor, Tensor]:
    """(B, H, m) float32 each: what the attention of the last min(count, n) rows comes to along every key and every diagonal
    (by row minus key); rows of padding have none."""
    (batch, heads, n, _), m = at.query.shape, at.key.shape[2]
    key = torch.arange(m, device=at.key.device)
    row = key[m - min(count, n) :, None]
    mask = (key <= row) & at.real[:, None, None]  # of which rows of padding see none
    rows, groups = len(row), heads // at.key.shape[1]
    vertical, slash = (at.query.new_empty(batch, heads, m, dtype=torch.float) for _ in range(2))
    few = max(1, TOGETHER // (batch * rows * m)) if at.query.device.type == "cpu" else heads
    for some in torch.arange(heads, device=key.device).split(few):
        attention = attention_rows(at.query[:, some, -rows:], at.key[:, some // groups], mask, at.scale)
        vertical[:, some] = attention.sum(2)
        # With a row that is longer by one, what is on a diagonal stands in one column; what comes over from the row before
        # is after it, and 0.
        skewed = pad(attention.flatten(2), (rows - 1, 1)).unflatten(2, (rows, m + 1))
        slash[:, some] = skewed.sum(2)[..., :m].flip(2)
    return vertical, slash


def best(score: Tensor, forced: Tensor, count: int, mass: float | None) -> Tensor:
    """(..., k) int64: of the last dimension those that are `forced` (..., n) bool, then those with the highest score
    (..., n), `count` in all or, in place of that, the fewest that hold the share `mass` of all scores; ascending, -1 behind
    them. What scores 0 is not worth it."""
    order = score.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
    if mass is None:
        early = torch.arange(score.shape[-1], device=score.device) < count
    else:
        value = score.gather(-1, order)
        before = value.cumsum(-1) - value
        early = before < mass * value.sum(-1, keepdim=True)
    wanted = torch.zeros_like(forced).scatter(-1, order, early.expand_as(forced)) & (score > 0)
    return places(wanted | forced)
