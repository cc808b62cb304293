"""AdaKV: the heads of a layer share its budget as their scores ask for it.

Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", NeurIPS
2025, arXiv 2407.11550.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmaccel.hooks import CacheEntries
from vlmaccel.methods.budget import divide, entries_of
from vlmaccel.methods.eviction import Heads, Observed
from vlmaccel.reduction import Reduction


@dataclass(frozen=True)
class AdaKV(Observed):
    """The scores of SnapKV; a head's budget is how many of its entries are among the best of all heads of the layer.

    Heads are stored in one tensor, as long as the longest needs: shorter ones are filled up with slots that no query sees,
    so memory falls only to the largest head's share. `stats` counts them.
    floor: the share of the budget that is divided evenly all the same, alpha of the paper; default 0.2 (the official
        code's for grouped-query attention). pool, pooling: default 7, "max" (the official code's). For the rest see
        `SnapKV`.
    """

    name = "adakv"

    sinks: int = 0
    pool: int = 7
    pooling: Heads = "max"
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a share, from 0 to 1, not {self.floor!r}")

    def score(self, at: CacheEntries) -> Tensor:
        return at.run.memory.setdefault((self, at.layer), super().score(at))

    def cache(self, at: CacheEntries) -> Reduction | None:
        try:
            return super().cache(at)
        finally:
            at.run.memory.pop((self, at.layer), None)

    def layer_budget(self, at: CacheEntries) -> Tensor:
        if bool((at.prompt.sum(2) <= entries_of(self.budget, at)[:, None]).all()):
            return entries_of(self.budget, at)
        score, protected = self.score(at), self.protected(at)
        free = (at.prompt & ~protected).expand_as(score)
        mean = entries_of(self.budget, at)[:, None].expand(-1, score.shape[1])
        always = (protected & at.prompt).expand_as(score).sum(2).minimum(mean)
        spare = mean - always
        flat = score.masked_fill(~free, -torch.inf).flatten(1)
        order = flat.argsort(dim=1, descending=True, stable=True)
        rank = torch.zeros_like(order).scatter(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        best = (rank < spare.sum(1, keepdim=True)).view_as(score) & free
        weight = best.sum(2) * (1 - self.floor) + spare * self.floor
        low = (spare * self.floor).floor().long().minimum(free.sum(2))
        return always + divide(weight.double(), spare.sum(1), low, free.sum(2))
