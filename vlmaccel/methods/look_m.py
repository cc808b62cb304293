"""LOOK-M: evict what is not looked at, text last, and merge what is evicted into what is kept.

Wan et al., "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference", Findings of EMNLP
2024, arXiv 2406.18139.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmaccel.cache.mixed import MixedLayer
from vlmaccel.hooks import CacheEntries, Modality
from vlmaccel.methods.eviction import Eviction, attention_of_all, by_kv_head, newest_half
from vlmaccel.methods.selection import check_choice
from vlmaccel.reduction import Reduction

Merge = Literal["averaged", "pivotal", "weighted", "none"]
CHUNK = 1024  # evicted entries whose likeness to all kept ones exists at a time


@dataclass(frozen=True)
class LookM(Eviction):
    """Keep the entries with most attention from all rows, those of text raised by the largest such score (section 3.1), half
    of the budget being the newest; merge each evicted key and its value into the kept one of the same head that is most
    like it by cosine (section 3.2).

    merge: what becomes of a kept entry c with n evicted ones e: "averaged" (c + sum e) / (n + 1); "pivotal" (default)
        (c + sum (c + e) / 2) / (n + 1); "weighted" (c + sum cos e) / (n + 1); or "none".
    prop_attn: add log(n + 1) to the logits of a merged key, which then weighs as its members. Default False, as
        published; True takes the memory of one number an entry.
    text_prior: whether text is raised. The official code lets all text stay, beyond the budget; ours stays within it.
    Merging rotated keys of distant positions is no rotation of any key; the method is so as published.
    budget, sinks, recent: see `Eviction`; sinks 0 as published.
    """

    name = "look-m"

    sinks: int = 0
    merge: Merge = "pivotal"
    prop_attn: bool = False
    text_prior: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("merge", self.merge, get_args(Merge))

    def score(self, at: CacheEntries) -> Tensor:
        score = by_kv_head(attention_of_all(at), at)
        if not self.text_prior:
            return score
        text = (at.modality < Modality.IMAGE).to(score.device).expand_as(score)
        return torch.where(text, score + score.amax(2, keepdim=True), score)

    def protected(self, at: CacheEntries) -> Tensor:
        return newest_half(self, at)

    def cache(self, at: CacheEntries) -> Reduction | None:
        selected = super().cache(at)
        if selected is None or self.merge == "none":
            return selected
        if isinstance(at.entries, MixedLayer):
            raise NotImplementedError("look-m merges entries, so it comes before the method that quantises them")
        batch = at.entries.keys.shape[0]
        selected = selected.repeat(at.entries.keys.shape[1] * batch // selected.keep.shape[0])
        keys, values, real = (
            x.flatten(0, 1)
            for x in (at.entries.keys, at.entries.values, at.prompt.expand(-1, at.entries.keys.shape[1], -1))
        )
        target, likeness = nearest(keys, selected, real)
        changed = (merged(x, selected, target, likeness, self.merge) for x in (keys, values))
        at.entries.rewrite(*(x.unflatten(0, (batch, -1)) for x in changed))
        group = torch.where(selected.group >= 0, selected.group, target)
        return replace(selected, group=group)


def nearest(keys: Tensor, selected: Reduction, real: Tensor) -> tuple[Tensor, Tensor]:
    """For every evicted entry the slot of the kept one that its key is most like, -1 for others, and the cosine: (B, m) each.

    keys: (B, m, head_dim). real: (B, m) bool; what is not real is not merged.
    """
    unit = normalize(keys.float(), dim=-1)
    kept = unit.gather(1, selected.keep[..., None].expand(-1, -1, unit.shape[2]))
    filler = (selected.size == 0)[:, None]
    best = [(chunk @ kept.mT).masked_fill(filler, -2).max(-1) for chunk in unit.split(CHUNK, 1)]
    cosine, slot = torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1)
    evicted = (selected.group < 0) & real
    return slot.masked_fill(~evicted, -1), cosine.masked_fill(~evicted, 0)


def merged(x: Tensor, selected: Reduction, target: Tensor, cosine: Tensor, how: Merge) -> Tensor:
    """Entries x (B, m, head_dim) with the evicted ones merged into the kept; only the kept ones matter from here on."""
    n = selected.keep.shape[1]
    slot = target.masked_fill(target < 0, n)
    weight = cosine if how == "weighted" else torch.full_like(cosine, 0.5 if how == "pivotal" else 1.0)
    weight = weight.masked_fill(target < 0, 0)
    wide = slot[..., None].expand_as(x)
    total = x.new_zeros(x.shape[0], n + 1, x.shape[2], dtype=torch.float).scatter_add_(
        1, wide, x.float() * weight[..., None]
    )
    count = total.new_zeros(x.shape[0], n + 1).scatter_add_(1, slot, (target >= 0).float())[:, :n, None]
    where = selected.keep[..., None].expand(-1, -1, x.shape[2])
    own = x.gather(1, where).float()
    own = own * (1 + count / 2) if how == "pivotal" else own
    return x.scatter(1, where, ((own + total[:, :n]) / (1 + count)).to(x.dtype))
