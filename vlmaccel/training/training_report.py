"""What a training did: a table, a log and its curves."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from vlmaccel.training.fitting import Log


def table(log: Log, level: float) -> Table:
    """Loss and accuracy at every evaluation; level: accuracy of the unpatched model before any training."""
    rows = Table("step", "loss", "accuracy", box=None, padding=(0, 2))
    rows.add_row("unpatched", "", f"{level:.2%}")
    for row in log:
        rows.add_row(str(row["step"]), f"{row['loss']:.4f}" if "loss" in row else "", f"{row['accuracy']:.2%}")
    return rows


def write(log: Log, level: float, folder: Path) -> list[Path]:
    """`log.json` and, where matplotlib is installed, `curves.png` in the folder; says which."""
    paths = [folder / "log.json"]
    paths[0].write_text(json.dumps({"unpatched": level, "log": log}, indent=2) + "\n")
    try:
        from vlmaccel.plots import save, training_plot
    except ImportError:
        return paths
    return [*paths, save(training_plot(log, level), folder / "curves.png")]
