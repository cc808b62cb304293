"""H2O: keep the entries that have been attended to most so far, and the newest.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023, arXiv
2306.14048.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.hooks import CacheEntries, Modality
from vlmaccel.methods.budget import entries_of, is_whole
from vlmaccel.methods.eviction import attention_of_all, by_kv_head, first_and_last, seen_by
from vlmaccel.methods.selection import check_choice
from vlmaccel.methods.streaming import Streaming
from vlmaccel.reduction import Reduction

Reduce = Literal["sum", "mean"]


@dataclass(frozen=True)
class H2O(Streaming):
    """A budget of half heavy hitters, half newest entries (section 5; 1:1). The score of an entry is the attention from all
    rows, prompt and generated, added up in float32; it is kept beside the entry and counted as memory.

    Rows are worked out in blocks, so that memory is linear in the sequence; that is still the query-key half of the
    attention a second time. reduce: "sum" (default, as published, which favours early tokens: more rows see them) or
    "mean" over the rows that can see an entry. sinks: 0 as published. every, budget: see `Streaming`.
    """

    name = "h2o"

    sinks: int = 0
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduce", self.reduce, get_args(Reduce))

    def cache(self, at: CacheEntries) -> Reduction | None:
        if not is_whole(self.budget):
            self._accumulate(at)
        return super().cache(at)

    def _accumulate(self, at: CacheEntries) -> None:
        """Add the attention of the new rows to what every entry has had."""
        real = at.run.remaining.modality != Modality.PAD
        received = by_kv_head(attention_of_all(at), at)
        for name, new in (("h2o", received), ("h2o rows", self._rows(at, real))):
            if (old := at.entries.notes.get(name)) is not None:
                new = new + pad(old, (0, new.shape[2] - old.shape[2]))
            if name == "h2o" or self.reduce == "mean":
                at.entries.notes[name] = new

    def _rows(self, at: CacheEntries, real: Tensor) -> Tensor:
        rows = torch.arange(real.shape[1], device=real.device).expand_as(real)
        return seen_by(at, rows, real)

    def score(self, at: CacheEntries) -> Tensor:
        received = at.entries.notes["h2o"]
        return received if self.reduce == "sum" else received / at.entries.notes["h2o rows"].clamp(min=1)

    def protected(self, at: CacheEntries) -> Tensor:
        half = (entries_of(self.budget, at) + 1) // 2
        return first_and_last(at, self.sinks, half.clamp(min=self.recent))
