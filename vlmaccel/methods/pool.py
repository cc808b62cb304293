"""Average pooling of neighbouring tokens: the baseline that merging methods have to beat at an equal number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.merging import Merging
from vlmaccel.methods.selection import places


@dataclass(frozen=True)
class Pool(Merging):
    """Merge by averaging the tokens in each cell of a coarser grid (baseline).

    The coarser grid is the one nearest in shape that has at most int(N * ratio) cells, so the count can be a little
    below. Newline tokens of a mosaic are averaged with one another. Text, and images without a grid, pool along the line.

    layer (default 0, before the decoder), prop_attn (default off), and the others: see `Merging`.
    """

    name = "pool"

    layer: int = 0
    prop_attn: bool = False

    def join(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        return pool(places(at)[sample, index], at.tokens.grid[sample, index, 0], kept)


def pool(place: Tensor, view: Tensor, kept: int) -> Tensor:
    """(m,) int64, the cell that each of m tokens joins when at most `kept` may stay.

    place: (m, 2) row and column, column -1 for a newline. view: (m,) which grid of the image. Every view has its share.
    """
    label = torch.zeros(len(place), dtype=torch.long, device=place.device)
    for number in view.unique().tolist():
        here = view == number
        share = max(1, int(here.sum()) * kept // len(place))
        label[here] = cells(place[here], share) + int(label.max()) + 1
    return label


def cells(place: Tensor, kept: int) -> Tensor:
    """(m,) int64, cell of each place (m, 2) in the coarser grid of at most `kept` cells, newlines in cells of their own."""
    row, column = place.unbind(1)
    height, width = int(row.max()) - int(row.min()) + 1, int(column.max()) - max(int(column.min()), 0) + 1
    row, newline = row - row.min(), bool((column < 0).any())
    rows, columns = coarse_grid(height, width, kept, extra=int(newline))
    across = (column - column.clamp(min=0).min()) * columns // width
    return row * rows // height * (columns + 1) + torch.where(column < 0, columns, across)


def coarse_grid(height: int, width: int, kept: int, extra: int = 0) -> tuple[int, int]:
    """The grid of at most `kept` cells (with `extra` more in every row) that is nearest to using all, and to the shape."""

    def cost(rows: int, columns: int) -> float:
        return 1 - rows * (columns + extra) / kept + 0.1 * abs(log(rows * width / (columns * height)))

    grids = [(rows, min(width, kept // rows - extra)) for rows in range(1, min(height, kept) + 1)]
    grids = [(rows, columns) for rows, columns in grids if columns > 0]
    return min(grids, key=lambda grid: cost(*grid)) if grids else (1, 1)
