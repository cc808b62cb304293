"""The methods at token budgets that can be compared.

Those that drop once do so before decoder layer 1, where removal costs the demo's model accuracy; before layer 2 it has
already read most answers out of the picture. PyramidDrop keeps its stages, with the ratio that gives the same mean of
visual tokens over the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmaccel.methods import PyramidDrop

METHODS = ("pyramiddrop", "fastv", "attention-sum", "magnitude", "neighbour-cosine", "random", "uniform", "pool")
KEPT = (1 / 2, 1 / 4, 1 / 9)  # share of the visual tokens that stay from `LAYER` on: 288, 144 and 64 of 576
LAYER = 1
SEEDS = (0, 1, 2)  # of the random baseline


@dataclass(frozen=True)
class Variant:
    """A method at a budget: `runs` are its options, several for the seeds of the random baseline."""

    method: str
    kept: int
    runs: tuple[Mapping[str, Any], ...]


def variants(depth: int, visual_tokens: int) -> list[Variant]:
    """All methods at all budgets, the means of visual tokens over the decoder layers being as equal as they can."""
    result = []
    for kept in (round(visual_tokens * share) for share in KEPT):
        ratio = kept / visual_tokens
        for name in METHODS:
            options: dict[str, Any] = {"layer": LAYER, "ratio": ratio}
            if name == "pyramiddrop":
                options = {"ratio": pyramid_ratio(mean_kept({LAYER: ratio}, depth), depth)}
            runs = [options | {"seed": seed} for seed in SEEDS] if name == "random" else [options]
            result.append(Variant(name, kept, tuple(runs)))
    return result


def mean_kept(stages: Mapping[int, float], depth: int) -> float:
    """Fraction of the visual tokens at a decoder layer's input, the mean over all layers."""
    now, total = 1.0, 0.0
    for layer in range(depth):
        now = stages.get(layer, now)
        total += now
    return total / depth


def pyramid_ratio(mean: float, depth: int) -> float:
    """The `ratio` at which PyramidDrop keeps this fraction on average, to four digits."""
    return ratio_for(mean, lambda ratio: PyramidDrop(ratio=ratio).stages(depth), depth)


def ratio_for(mean: float, stages: Callable[[float], Mapping[int, float]], depth: int) -> float:
    """The ratio whose `stages` keep this fraction on average, to four digits."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if mean_kept(stages(middle), depth) < mean:
            low = middle
        else:
            high = middle
    return round(high, 4)
