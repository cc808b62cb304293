"""SnapKV: keep the cache entries that the end of the prompt looks at.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv 2404.14469.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmaccel.methods.eviction import Observed


@dataclass(frozen=True)
class SnapKV(Observed):
    """Each KV head keeps the last `window` tokens of the prompt and the entries that these attend to most, scores smoothed
    over `pool` neighbours (section 4).

    Scored for each KV head; the official code scores query heads and stores every one's entries apart, which takes as many
    times the memory as there are query heads to a KV head. Acts layer by layer: the peak of the prefill falls too.
    window: default 32, pool: default 5, pooling: default "mean" (the official code's). rows, group, budget, sinks,
    recent: see `Observed` and `Eviction`; sinks 0 as published.
    """

    name = "snapkv"

    sinks: int = 0
