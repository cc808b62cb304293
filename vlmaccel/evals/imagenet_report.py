"""The table, JSON and plot of `vlmaccel eval imagenet`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vlmaccel.evals.imagenet_result import UNPATCHED, ImageNetResult

COLUMNS = ("way", "tokens left", "FLOPs %", "top-1", "top-5", "loyal", "images/s, ratio")


def table(result: ImageNetResult) -> Table:
    """A line a way, the lines of a curve together; `notes` tell what the columns are."""
    report = result.report()
    made = Table(title=_title(report), box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, name in enumerate(COLUMNS):
        made.add_column(name, justify="right" if i else "left", no_wrap=True)
    curve = UNPATCHED
    full = next(iter(result.costs.values())).tokens[0] if result.costs else None
    for way, row in report["ways"].items():
        if row["curve"] != curve:
            made.add_section()
            curve = row["curve"]
        left = row["tokens"][-1] if row["tokens"] else full
        made.add_row(way, "-" if left is None else str(left), *_cells(row, way == UNPATCHED))
    return made


def _cells(row: Mapping[str, Any], base: bool) -> list[str]:
    speed = row["speed"]
    shown = f"{speed['median']:.2f}x ({speed['low']:.2f}..{speed['high']:.2f})" if speed else "-"
    return [
        f"{100 * row['flops_ratio']:.1f}",
        f"{100 * row['top1']:.2f} ± {100 * row['top1_error']:.2f}",
        f"{100 * row['top5']:.2f}",
        f"{100 * row['loyalty']:.2f}",
        "1" if base else shown,
    ]


def _title(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    return f"{settings['model']}, {settings['dtype']}, {report['pictures']} pictures of {settings['data']}"


def notes(result: ImageNetResult) -> list[str]:
    """What the columns are, and what the numbers were measured on."""
    report = result.report()
    machine, rate = report["machine"], report["ways"][UNPATCHED]["images_per_second"]
    timed = f"median (smallest..largest) of {report['timed_batches']} batches, in turn, {machine['clock']} time"
    unpatched = f"; unpatched: {rate['median']:.0f} a second of waiting, in one process" if rate else ""
    return [
        "tokens left: behind the last block; FLOPs: of the blocks, percent of unpatched",
        "top-1, top-5: percent of the pictures, ± one standard error; loyal: the same top-1 class as unpatched",
        f"images/s: over the unpatched model's, {timed}{unpatched}",
        *(
            ["random: as many tokens merged in as many blocks, drawn by lot"]
            if "random" in result.curves.values()
            else []
        ),
        f"{machine['name']}, {machine['processes']} process(es) of {machine['threads']} thread(s), torch {machine['torch']}",
    ]


def write(result: ImageNetResult, out: Path) -> list[Path]:
    """result.json and plot.png in the folder `out`; needs matplotlib."""
    from vlmaccel.plots import save

    data = out / "result.json"
    data.write_text(json.dumps(result.report(), indent=2) + "\n", encoding="utf-8")
    return [data, save(plot(result), out / "plot.png")]


def plot(result: ImageNetResult) -> Any:
    """A matplotlib figure: top-1 accuracy with its standard error against FLOPs, a line a curve, and the unpatched level."""
    from vlmaccel.plots import Point, accuracy_plot

    report = result.report()
    curves: dict[str, list[Point]] = {}
    for row in report["ways"].values():
        if row["curve"] != UNPATCHED:
            curves.setdefault(row["curve"], []).append(Point(row["flops_ratio"], row["top1"], row["top1_error"]))
    level = report["ways"][UNPATCHED]["top1"]
    return accuracy_plot(curves, level, _title(report), "FLOPs of the blocks, percent of unpatched", "top-1, percent")
