"""The table and JSON of `vlmaccel eval text`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vlmaccel.evals.text_result import UNPATCHED, TextResult


def table(result: TextResult) -> Table:
    """A line a way; `notes` tell what the columns are."""
    report = result.report()
    settings, ways = report["settings"], report["ways"]
    lengths = list(ways[UNPATCHED]["needles"])
    scored, timed = bool(result.perplexities), result.measured is not None
    title = f"{settings.get('model', '')}, {report['machine']['dtype']}, {settings.get('text', '')}"
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    made.add_column("way")
    names = ["ppl", "to unpatched", "KV %"] if scored else []
    names += [f"needle {length} (KV %)" for length in lengths]
    for name in [*names, *(["decode, ratio"] if timed else [])]:
        made.add_column(name, justify="right", no_wrap=True)
    for way, row in ways.items():
        cells = _perplexity(row["perplexity"], way == UNPATCHED) if scored else []
        cells += [_needle(row["needles"][length]) for length in lengths]
        made.add_row(way, *cells, *([_speed(row["speed"], way == UNPATCHED)] if timed else []))
    return made


def _perplexity(row: Mapping[str, Any], base: bool) -> list[str]:
    error = "" if row["change_error"] is None else f" ± {100 * row['change_error']:.2f}"
    change = "-" if base else f"{100 * row['change']:+.2f}%{error}"
    kv = f"{100 * row['kv_bytes'] / row['kv_bytes_full']:.1f}" if row["kv_bytes_full"] else "-"
    return [f"{row['ppl']:.3f}", change, kv]


def _needle(row: Mapping[str, Any]) -> str:
    kv = f" ({100 * row['kv_bytes'] / row['kv_bytes_full']:.1f})" if row["kv_bytes_full"] else ""
    return f"{row['hits']}/{row['needles']}{kv}"


def _speed(row: Mapping[str, Any], base: bool) -> str:
    ratio = row["decode_speedup"]
    return "1" if base else f"{ratio['median']:.2f}x ({ratio['low']:.2f}..{ratio['high']:.2f})"


def notes(result: TextResult) -> list[str]:
    """What the columns are, and what the numbers were measured on."""
    report = result.report()
    settings, machine, base = report["settings"], report["machine"], report["ways"][UNPATCHED]
    lines = []
    if scored := base["perplexity"]:
        steps = "one" if settings["step"] == 1 else f"{settings['step']}"
        before = settings["context"] - scored["tokens"]
        how = f", {steps} at a time, behind a prefill of {before}" if settings["prefill"] else " in one forward"
        lines += [
            f"ppl: perplexity of {scored['tokens']} tokens{how}, {len(scored['losses'])} windows; to unpatched: ± one "
            "standard error over the windows",
            *(["KV %: bytes of the KV cache after the prefill, of an unpatched one's"] if settings["prefill"] else []),
        ]
    if base["needles"]:
        lines.append("needle: answers with the number hidden in so many tokens; KV % after the prompt")
    if base["speed"]:
        shown = f"median (smallest..largest) of {settings['turns']} turns, {machine['clock']} time"
        rate = f"unpatched: {base['speed']['tokens_per_second']:.1f} tokens a second of waiting"
        lines.append(f"decode: rate behind {settings['timed_prompt']} tokens over unpatched, {shown}; {rate}")
    return [*lines, f"{machine['name']}, {machine['threads']} thread(s), torch {machine['torch']}"]


def write(result: TextResult, file: Path) -> Path:
    """The report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result.report(), indent=2) + "\n", encoding="utf-8")
    return file
