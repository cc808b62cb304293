"""What a benchmark found, as numbers, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vlmaccel.evals.timing import Clock, Spread


@dataclass(frozen=True)
class Phase:
    """One phase, prefill or decode, both ways. speedup: unpatched / patched, above 1 = patched is faster,
    turn by turn.

    Seconds are of the whole prefill or of one decode step, by wall clock and by processor time of the
    process.
    """

    speedup: Spread
    speedup_wall: Spread
    unpatched_wall: Spread
    patched_wall: Spread
    unpatched_cpu: Spread
    patched_cpu: Spread


@dataclass(frozen=True)
class BenchResult:
    """What `run_bench` found. Bytes and FLOPs are of the whole batch; a FLOPs ratio is unpatched / patched.

    clock: what `speedup` and `efficiency` are taken by, "cpu" or "wall". decode: None if only one token was
        made.
    flops_*: counted by torch (a multiply-add is two). flops_ratio_closed: of the papers' formula over the
        layers alone.
    peak_*: bytes of the prefill's tensors, KV cache included, on top of the weights. kv_*: KV cache after the
        prefill.
    tokens, visual_tokens: mean number per sample at each decoder layer's input, patched; nominal: without
        reduction.
    max_logit_difference: largest absolute difference of the first token's logits; 0 is bit-identical.
    """

    shape: str
    method: str
    options: dict[str, Any]
    keep_all: bool
    include_tower: bool
    depth: int
    vision_depth: int
    batch: int
    text_tokens: int
    new_tokens: int
    repeats: int
    clock: Clock
    machine: dict[str, Any]
    prefill: Phase
    decode: Phase | None
    efficiency: Spread
    flops_unpatched: int
    flops_patched: int
    flops_ratio_closed: float
    peak_unpatched: int
    peak_patched: int
    kv_unpatched: int
    kv_patched: int
    tokens_nominal: int
    visual_tokens_nominal: float
    tokens: list[float]
    visual_tokens: list[float]
    max_logit_difference: float

    @property
    def flops_ratio(self) -> float:
        """Counted FLOPs, unpatched / patched."""
        return self.flops_unpatched / self.flops_patched

    @property
    def overhead(self) -> float:
        """How much longer a patched prefill takes, as a fraction of an unpatched one; negative is shorter."""
        return 1 / self.prefill.speedup.median - 1

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        facts = asdict(self) | {"flops_ratio": self.flops_ratio, "overhead": self.overhead}
        Path(path).write_text(json.dumps(facts, indent=2) + "\n")


def render(result: BenchResult) -> Table:
    """The result as a table for a terminal; every ratio says in its row which way is better."""
    r = result
    facts = r.machine
    start = ", from text"
    if r.visual_tokens_nominal:
        tower = f"pixels (vision tower of {r.vision_depth} layers included)"
        start = f" ({r.visual_tokens_nominal:g} visual), from {tower if r.include_tower else 'encoded pictures'}"
    table = Table(
        title=f"{r.shape}, {r.depth} layers, {r.method}",
        caption=(
            f"{r.batch} x {r.tokens_nominal} tokens{start}; "
            f"{facts['dtype']}, {facts['attention']}, {facts['name']}, {facts['threads']} threads, "
            f"load {facts['load']}, torch {facts['torch']}, transformers {facts['transformers']}. "
            f"Median (smallest..largest) of {r.repeats} turns; ratios by "
            f"{'processor' if r.clock == 'cpu' else 'wall clock'} time, taken turn by turn."
        ),
    )
    for column in ("", "unpatched", "patched", "ratio"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, phase in (("prefill", r.prefill), ("decode step", r.decode)):
        if phase is None:
            continue
        wall = (str(phase.unpatched_wall), str(phase.patched_wall))
        if r.clock == "cpu":
            cpu = (str(phase.unpatched_cpu), str(phase.patched_cpu))
            table.add_row(f"{name}, processor s", *cpu, f"[bold]{phase.speedup} x as fast[/bold]")
            table.add_row(f"{name}, wall s", *wall, f"{phase.speedup_wall} x as fast")
        else:
            table.add_row(f"{name}, s", *wall, f"[bold]{phase.speedup} x as fast[/bold]")
    closed = f"closed form {r.flops_ratio_closed:.3f}x"
    table.add_row(
        "FLOPs, counted",
        _short(r.flops_unpatched),
        _short(r.flops_patched),
        f"{r.flops_ratio:.3f}x ({closed})",
    )
    table.add_row("efficiency", "", "", f"[bold]{r.efficiency}[/bold]")
    if r.keep_all:
        table.add_row("overhead of prefill", "", "", f"[bold]{r.overhead:+.1%}[/bold]")
    for name, before, after in (
        ("peak memory, MiB", r.peak_unpatched, r.peak_patched),
        ("KV cache, MiB", r.kv_unpatched, r.kv_patched),
    ):
        table.add_row(name, f"{before / 2**20:.2f}", f"{after / 2**20:.2f}", f"{after / before:.2%} of unpatched")
    table.add_row("tokens by layer", str(r.tokens_nominal), _by_layer(r.tokens), "")
    if r.visual_tokens_nominal:
        table.add_row("visual by layer", f"{r.visual_tokens_nominal:.0f}", _by_layer(r.visual_tokens), "")
    table.add_row("first logits", "", "", f"differ by at most {r.max_logit_difference:.3g}")
    return table


def _by_layer(tokens: Sequence[float]) -> str:
    """576 576 288 288 -> '576 x2, 288 x2'."""
    runs: list[tuple[float, int]] = []
    for n in tokens:
        if runs and runs[-1][0] == n:
            runs[-1] = (n, runs[-1][1] + 1)
        else:
            runs.append((n, 1))
    return ", ".join(f"{n:g} x{times}" for n, times in runs)


def _short(flops: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if flops < 1000:
            return f"{flops:.3g} {unit}".strip()
        flops /= 1000
    return f"{flops:.3g} P"
