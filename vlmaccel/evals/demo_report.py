"""The demo's table, JSON and pictures."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.table import Table

import vlmaccel
from vlmaccel.evals.budgets import Variant
from vlmaccel.evals.demo import MAX_NEW_TOKENS, Demo
from vlmaccel.evals.samples import VQASample
from vlmaccel.evals.vqa import answer, prepare
from vlmaccel.methods import make
from vlmaccel.plots import Panel, Point, accuracy_plot, save, survivors, survivors_plot

COLUMNS = (
    "method",
    "kept @ layer",
    "tokens",
    "FLOPs",
    "collage",
    "color of",
    "describe",
    "easy",
    "loyal",
    "first token",
    "decode",
    "KV KiB",
)
SHOWN = ("pyramiddrop", "fastv", "neighbour-cosine", "random", "pool")  # in the picture of surviving patches
COLLAGES = 3


def cells(report: Mapping[str, Any]) -> list[list[tuple[str, ...]]]:
    """What is under `COLUMNS`: the unpatched model, then one line a method, in groups of equal budget."""
    base = report["unpatched"]
    groups = [[("unpatched", "100 %", *_shares(base | {"loyalty": 1.0}), "1", "1", _kib(base))]]
    kept = None
    for row in report["rows"]:
        if row["kept"] != kept:
            groups.append([])
            kept = row["kept"]
        speed = [f"{row[f'{phase}_speedup']['median']:.2f}x" for phase in ("prefill", "decode")]
        groups[-1].append((row["method"], _stages(row, report), *_shares(row), *speed, _kib(row)))
    return groups


def title(report: Mapping[str, Any]) -> str:
    questions = report["questions"]
    asked = f"{questions['collage']} collage and {questions['easy-vqa']} easy-VQA questions, {report['split']}"
    return f"{report['settings']['checkpoint']}: {asked}"


def table(report: Mapping[str, Any]) -> Table:
    """The `cells` for a terminal; `notes` tell what the columns are."""
    result = Table(title=title(report), box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, name in enumerate(COLUMNS):
        result.add_column(name, justify="left" if i < 2 else "right", max_width=None if i < 2 else 8, no_wrap=i == 0)
    for group in cells(report):
        for line in group:
            result.add_row(*line)
        result.add_section()
    return result


def markdown(report: Mapping[str, Any]) -> str:
    """Table and notes for a README."""
    rule = ["---", "---", *["--:"] * (len(COLUMNS) - 2)]
    lines = [COLUMNS, rule, *(line for group in cells(report) for line in group)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{title(report)}**\n\n{rows}\n\n" + "\n".join(f"- {note}" for note in notes(report)) + "\n"


def _stages(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    stages = make(row["method"], **row["runs"][0]["options"]).stages(report["settings"]["layers"])  # type: ignore[attr-defined]
    shares = "/".join(f"{100 * share:.0f}" for share in stages.values())
    return f"{shares} % @ {'/'.join(map(str, stages))}"


def _shares(row: Mapping[str, Any]) -> list[str]:
    kinds = row["kinds"]
    shares = (row["flops_ratio"], row["core"], kinds.get("color-of-shape"), kinds.get("describe"))
    shown = ["-" if share is None else f"{100 * share:.1f}" for share in (*shares, row["easy"], row["loyalty"])]
    return [f"{row['visual_tokens']:.0f}", *shown]


def _kib(row: Mapping[str, Any]) -> str:
    return f"{row['kv_bytes'] / 1024:.0f}"


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the table's columns are, and what the numbers were measured on."""
    settings, machine, base = report["settings"], report["machine"], report["unpatched"]
    counts = base["counts"]
    seeds = max(len(row["runs"]) for row in report["rows"])
    core = _core(report)
    errors = [100 * standard_error(share, core) for share in (base["core"], 0.6)]
    return [
        f"tokens: visual tokens at a decoder layer's input, mean over {settings['layers']} layers: this is what is made equal",
        "FLOPs: decoder prefill, percent of unpatched, 4nd^2 + 2n^2d + 3ndm a layer, without the cost of scoring",
        f"collage: percent right of {core} questions that name one thing; one standard error is {errors[0]:.1f} to {errors[1]:.1f}",
        f"color of: {counts.get('color-of-shape', 0)} of these, 'what color is the circle?', which pruning hurts most",
        f"describe: {counts.get('describe', 0)} descriptions with every word right; easy: easy-VQA, a single big shape, a sanity floor",
        "loyal: collage answers equal to the unpatched model's, right or wrong",
        f"first token, decode: speed against unpatched, one question, in turn, median of {settings['turns']} turns "
        f"({machine['clock']} time); the first token waits for the vision tower too, which nothing here speeds up",
        f"KV: cache of one question after the prefill, {machine['dtype']}; random: mean of {seeds} seeds",
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']}",
    ]


def _core(report: Mapping[str, Any]) -> int:
    """How many collage questions name one thing."""
    return sum(count for kind, count in report["unpatched"]["counts"].items() if kind != "describe")


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent questions that were answered right."""
    return sqrt(share * (1 - share) / max(count, 1))


def write(demo: Demo, out: Path) -> list[Path]:
    """demo.json, demo.md, demo-accuracy.png and demo-patches.png in the folder `out`, which is made if it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    data, text = out / "demo.json", out / "demo.md"
    data.write_text(json.dumps(demo.report, indent=2) + "\n", encoding="utf-8")
    text.write_text(markdown(demo.report), encoding="utf-8")
    accuracy = save(accuracy_chart(demo.report), out / "demo-accuracy.png")
    return [data, text, accuracy, save(patches_chart(demo), out / "demo-patches.png")]


def accuracy_chart(report: Mapping[str, Any]) -> Figure:
    """Accuracy on the collage questions against FLOPs, a line a method; error bars over the seeds of `random`."""
    curves: dict[str, list[Point]] = {}
    for row in report["rows"]:
        curves.setdefault(row["method"], []).append(Point(row["flops_ratio"], row["core"], row["core_stdev"]))
    return accuracy_plot(
        curves,
        report["unpatched"]["core"],
        f"{report['settings']['checkpoint']}: {_core(report)} questions about collages, "
        f"{report['settings']['visual_tokens']} visual tokens",
        "decoder prefill FLOPs, percent of unpatched",
        "accuracy, percent",
    )


def patches_chart(demo: Demo) -> Figure:
    """Which patches survive at every stage, at the middle budget, on the first collages with a question for a color."""
    budgets = list(dict.fromkeys(variant.kept for variant in demo.variants))
    middle = budgets[len(budgets) // 2]
    chosen = [variant for variant in demo.variants if variant.kept == middle and variant.method in SHOWN]
    asked = [sample for sample in demo.samples if sample.kind == "color-of-shape"] or demo.samples
    one_each = list({sample.image_id: sample for sample in reversed(asked)}.values())[::-1]
    return survivors_plot([_survivors_row(demo, sample, chosen) for sample in one_each[:COLLAGES]])


def _survivors_row(demo: Demo, sample: VQASample, chosen: Sequence[Variant]) -> tuple[str, list[Panel]]:
    picture = sample.image if isinstance(sample.image, Image.Image) else Image.open(sample.image)
    batch = next(prepare(demo.processor, [sample], 1))

    def say() -> str:
        text = next(answer(demo.model, demo.processor, [batch], MAX_NEW_TOKENS))[0].answer
        return textwrap.shorten(text, 12, placeholder="...")

    panels = [Panel(f"all patches\n{say()}", np.asarray(picture))]
    for variant in chosen:
        with vlmaccel.patched(demo.model, make(variant.method, **variant.runs[0])), torch.inference_mode():
            text = say()
            stats = vlmaccel.stats(demo.model)
            assert isinstance(stats, vlmaccel.Stats)  # the demo's model has a decoder
            left = survivors(stats, picture)
        for layer, pixels in left:
            last = layer == left[-1][0]
            panels.append(Panel(f"{variant.method}\nlayer {layer}" + (f": {text}" if last else ""), pixels))
    return f"{sample.question} ({sample.answers[0]})", panels
