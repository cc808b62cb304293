"""Pictures of merging in a vision tower: which patches became one token, as in the ToMe paper (arXiv 2210.09461)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from itertools import count

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vlmaccel.plots import DARK, DIMMED, DPI, Panel
from vlmaccel.stats import TowerStats

PANEL, LEAST_CELL = 448, 10  # pixels of a panel's longer side, about; pixels of a patch's side, at least
LINE = 2  # pixels
DEFAULT_BLOCKS = 4
GOLDEN = (5**0.5 - 1) / 2  # steps of this share of the colour circle never come back, and fill it evenly
HUE_GAP = 0.15  # of the colour circle, between neighbours
BRIGHT = 140.0  # fills that are lighter than this get a dark outline
GAP, TITLE, TEXT = 12, 30, 34  # pixels between panels, and above them for their titles and for a row's text


def merged_groups(
    stats: TowerStats, picture: Image.Image, sample: int = 0, blocks: Sequence[int] | None = None
) -> list[tuple[int, np.ndarray]]:
    """The groups behind each of the `blocks`, drawn on the picture: (block, uint8 pixels (H, W, 3)).

    A group of several patches has the mean colour of its pixels, and inside it an outline where it meets another group;
    patches that are alone are left as they are, and dropped ones are dark.

    picture: as the tower saw it (cropped, if its transform crops), of any resolution. sample: its number in the batch.
    blocks: 0-based; default: a few spread evenly up to the last one that merged.
    Raises ValueError for a picture or block that is not there, and if the patches do not form a grid.
    """
    if not 0 <= sample < stats.batch:
        raise ValueError(f"there is no picture {sample}: the tower was given {stats.batch}, numbered from 0")
    chosen = default_blocks(stats) if blocks is None else blocks
    for block in chosen:
        if not 0 <= block < stats.blocks:
            raise ValueError(f"there is no block {block}: blocks of this tower are 0 to {stats.blocks - 1}")
    patches = stats.tokens[0] - stats.prefix
    pixels = enlarged(picture, patches, stats.image)
    rows, columns, _ = _grid(patches, *(stats.image or (picture.height, picture.width)))
    result = []
    for block in chosen:
        before = [stage for stage in stats.stages if stage.layer <= block]
        shown = pixels
        if before:
            group = before[-1].group[sample, stats.prefix :].reshape(rows, columns).cpu().numpy()
            shown = _draw(pixels, group)
        result.append((block, shown))
    return result


def default_blocks(stats: TowerStats) -> list[int]:
    """A few blocks, spread evenly, the last of them the last one that merged (of the tower, if none did)."""
    depth = stats.stages[-1].layer + 1 if stats.stages else stats.blocks
    return sorted({max(0, round(depth * i / DEFAULT_BLOCKS) - 1) for i in range(1, DEFAULT_BLOCKS + 1)})


def enlarged(picture: Image.Image, patches: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """All of a picture that lies in patches, at the size at which it is drawn: uint8 pixels (H, W, 3).

    picture: as the model saw it. patches: how many square ones were made of it, row by row. size: (height, width) in
    pixels that the model was given; None: those of `picture`. Raises ValueError if they do not form a grid.
    """
    height, width = size or (picture.height, picture.width)
    rows, columns, side = _grid(patches, height, width)
    cell = max(LEAST_CELL, round(PANEL / max(rows, columns)))
    # pixels at the right and at the bottom that are too few for another patch are not seen
    seen = (0, 0, columns * side * picture.width / width, rows * side * picture.height / height)
    shown = picture.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC, box=seen)
    return np.asarray(shown)


def _grid(patches: int, height: int, width: int) -> tuple[int, int, int]:
    """Rows and columns of the square patches of a picture, and a patch's side, in pixels."""
    for rows in range(1, patches + 1):
        columns = patches // rows
        # at most one number of rows fits: more rows need smaller patches, and of these there are more in a row, too
        side = min(height // rows, width // columns)
        if rows * columns == patches and side and (height // side, width // side) == (rows, columns):
            return rows, columns, side
    raise ValueError(f"{patches} patches do not form a grid of squares on a picture of {width} x {height} pixels")


def _draw(pixels: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The picture (rows * cell, columns * cell, 3) with the groups (rows, columns) on it."""
    cell = len(pixels) // len(group)
    label = group.repeat(cell, 0).repeat(cell, 1)
    edge = _edges(label)
    shown = pixels.astype(float)
    fills = {}
    for slot, patches in zip(*np.unique(group, return_counts=True), strict=True):
        inside = label == slot
        if slot < 0:
            shown[inside] += DIMMED * (DARK - shown[inside])
        elif patches > 1:
            fills[int(slot)] = shown[inside] = pixels[inside].mean(0)
    for slot, color in _outlines(group, fills).items():
        shown[edge & (label == slot)] = color
    return shown.round().astype(np.uint8)


def _edges(label: np.ndarray) -> np.ndarray:
    """(H, W) bool, where another label is at most `LINE` pixels away, sideways or diagonally."""
    around = np.pad(label, LINE, mode="edge")
    height, width = label.shape
    edge = np.zeros(label.shape, dtype=bool)
    for down in (0, LINE, 2 * LINE):  # labels are wider than LINE, so nothing hides between these
        for right in (0, LINE, 2 * LINE):
            edge |= around[down : down + height, right : right + width] != label
    return edge


def _outlines(group: np.ndarray, fills: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """A colour (3,) for each group in `fills`, all different, and those of neighbours far apart."""
    near: dict[int, set[int]] = defaultdict(set)
    for a, b in ((group[:, 1:], group[:, :-1]), (group[1:], group[:-1])):
        for one, other in zip(a.flat, b.flat, strict=True):
            near[int(one)].add(int(other))
            near[int(other)].add(int(one))
    hues: dict[int, float] = {}
    circle = (GOLDEN * step % 1 for step in count())
    for slot in fills:
        taken = [hues[other] for other in near[slot] if other in hues]
        hue, gap = next(circle), HUE_GAP
        while any(abs((hue - other + 0.5) % 1 - 0.5) < gap for other in taken):
            hue, gap = next(circle), 0.9 * gap  # a group with many neighbours leaves no wide gap
        hues[slot] = hue
    colors = {}
    for slot, fill in fills.items():
        light = fill @ (0.299, 0.587, 0.114) > BRIGHT
        colors[slot] = 255 * np.array(hsv_to_rgb(hues[slot], 0.9, 0.6 if light else 1.0))
    return colors


def groups_plot(rows: Sequence[tuple[str, Sequence[Panel]]], columns: int = 5) -> Figure:
    """Rows of panels with their titles, each row with a line of text above it and on several lines if it is long.

    Every panel is drawn pixel for pixel by `vlmaccel.plots.save`, so that outlines stay as thin as they are.
    """
    lines = [
        (text if start == 0 else "", panels[start : start + columns])
        for text, panels in rows
        for start in range(0, len(panels), columns)
    ]
    widest = max(panel.pixels.shape[1] for _, panels in lines for panel in panels)
    heights = [(TEXT if text else 0) + TITLE + max(len(panel.pixels) for panel in panels) for text, panels in lines]
    width = GAP + max(len(panels) for _, panels in lines) * (widest + GAP)
    height = sum(heights) + GAP * len(lines)
    figure = Figure(figsize=(width / DPI, height / DPI))
    top = 0
    for (text, panels), whole in zip(lines, heights, strict=True):
        if text:
            figure.text(GAP / width, 1 - (top + TEXT * 0.75) / height, text, fontsize=9)
        below = top + (TEXT if text else 0) + TITLE
        for i, panel in enumerate(panels):
            high, wide = panel.pixels.shape[:2]
            left = GAP + i * (widest + GAP)
            axes = figure.add_axes((left / width, 1 - (below + high) / height, wide / width, high / height))
            axes.imshow(panel.pixels, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            axes.set_title(panel.title, fontsize=8, loc="left", pad=4)
        top += whole + GAP
    return figure
