"""VL-Cache: layers share the cache by how sparse the question's attention is, and keep what the question looks at.

Tu et al., "VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language Model Inference Acceleration",
ICLR 2025, arXiv 2410.23317.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmaccel.hooks import CacheEntries
from vlmaccel.methods.budget import divide, entries_of, is_whole
from vlmaccel.methods.eviction import Eviction, Rows, by_kv_head, first_and_last, observed_rows, per_query_head, seen_by
from vlmaccel.methods.selection import check_choice
from vlmaccel.reduction import Reduction

Granularity = Literal["head", "layer"]
NOTE = "vl-cache"


@dataclass(frozen=True)
class VLCache(Eviction):
    """Post-vision attention, the rows of the text behind the last picture, decides both things (section 4).

    Layers: gamma = 1 - the share of a row's visible entries with at least `threshold` of its largest attention, the mean
    over rows and heads; a layer gets budget in proportion to 1 - gamma, at least 1 % of the sequence. The paper clips, so
    that the total may differ; ours is exact by water-filling. Entries: the sum of the attention of these rows, and 10 % of
    the layer's budget for the newest. Needs all layers, so the whole cache is there at the end of the prefill: the peak
    stays.
    threshold: p, default 0.01 (section 4.1). granularity: one choice for every KV "head" (default) or "layer".
    rows: "post-vision" (default); "last" is for ablations. window: rows where there is no text behind a picture.
    budget, sinks, recent: see `Eviction`; sinks 0 as published.
    """

    name = "vl-cache"
    two_phase = True

    sinks: int = 0
    threshold: float = 0.01
    granularity: Granularity = "head"
    rows: Rows = "post-vision"
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("rows", self.rows, get_args(Rows))
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a share of the largest attention, from 0 to 1, not {self.threshold!r}")

    def observe(self, at: CacheEntries) -> None:
        if is_whole(self.budget):
            return
        assert at.scores is not None
        rows, counts = observed_rows(at, self.rows, self.window)
        attention = at.scores.rows(rows)
        weight = counts.to(attention.device)[:, None, :, None]
        large = (attention >= self.threshold * attention.amax(-1, keepdim=True)) & (attention > 0) & weight
        visible = per_query_head(seen_by(at, rows, counts) * at.prompt, attention.shape[1])
        visible = visible.expand(-1, attention.shape[1], -1).sum((1, 2))
        density = large.sum((1, 2, 3)) / visible.clamp(min=1)
        at.run.memory.setdefault(self, {})[at.layer] = density
        score = by_kv_head((attention * weight).sum(2), at)
        at.entries.notes[NOTE] = score if self.granularity == "head" else score.mean(1, keepdim=True)

    def layer_budget(self, at: CacheEntries) -> Tensor:
        key = (self, at.window)  # layers with the same window share one division
        if key not in at.run.memory:
            mean, low, high = (entries_of(budget, at) for budget in (self.budget, 0.01, 1.0))
            density = at.run.memory[self]
            weight = torch.stack([density[layer].to(mean.device) for layer in sorted(density)], 1)
            at.run.memory[key] = divide(weight, mean * weight.shape[1], low[:, None], high[:, None])
        return at.run.memory[key][:, at.layer].to(at.slots.index.device)

    def score(self, at: CacheEntries) -> Tensor:
        return at.entries.notes[NOTE]

    def protected(self, at: CacheEntries) -> Tensor:
        newest = (self.layer_budget(at) / 10).ceil().long()
        return first_and_last(at, self.sinks, newest.clamp(min=self.recent))

    def cache(self, at: CacheEntries) -> Reduction | None:
        reduction = super().cache(at)
        if not at.decoding:
            at.entries.notes.pop(NOTE, None)
        return reduction
