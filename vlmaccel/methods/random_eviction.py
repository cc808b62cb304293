"""Random eviction: the baseline that every scored eviction of cache entries has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmaccel.hooks import CacheEntries
from vlmaccel.methods.eviction import Eviction, first_position


@dataclass(frozen=True)
class RandomEviction(Eviction):
    """Each KV head keeps entries drawn at random, the same whatever a sample is batched with.

    seed: of the draw, default 0. budget, sinks, recent: see `Eviction`; default: 8 newest entries, without which a model
    would not know what it was asked.
    """

    name = "random-eviction"

    recent: int = 8
    seed: int = 0

    def score(self, at: CacheEntries) -> Tensor:
        heads, length = at.entries.keys.shape[1], at.run.past + at.run.length
        generator = torch.Generator().manual_seed(self.seed * at.depth + at.layer)
        noise = torch.rand(length, heads, generator=generator).T.to(at.slots.index.device)
        place = (at.slots.index - first_position(at)).clamp(min=0).long().expand(-1, heads, -1)
        return noise[None].expand(place.shape[0], -1, -1).gather(2, place)
