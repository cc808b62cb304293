"""Measuring one way against another in turn, so that a slow minute of the machine hits both.

Absolute times of a shared machine say little; the ratio of two runs that followed each other says a lot. So
the ways are run A B A B ..., a ratio is taken within each turn, and the median of the ratios is shown with
their smallest and largest.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

Clock = Literal["wall", "cpu"]


def clock_for(device: torch.device | str) -> Clock:
    """The clock to take ratios with: process time on a CPU, which others may share, wall time elsewhere."""
    return "cpu" if torch.device(device).type == "cpu" else "wall"


@dataclass(frozen=True)
class Timing:
    """Seconds that something took. wall: as the user waits. cpu: processor time, all threads together."""

    wall: float
    cpu: float

    def __sub__(self, other: Timing) -> Timing:
        return Timing(self.wall - other.wall, self.cpu - other.cpu)

    def __truediv__(self, parts: float) -> Timing:
        return Timing(self.wall / parts, self.cpu / parts)

    def on(self, clock: Clock) -> float:
        """Seconds by this clock."""
        return self.cpu if clock == "cpu" else self.wall

    @classmethod
    def now(cls, device: torch.device | str = "cpu") -> Timing:
        """Both clocks, read when all work given to `device` is done."""
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return cls(time.perf_counter(), time.process_time())


@dataclass(frozen=True)
class Spread:
    """Median of several values, with the smallest and the largest beside it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}..{self.high:.3g})"


@dataclass(frozen=True)
class Measured:
    """What `measure_in_turn` found: seconds[way][phase] has one Timing a turn, in the order of the turns."""

    seconds: dict[str, dict[str, list[Timing]]]

    def time(self, way: str, phase: str = "total", clock: Clock = "wall") -> Spread:
        """Seconds that a phase took."""
        return Spread.of(t.on(clock) for t in self.seconds[way][phase])

    def speedup(self, way: str, base: str, phase: str = "total", clock: Clock = "wall") -> Spread:
        """How many times as fast as `base` this way was, turn by turn, so that drift cancels out."""
        pairs = zip(self.seconds[base][phase], self.seconds[way][phase], strict=True)
        return Spread.of(b.on(clock) / w.on(clock) for b, w in pairs)


def measure_in_turn(
    ways: Mapping[str, Callable[[], object]],
    repeats: int = 5,
    *,
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int], None] | None = None,
) -> Measured:
    """Run every way once a turn, in order, for `warmup` turns that do not count and `repeats` that do.

    ways: name -> what to run. If it returns a mapping to Timings, these are its phases (as `time_generate`
        gives); otherwise the whole call is timed as the phase "total".
    contexts: name -> makes a context manager to run this way in, entered and left outside the timed part:
        this is where a model is patched and unpatched, e.g. ``{"patched": lambda: vlmaccel.patched(model,
        "fastv")}``.
    progress: called with (name, turn) after each run; the turns of the warm-up count from -warmup to -1.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}")
    unknown = set(contexts or ()) - set(ways)
    if unknown:
        raise ValueError(f"contexts for {sorted(unknown)}, but the ways are {list(ways)}")
    seconds: dict[str, dict[str, list[Timing]]] = {name: {} for name in ways}
    for turn in range(-warmup, repeats):
        for name, run in ways.items():
            with (contexts or {}).get(name, nullcontext)():
                start = Timing.now(device)
                result = run()
                total = Timing.now(device) - start
            if turn >= 0:
                for phase, timing in (_timings(result) or {"total": total}).items():
                    seconds[name].setdefault(phase, []).append(timing)
            if progress:
                progress(name, turn)
    return Measured(seconds)


def _timings(result: object) -> dict[str, Timing]:
    """The phases that a way timed itself, or none."""
    if not isinstance(result, Mapping) or not all(isinstance(timing, Timing) for timing in result.values()):
        return {}
    return dict(result)


class _Stamps(StoppingCriteria):
    """Reads the clocks when a token is chosen; never stops anything."""

    def __init__(self) -> None:
        self.times: list[Timing] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(Timing.now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_generate(
    model: PreTrainedModel, inputs: Mapping[str, Any], new_tokens: int = 16, **options: Any
) -> dict[str, Timing]:
    """Generate exactly `new_tokens` tokens greedily and say how long it took, the first token apart from the
    others.

    Returns "prefill": until the first token is chosen (time to first token; the vision tower is in it if
    `inputs` has pixels and not encoded pictures), and, if new_tokens > 1, "decode": seconds for one step, the
    mean over all later tokens. batch size / decode is the rate in tokens per second. `options` go to
    `model.generate`.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, not {new_tokens}")
    stamps = _Stamps()
    # generate() fills the dictionary of encoded pictures in, so it gets one of its own
    inputs = {k: dict(v) if k == "mm_encoder_outputs" else v for k, v in inputs.items()}
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    start = Timing.now(model.device)
    model.generate(
        **inputs,
        **{**length, "do_sample": False, "stopping_criteria": StoppingCriteriaList([stamps]), **options},
    )
    first, last = stamps.times[0], stamps.times[-1]
    phases = {"prefill": first - start}
    if new_tokens > 1:
        phases["decode"] = (last - first) / (len(stamps.times) - 1)
    return phases


def peak_memory(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes by which the tensors alive during `fn()` exceeded, at most, those alive before it (weights are
    not in it).

    From torch's own allocators: the profiler's record of every allocation on a CPU, the caching allocator's
    peak on CUDA.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise NotImplementedError(f"peak memory is measured on cpu and cuda devices, not on {device.type}")
    gc.collect()  # so that less of what was there before is freed meanwhile
    with _quiet(), torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profiler:
        result = fn()
    del result  # kept until here: what fn returns counts as alive
    live = peak = 0
    events = profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler from telling stderr that there is no GPU; it reads this when it first starts."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]


def hardware(device: torch.device | str) -> dict[str, Any]:
    """What a number was measured on: processor, threads, load, versions."""
    device = torch.device(device)
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(model: PreTrainedModel) -> dict[str, Any]:
    """The same, with the model's dtype and attention."""
    return hardware(model.device) | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
