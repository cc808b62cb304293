"""Methods on the KV cache at several budgets: accuracy, loyalty and the bytes that are really held, on one set of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import vlmaccel
from vlmaccel.evals.demo import CORE, Progress, ask, encode, subset
from vlmaccel.evals.timing import machine
from vlmaccel.evals.vqa import VQAResult, load
from vlmaccel.hooks import Method
from vlmaccel.methods import (
    H2O,
    AdaKV,
    EntropyEviction,
    HessianEviction,
    LookM,
    PyramidKV,
    RandomEviction,
    Sensitivity,
    SnapKV,
    StreamingLLM,
    VLCache,
)

BUDGETS = (0.01, 0.05, 0.1, 0.2, 0.5)
WINDOW = 8  # a question of the shipped model's tasks has few tokens


def default_methods() -> tuple[Method, ...]:
    """What is compared if nothing else is said."""
    return (
        RandomEviction(),
        StreamingLLM(),
        H2O(),
        SnapKV(window=WINDOW),
        PyramidKV(window=WINDOW),
        AdaKV(window=WINDOW),
        VLCache(),
        LookM(),
        Sensitivity(window=WINDOW),
        HessianEviction(window=WINDOW),
        EntropyEviction(window=WINDOW),
    )


@dataclass(frozen=True)
class Cell:
    """One method at one budget. core: accuracy on the questions that name one thing; describe: on "describe the image.",
    whose long answers need the cache most. loyalty: share of all questions answered as the unpatched model does. kv: bytes
    held after the prefill, of those of the unpatched cache."""

    method: str
    settings: str
    budget: float
    core: float
    describe: float
    loyalty: float
    kv: float


@dataclass(frozen=True)
class Sweep:
    """All cells, the unpatched model's accuracies, and what it was measured on."""

    model: str
    questions: int
    core: float
    describe: float
    cells: tuple[Cell, ...]
    machine: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)


def run_sweep(
    progress: Progress,
    model: str | Path,
    methods: Sequence[Any],
    budgets: Sequence[float] = BUDGETS,
    questions: int = 500,
    dtype: str = "float32",
    seed: int = 0,
) -> Sweep:
    """Answer collage questions with every method at every budget.

    model: a LLaVA trained on them, such as the shipped one. methods: with a field `budget`, whatever that is. seed: of the
    collages. Raises ValueError for a method without a budget or a budget that is none, before the model is loaded.
    """
    for method in methods:
        if not hasattr(method, "budget"):
            raise ValueError(f"{method.name} has no budget to vary")
    variants = [replace(method, budget=budget) for method in methods for budget in budgets]
    loaded, processor = load(str(model), dtype)
    samples = subset(questions, seed)[0]
    progress.start("looking at the pictures", len(samples))
    task = encode(loaded, processor, samples, progress)
    progress.start("answering", len(samples) * (1 + len(variants)))
    base = ask(loaded, processor, task, progress)
    cells = []
    for method in variants:
        with vlmaccel.patched(loaded, method):
            result = ask(loaded, processor, task, progress)
        cost = result.cost()
        core, describe = accuracies(result)
        loyalty = result.loyalty(base.texts())
        kv = cost["kv_bytes"] / cost["kv_bytes_full"]
        cells.append(Cell(method.name, repr(method), method.budget, core, describe, loyalty, kv))
    return Sweep(str(model), len(samples), *accuracies(base), tuple(cells), machine(loaded))


def accuracies(result: VQAResult) -> tuple[float, float]:
    """Accuracy, 0 to 1, on the questions that name one thing, and on those that ask for a description."""
    core = [answer.accuracy for answer in result.answers if answer.kind in CORE]
    other = [answer.accuracy for answer in result.answers if answer.kind not in CORE]
    return sum(core) / max(1, len(core)), sum(other) / max(1, len(other))


def render(sweep: Sweep) -> Table:
    """A row for each method, a column for each budget: accuracy / description / loyalty."""
    budgets = sorted({cell.budget for cell in sweep.cells})
    facts = sweep.machine
    table = Table(
        title=f"KV cache of {Path(sweep.model).name}, {sweep.questions} collage questions",
        caption=(
            f"Per cent: accuracy on questions that name one thing (unpatched {100 * sweep.core:.1f}), on descriptions "
            f"(unpatched {100 * sweep.describe:.1f}), answers equal to the unpatched model's, and in brackets the bytes held "
            f"of an unpatched cache. {facts['dtype']}, {facts['name']}"
        ),
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method")
    for budget in budgets:
        table.add_column(f"{budget:.0%}", justify="right")
    for name in dict.fromkeys(cell.method for cell in sweep.cells):
        row = {cell.budget: cell for cell in sweep.cells if cell.method == name}
        table.add_row(name, *(_text(row[budget]) for budget in budgets))
    return table


def _text(cell: Cell) -> str:
    shares = (cell.core, cell.describe, cell.loyalty)
    return " / ".join(f"{100 * share:.1f}" for share in shares) + f" ({100 * cell.kv:.1f})"
