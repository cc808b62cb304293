"""Block-sparse prefill: every block of rows sees the blocks of keys that its mean row is most alike.

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
from vlmaccel.methods.eviction import check_count, check_finite
from vlmaccel.methods.selection import check_choice
from vlmaccel.methods.vertical_slash import BLOCKS, best, check_mass, in_one_piece


@dataclass(frozen=True)
class BlockSparse(Method):
    """At each decoder layer and head, compute for every block of rows the key blocks with the highest product of mean query
    and mean key, its own among them.

    For inference, in models with attn_implementation="sdpa"; a layer with a sliding window shorter than the prompt computes
    everything. Padding moves blocks, and heads on CPUs may compute everything, as in `VerticalSlash`.
    blocks: key blocks of each block of rows, default 100 (the paper's code). mass: in place of it, the fewest that hold this
        share of the softmax over these products. block: rows, and keys, of a block: 64 (default, the paper's) or 128.
    """

    name = "block-sparse"

    blocks: int = 100
    mass: float | None = None
    block: int = 64

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks, 1)
        check_mass("mass", self.mass)
        check_choice("block", self.block, BLOCKS)

    def sparse_layers(self, depth: int) -> Sequence[int]:
        return range(depth)

    def sparse_attention(self, at: AttentionCall) -> BlockLists | None:
        if not in_one_piece(at.real) or self.mass == 1:
            return None
        share, own = block_attention(at, self.block)
        check_finite(self, at, share)
        blocks = best(share, own.expand_as(share), self.blocks, self.mass).int()
        return BlockLists(blocks, blocks.new_empty(*blocks.shape[:3], 0), self.block)


def block_attention(at: AttentionCall, block: int) -> tuple[Tensor, Tensor]:
    """(B, H, Q, K) float32, `by_means` of the mean queries of all row blocks; and (Q, K) bool, the key blocks that a row
    block's own tokens are in."""
    n, m = at.query.shape[2], at.key.shape[2]
    first, last = row_blocks(n, m, block, at.query.device)
    share = by_means(at, block_means(at.query, at.real[:, m - n :], block), last, block)
    number = torch.arange(share.shape[3], device=share.device)
    return share, (number >= first[:, None]) & (number <= last[:, None])


def by_means(at: AttentionCall, query: Tensor, last: Tensor, block: int) -> Tensor:
    """(B, H, Q, K) float32, softmax over the K key blocks of the product of Q mean queries (B, H, Q, d) and their mean keys,
    0 for those behind the key block that is `last` (Q,) for a query."""
    key, real = block_means(at.key, at.real, block), blocks_of(at.real[:, None], block)[:, :, None].any(-1)
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * at.scale
    seen = (torch.arange(key.shape[2], device=key.device) <= last[:, None]) & real
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)


def row_blocks(n: int, m: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(Q,) int64 each, the key blocks of the first and of the last row of every block of the n rows that are the last of m."""
    first = torch.arange(0, n, block, device=device)
    return (first + m - n) // block, ((first + block).clamp(max=n) - 1 + m - n) // block


def blocks_of(x: Tensor, block: int) -> Tensor:
    """(B, H, n) or (B, H, n, d) with the dimension n in blocks, what is missing in the last one filled up with 0."""
    missing = -x.shape[2] % block
    tail = (0, missing) if x.ndim == 3 else (0, 0, 0, missing)
    return pad(x, tail).unflatten(2, (-1, block))


def block_means(x: Tensor, real: Tensor, block: int) -> Tensor:
    """(B, H, n / block, d) float32, mean over the real tokens (B, n) of every block of x (B, H, n, d)."""
    weight = blocks_of(real[:, None].float(), block)
    total = (blocks_of(x.float(), block) * weight[..., None]).sum(3)
    return total / weight.sum(3, keepdim=True).clamp(min=1)
