"""What the methods that go on evicting while tokens are generated share."""

from __future__ import annotations

from dataclasses import dataclass

from vlmaccel.hooks import CacheEntries
from vlmaccel.methods.budget import is_whole, seen
from vlmaccel.methods.eviction import Eviction, check_count, check_finite, keep_best
from vlmaccel.reduction import Reduction


@dataclass(frozen=True)
class Streaming(Eviction):
    """An eviction that holds its budget during decoding too.

    every: evict at every so many decode steps, so that up to so many entries more are held. Default 16; 1 is as
        published, but copies the cache at each step.
    budget: a ratio grows with what is generated; give a number of tokens for a cache of constant size.
    """

    every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("every", self.every, 1)

    def cache(self, at: CacheEntries) -> Reduction | None:
        if at.run.verifying:
            raise NotImplementedError(
                f"{self.name} evicts while it decodes, so assisted decoding could not take candidates back; "
                "use a method that evicts after the prefill only, such as snapkv"
            )
        if not at.decoding:
            return super().cache(at)
        due = seen(at) % self.every == 0  # by every sample's own count, whatever it is batched with
        if is_whole(self.budget) or not bool(due.any()):
            return None
        score = self.score(at)
        check_finite(self, at, score)
        budget = self.layer_budget(at).masked_fill(~due, at.entries.held)
        return keep_best(at, score, budget[:, None], self.protected(at))
