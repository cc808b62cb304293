"""Methods at several budgets, on one set of collage questions: accuracy, loyalty, and what they really cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

import vlmaccel
from vlmaccel.evals.demo import BATCH, CORE, Progress, Task, ask, encode, subset
from vlmaccel.evals.timing import machine
from vlmaccel.evals.vqa import VQAResult, load, prepare
from vlmaccel.hooks import Method

Cost = Literal["kv", "visual"]
MEANS: dict[Cost, str] = {
    "kv": "the bytes held of an unpatched cache",
    "visual": "the visual tokens that are left, mean over layers",
}


@dataclass(frozen=True)
class Candidate:
    """A method at a budget; several of the same group, name and budget, such as the seeds of a random one, are averaged.

    group: of rows that can be compared.
    """

    name: str
    budget: float
    method: Method
    group: str = ""


@dataclass(frozen=True)
class Cell:
    """One method at one budget, mean over its `settings`. core: accuracy on the questions that name one thing; describe: on
    "describe the image.", whose long answers need picture and cache most. loyalty: share of all questions answered as the
    unpatched model does. kv: bytes held after the prefill, of those of the unpatched cache. visual: visual tokens at a decoder
    layer's input, mean over layers, of all. flops: of the decoder's prefill, of the unpatched model's."""

    group: str
    method: str
    settings: tuple[str, ...]
    budget: float
    core: float
    describe: float
    loyalty: float
    kv: float
    visual: float
    flops: float


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
    choose: Callable[[int, int], Sequence[Candidate]],
    questions: int = 500,
    dtype: str = "float32",
    seed: int = 0,
) -> Sweep:
    """Answer collage questions with every candidate.

    model: trained on them, such as the shipped ones. choose: the candidates, of a decoder's depth and the number of a picture's
    visual tokens. seed: of the collages.
    """
    loaded, processor = load(str(model), dtype)
    samples = subset(questions, seed)[0]
    progress.start("looking at the pictures", len(samples))
    task = encode(loaded, processor, samples, progress)
    visual = len(task.batches[0].inputs["mm_encoder_outputs"]["image"].pooler_output[0])
    candidates = choose(loaded.config.get_text_config().num_hidden_layers, visual)
    whole = Task(samples, list(prepare(processor, samples, BATCH)))  # for methods that look into the vision tower
    progress.start("answering", len(samples) * (1 + len(candidates)))
    base = ask(loaded, processor, task, progress)
    results: dict[tuple[str, str, float], list[tuple[Method, VQAResult]]] = {}
    for candidate in candidates:
        with vlmaccel.patched(loaded, candidate.method):
            result = ask(loaded, processor, whole if candidate.method.sees_patches else task, progress)
        results.setdefault((candidate.group, candidate.name, candidate.budget), []).append((candidate.method, result))
    cells = [_cell(*key, of_key, base.texts()) for key, of_key in results.items()]
    return Sweep(str(model), len(samples), *accuracies(base), tuple(cells), machine(loaded))


def _cell(
    group: str, name: str, budget: float, results: Sequence[tuple[Method, VQAResult]], base: dict[str, str]
) -> Cell:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    costs = [result.cost() for _, result in results]
    core, describe = (mean(values) for values in zip(*(accuracies(result) for _, result in results), strict=True))
    return Cell(
        group,
        name,
        tuple(repr(method) for method, _ in results),
        budget,
        core,
        describe,
        mean([result.loyalty(base) for _, result in results]),
        mean([cost["kv_bytes"] / cost["kv_bytes_full"] for cost in costs]),
        mean([cost["visual_tokens"] / cost["nominal_visual_tokens"] for cost in costs]),
        mean([cost["flops"] / cost["flops_full"] for cost in costs]),
    )


def accuracies(result: VQAResult) -> tuple[float, float]:
    """Accuracy, 0 to 1, on the questions that name one thing, and on those that ask for a description."""
    core = [answer.accuracy for answer in result.answers if answer.kind in CORE]
    other = [answer.accuracy for answer in result.answers if answer.kind not in CORE]
    return sum(core) / max(1, len(core)), sum(other) / max(1, len(other))


def render(sweep: Sweep, title: str, cost: Cost) -> Table:
    """A row for each method, a column for each budget: accuracy / description / loyalty (cost)."""
    budgets = sorted({cell.budget for cell in sweep.cells}, reverse=cost == "visual")
    facts = sweep.machine
    table = Table(
        title=f"{title} of {Path(sweep.model).name}, {sweep.questions} collage questions",
        caption=(
            f"Per cent: accuracy on questions that name one thing (unpatched {100 * sweep.core:.1f}), on descriptions "
            f"(unpatched {100 * sweep.describe:.1f}), answers equal to the unpatched model's, and in brackets {MEANS[cost]}. "
            f"{facts['dtype']}, {facts['name']}"
        ),
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method")
    for budget in budgets:
        table.add_column(f"{budget:.0%}", justify="right")
    for group in dict.fromkeys(cell.group for cell in sweep.cells):
        if group:
            table.add_section()
            table.add_row(f"[b]{group}")
        cells = [cell for cell in sweep.cells if cell.group == group]
        for name in dict.fromkeys(cell.method for cell in cells):
            row = {cell.budget: _text(cell, cost) for cell in cells if cell.method == name}
            table.add_row(name, *(row.get(budget, "") for budget in budgets))
    return table


def _text(cell: Cell, cost: Cost) -> str:
    shares = (cell.core, cell.describe, cell.loyalty)
    return " / ".join(f"{100 * share:.1f}" for share in shares) + f" ({100 * getattr(cell, cost):.1f})"
