"""Pictures of results: accuracy against compute, and which patches of a picture survive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vlmaccel.run import Modality
from vlmaccel.stats import Stats

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow; shapes and dashes say it again
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX*"
BASELINES = {"random": "-", "uniform": "--", "pool": ":"}
GREY = "#6e6e6e"
DARK, DIMMED = 45.0, 0.8  # how dark, and how far a dropped patch goes there
DPI = 150


class Point(NamedTuple):
    """x, y and the half-width of y's error bar (0: none)."""

    x: float
    y: float
    error: float = 0.0


def accuracy_plot(curves: Mapping[str, Sequence[Point]], level: float, title: str, xlabel: str, ylabel: str) -> Figure:
    """A line a method through its budgets, labelled where compute is lowest, and the unpatched level.

    The baselines of `BASELINES` are grey. x and y are shares, 0 to 1; they are shown in percent.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * level, color="black", linewidth=1, linestyle=(0, (6, 3)))
    labels = []
    methods = [name for name in curves if name not in BASELINES]
    for name, points in curves.items():
        points = sorted(points)
        x, y, error = (100 * np.array(points, dtype=float)).T
        baseline = name in BASELINES
        color = GREY if baseline else COLORS[methods.index(name) % len(COLORS)]
        marker = MARKERS[list(curves).index(name) % len(MARKERS)]
        line = BASELINES.get(name, "-")
        axes.errorbar(
            x,
            y,
            error if error.any() else None,
            color=color,
            marker=marker,
            markersize=5,
            linestyle=line,
            linewidth=1.2 if baseline else 1.8,
            capsize=2,
        )
        labels.append((float(x[0]), float(y[0]), name, color))
    left, right = axes.get_xlim()
    axes.set_xlim(left - 0.28 * (right - left), right)  # room for the names
    axes.annotate(f"unpatched\n{100 * level:.1f}", (1.01, 100 * level), xycoords=("axes fraction", "data"), va="center")
    _label_lines(axes, labels)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure


def _label_lines(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Names left of the lines' first points, moved apart so that they can be read."""
    bottom, top = axes.get_ylim()
    gap = 0.052 * (top - bottom)
    labels = sorted(labels, key=lambda label: label[1])
    places: list[float] = []
    for _, y, _, _ in labels:
        places.append(max(y, places[-1] + gap) if places else y)
    if places:  # the pile grows upwards: move it back around its lines, but not below the axes
        shift = min(float(np.mean(places) - np.mean([y for _, y, _, _ in labels])), places[0] - bottom - gap / 2)
        places = [place - max(shift, 0) for place in places]
    start = min((x for x, _, _, _ in labels), default=0)
    left, right = axes.get_xlim()
    for (x, y, name, color), place in zip(labels, places, strict=True):
        axes.annotate(
            name,
            (x, y),
            (start - 0.05 * (right - left), place),
            color=color,
            ha="right",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )


def survivors(stats: Stats, picture: Image.Image, sample: int = 0, image: int = 0) -> list[tuple[int, np.ndarray]]:
    """What is left of a picture at every stage: (decoder layer, uint8 pixels (H, W, 3)).

    Dropped patches are dark; patches that were merged have the mean color of their group.

    stats: of the prefill. sample, image: number of the sample in the batch, and of the picture in the sample.
    picture: as the model saw it (cropped, if its processor crops).
    """
    tokens = stats.token_map
    here = (tokens.modality[sample] == Modality.IMAGE) & (tokens.image[sample] == image)
    here &= tokens.grid[sample, :, 0] == 0  # the whole picture, not its high-resolution crops
    index = here.nonzero()[:, 0]
    if not len(index):
        raise ValueError(f"sample {sample} has no picture {image} whose patches lie in a grid")
    row, column = tokens.grid[sample, index, 1:].T.cpu().numpy()
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    patch = max(4, round(max(picture.size) / max(rows, columns)))
    pixels = np.asarray(picture.convert("RGB").resize((columns * patch, rows * patch)), dtype=float)
    blocks = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)[row, column]
    result = []
    for stage in stats.stages:
        group = stage.group[sample, index].cpu().numpy()
        shown = blocks + DIMMED * (DARK - blocks)
        for slot, members in zip(*np.unique(group[group >= 0], return_counts=True), strict=True):
            together = blocks[group == slot]
            shown[group == slot] = together if members == 1 else together.mean((0, 1, 2))
        grid = np.full((rows, columns, patch, patch, 3), 255.0)
        grid[row, column] = shown
        whole = grid.swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)
        result.append((stage.layer, whole.round().astype(np.uint8)))
    return result


class Panel(NamedTuple):
    """A picture with the line above it."""

    title: str
    pixels: np.ndarray


def survivors_plot(rows: Sequence[tuple[str, Sequence[Panel]]]) -> Figure:
    """Rows of panels; each row has a line of text above it (a question and its answers)."""
    columns = max(len(panels) for _, panels in rows)
    figure = Figure(figsize=(1.75 * columns, 2.35 * len(rows)), layout="constrained")
    parts = np.atleast_1d(np.array(figure.subfigures(len(rows), 1), dtype=object))
    for part, (text, panels) in zip(parts, rows, strict=True):
        part.suptitle(text, x=0.01, ha="left", fontsize=10)
        for axes, panel in zip(part.subplots(1, columns, squeeze=False)[0], panels, strict=False):
            axes.imshow(panel.pixels, interpolation="nearest")
            axes.set_title(panel.title, fontsize=8)
        for axes in part.axes:
            axes.set_axis_off()
    return figure


def training_plot(log: Sequence[Mapping[str, float]], level: float) -> Figure:
    """Accuracy (percent, with the unpatched model's level, 0 to 1) over the steps of a training, and below it the loss."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.axhline(100 * level, color="black", linewidth=1, linestyle=(0, (6, 3)))
    above.annotate(
        f"unpatched\n{100 * level:.1f}", (1.01, 100 * level), xycoords=("axes fraction", "data"), va="center"
    )
    above.plot(
        [row["step"] for row in log], [100 * row["accuracy"] for row in log], "o-", color=COLORS[0], markersize=4
    )
    above.set_ylabel("accuracy, %")
    rows = [row for row in log if "loss" in row]
    below.plot([row["step"] for row in rows], [row["loss"] for row in rows], "s-", color=COLORS[1], markersize=4)
    below.set_ylabel("loss")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG, and say where."""
    figure.savefig(path, dpi=DPI)
    return path
