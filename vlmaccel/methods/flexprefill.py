"""FlexPrefill: each head takes the pattern that fits the prompt, and as much of it as holds a share of the attention.

Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference", ICLR 2025, arXiv
2502.20766.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.hooks import AttentionCall, BlockLists, Method
from vlmaccel.kernels.block_index import vertical_slash_index
from vlmaccel.kernels.places import places
from vlmaccel.methods.block_sparse import block_attention, block_means, blocks_of, by_means, row_blocks
from vlmaccel.methods.eviction import check_finite
from vlmaccel.methods.selection import check_choice
from vlmaccel.methods.vertical_slash import BLOCKS, best, check_mass, in_one_piece, lines


@dataclass(frozen=True)
class FlexPrefill(Method):
    """At each decoder layer, a head whose last `block` rows attend to blocks of keys as their means let expect computes the
    blocks with most attention by means; any other head computes vertical and slash lines (see `VerticalSlash`).

    For inference, in models with attn_implementation="sdpa"; a layer with a sliding window shorter than the prompt computes
    everything. Padding moves blocks, and heads on CPUs may compute everything, as in `VerticalSlash`.
    gamma: the fewest blocks, keys and diagonals that hold this share of the attention; default 0.9. tau: the largest
        Jensen-Shannon distance (square root of the divergence, in nats) between the two for the first kind, default 0.1 (both
        section 4.1). block: rows, and keys, of a block: 128 (default, the paper's) or 64. The first and the own block of every
        block of rows are always computed.
    """

    name = "flexprefill"

    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128

    def __post_init__(self) -> None:
        check_mass("gamma", -1 if self.gamma is None else self.gamma)
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 <= self.tau <= 1:
            raise ValueError(f"tau is a Jensen-Shannon distance, from 0 to 1, not {self.tau!r}")
        check_choice("block", self.block, BLOCKS)

    def sparse_layers(self, depth: int) -> Sequence[int]:
        return range(depth)

    def sparse_attention(self, at: AttentionCall) -> BlockLists | None:
        if not in_one_piece(at.real) or self.gamma == 1:
            return None
        share, own = block_attention(at, self.block)
        check_finite(self, at, share)
        keys, diagonals = lines(at, self.block)
        n, m = at.query.shape[2], at.key.shape[2]
        rows = min(self.block, n)
        true = blocks_of(keys, self.block).sum(-1)
        mean = block_means(at.query[:, :, n - rows :], at.real[:, m - rows :], self.block)
        _, last = row_blocks(rows, m, self.block, mean.device)
        expected = by_means(at, mean, last, self.block)[:, :, 0]
        alike = (distance(expected, true) <= self.tau)[..., None, None]

        start = at.real.byte().argmax(1)[:, None, None]
        first = torch.arange(share.shape[3], device=share.device) == start[..., None] // self.block
        means = places(whole_map(share, self.gamma) | own | (first & (share > 0))).int()

        place = torch.arange(keys.shape[2], device=keys.device)
        sink = ((place >= start) & (place < start + self.block)).expand_as(keys)
        vertical, slash = best(keys, sink, 0, self.gamma), best(diagonals, torch.zeros_like(sink), 0, self.gamma)
        blocks, columns = vertical_slash_index(vertical, slash, n, m, self.block)

        most = max(means.shape[3], blocks.shape[3])
        means, blocks = (pad(x, (0, most - x.shape[3]), value=-1) for x in (means, blocks))
        return BlockLists(torch.where(alike, means, blocks), columns.masked_fill(alike, -1), self.block)


def whole_map(share: Tensor, gamma: float) -> Tensor:
    """(B, H, Q, K) bool, the fewest blocks of a head's whole map that hold gamma of it."""
    flat = share.flatten(2)
    order = flat.argsort(dim=2, descending=True, stable=True)
    value = flat.gather(2, order)
    early = value.cumsum(2) - value < gamma * value.sum(2, keepdim=True)
    return torch.zeros_like(early).scatter(2, order, early).view_as(share)


def distance(p: Tensor, q: Tensor) -> Tensor:
    """(B, H), square root of the Jensen-Shannon divergence of distributions (B, H, K), in nats."""
    p, q = (x / x.sum(-1, keepdim=True).clamp(min=1e-9) for x in (p, q))
    middle = ((p + q) / 2).clamp(min=1e-30)
    divergence = torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)
    return (divergence.sum(-1) / 2).clamp(min=0).sqrt()
