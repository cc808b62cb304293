"""What `vlmaccel eval text` measures and found."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmaccel.evals.needle import Found
from vlmaccel.evals.text import Perplexity
from vlmaccel.evals.timing import Measured

UNPATCHED = "unpatched"


@dataclass(frozen=True)
class TextSettings:
    """How much is measured.

    context, windows: the first so many windows of so many tokens of the text are scored; no windows: no perplexity.
    prefill, step, batch_size: see `vlmaccel.evals.text.perplexity`.
    lengths: tokens of a prompt with a needle, and its answer. needles: so many at each length. seed: of the needles.
    turns: of the time measurement that count; 0: none. timed_prompt, timed_tokens: prompt and new tokens of each.
    """

    context: int = 1024
    windows: int = 8
    prefill: float = 0.5
    step: int = 1
    batch_size: int = 8
    lengths: tuple[int, ...] = (1024, 2048)
    needles: int = 5
    seed: int = 0
    turns: int = 3
    timed_prompt: int = 1024
    timed_tokens: int = 33


@dataclass(frozen=True)
class TextResult:
    """For "unpatched" and every way by its name, in this order: perplexity (none if no windows), and the needles found at
    each length. measured: None if nothing was timed. settings, machine: what it was measured with, plain data."""

    perplexities: Mapping[str, Perplexity]
    found: Mapping[str, Mapping[int, Sequence[Found]]]
    measured: Measured | None
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]

    def report(self) -> dict[str, Any]:
        """Everything as plain data, for JSON. Bytes are those of one sequence; rates are of batches of one."""
        ways = {way: self._perplexity(way) | self._needles(way) | self._speed(way) for way in self.found}
        return {"settings": dict(self.settings), "machine": dict(self.machine), "ways": ways}

    def _perplexity(self, way: str) -> dict[str, Any]:
        if way not in self.perplexities:
            return {"perplexity": None}
        found, base = self.perplexities[way], self.perplexities[UNPATCHED]
        change, error = found.change(base)
        row = dataclasses.asdict(found) | {"ppl": found.ppl, "change": change}
        return {"perplexity": row | {"change_error": error if len(found.losses) > 1 else None}}

    def _needles(self, way: str) -> dict[str, Any]:
        lengths = {}
        for length, found in self.found[way].items():
            lengths[str(length)] = {
                "hits": sum(one.hit for one in found),
                "needles": len(found),
                "kv_bytes": statistics.fmean(one.kv_bytes for one in found) if way != UNPATCHED else None,
                "kv_bytes_full": statistics.fmean(one.kv_bytes_full for one in found) if way != UNPATCHED else None,
                "answers": [dataclasses.asdict(one) for one in found],
            }
        return {"needles": lengths}

    def _speed(self, way: str) -> dict[str, Any]:
        if self.measured is None:
            return {"speed": None}
        clock, row = self.machine["clock"], {}
        for phase in ("prefill", "decode"):
            row[f"{phase}_seconds"] = dataclasses.asdict(self.measured.time(way, phase))
            row[f"{phase}_speedup"] = dataclasses.asdict(self.measured.speedup(way, UNPATCHED, phase, clock))
        return {"speed": row | {"tokens_per_second": 1 / self.measured.time(way, "decode").median}}
