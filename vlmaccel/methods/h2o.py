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
from vlmaccel.methods.budget import is_whole
from vlmaccel.methods.eviction import attention_of_all, by_kv_head, newest_half, seen_by
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
        new = {"h2o": by_kv_head(attention_of_all(at), at)}
        if self.reduce == "mean":
            real = at.run.remaining.modality != Modality.PAD
            new["h2o rows"] = seen_by(at, torch.arange(real.shape[1], device=real.device).expand_as(real), real)
        for name, x in new.items():
            old = at.entries.notes.get(name)
            at.entries.notes[name] = x if old is None else x + pad(old, (0, x.shape[2] - old.shape[2]))

    def score(self, at: CacheEntries) -> Tensor:
        received = at.entries.notes["h2o"]
        return received if self.reduce == "sum" else received / at.entries.notes["h2o rows"].clamp(min=1)

    def protected(self, at: CacheEntries) -> Tensor:
        return newest_half(self, at)
