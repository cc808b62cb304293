"""What `vlmaccel eval imagenet` found: accuracies, loyalty and ratios of images per second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean
from typing import Any, NamedTuple

import torch

from vlmaccel.evals.timing import Spread, Timing, clock_for, hardware

UNPATCHED = "unpatched"


@dataclass(frozen=True)
class Guess:
    """A picture's label, and for every way at most five classes, the best first."""

    id: str
    label: int
    top: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Turn:
    """Seconds that a batch took each way."""

    pictures: int
    seconds: Mapping[str, Timing]


@dataclass(frozen=True)
class Cost:
    """tokens: before the first block and behind each. flops_ratio: share of the unpatched blocks' FLOPs."""

    tokens: tuple[int, ...]
    flops_ratio: float


class Score(NamedTuple):
    """Shares of the pictures, 0 to 1. top1_error: standard error. loyalty: of the same top-1 class as unpatched."""

    top1: float
    top1_error: float
    top5: float
    loyalty: float


@dataclass(frozen=True)
class ImageNetResult:
    """Guesses at all pictures in the order of the data.

    curves: for every way, the line that it is a point of. costs: of the ways that are patched.
    turns: of full batches, those of earlier runs and the first of every process left out.
    """

    guesses: tuple[Guess, ...]
    curves: Mapping[str, str]
    costs: Mapping[str, Cost]
    turns: tuple[Turn, ...]
    device: torch.device
    processes: int
    settings: Mapping[str, Any]

    def score(self, way: str) -> Score:
        top1 = fmean(guess.top[way][0] == guess.label for guess in self.guesses)
        top5 = fmean(guess.label in guess.top[way] for guess in self.guesses)
        loyalty = fmean(guess.top[way][0] == guess.top[UNPATCHED][0] for guess in self.guesses)
        return Score(top1, sqrt(top1 * (1 - top1) / len(self.guesses)), top5, loyalty)

    def speed(self, way: str) -> Spread | None:
        """Images per second over the unpatched model's, batch by batch; None if no batch was timed."""
        clock = clock_for(self.device)
        ratios = [turn.seconds[UNPATCHED].on(clock) / turn.seconds[way].on(clock) for turn in self.turns]
        return Spread.of(ratios) if ratios else None

    def images_per_second(self, way: str) -> Spread | None:
        """Of one process, as the user waits for it."""
        rates = [turn.pictures / turn.seconds[way].wall for turn in self.turns]
        return Spread.of(rates) if rates else None

    def report(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "settings": dict(self.settings),
            "pictures": len(self.guesses),
            "timed_batches": len(self.turns),
            "machine": self.machine(),
            "ways": {way: self._row(way) for way in self.curves},
        }

    def machine(self) -> dict[str, Any]:
        """What it was measured on; ratios are by the clock named."""
        return hardware(self.device) | {"processes": self.processes, "clock": clock_for(self.device)}

    def _row(self, way: str) -> dict[str, Any]:
        cost, speed, rate = self.costs.get(way), self.speed(way), self.images_per_second(way)
        return {
            "curve": self.curves[way],
            **self.score(way)._asdict(),
            "tokens": list(cost.tokens) if cost else None,
            "flops_ratio": cost.flops_ratio if cost else 1.0,
            "speed": asdict(speed) if speed else None,
            "images_per_second": asdict(rate) if rate else None,
        }
