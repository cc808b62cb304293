"""Average pooling of neighbouring tokens: the baseline that merging methods have to beat at an equal number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.selection import SingleStage, droppable, places, segment_sizes
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality


@dataclass(frozen=True)
class Pool(SingleStage):
    """Merge by averaging the tokens in each cell of a coarser grid (baseline).

    A cell stands where its middle token stood. The coarser grid is the one nearest in shape that has at most int(N * ratio) cells, so the count can be a little
    below. Newline tokens of a mosaic are averaged with one another. Text, and images without a grid, pool along the line.

    layer (default 0, before the decoder), ratio (default 0.5), target, positions: see `SingleStage`.
    proportional: weigh a cell as its number of tokens in the attention (default off).
    """

    name = "pool"

    layer: int = 0
    proportional: bool = False

    @torch.no_grad()
    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        segment = droppable(at, self.target)
        if segment is None:
            return None
        budget = self.count(segment_sizes(at, self.target), self.ratio).tolist()
        place, view = places(at), at.tokens.grid[..., 0]
        n = segment.shape[1]
        representative = torch.arange(n, device=segment.device).repeat(segment.shape[0], 1)
        before = representative.clone()
        for sample, budgets in enumerate(budget):
            for number, kept in enumerate(budgets):
                index = (segment[sample] == number).nonzero().flatten()
                if len(index) > kept:
                    middle = pool(place[sample, index], view[sample, index], kept)
                    representative[sample, index] = index[middle] if kept else -1
        if torch.equal(representative, before):
            return None
        representative.masked_fill_(at.tokens.modality == Modality.PAD, -1)
        representative[:, -1] = n - 1
        return Reduction.merge_into(representative)


def pool(place: Tensor, view: Tensor, kept: int) -> Tensor:
    """(m,) int64, the token that stands for each of m tokens when at most `kept` may stay.

    place: (m, 2) row and column, column -1 for a newline. view: (m,) which grid of the image. Every view has its share.
    """
    middle = torch.arange(len(place), device=place.device)
    for number in view.unique().tolist():
        here = (view == number).nonzero().flatten()
        share = max(1, len(here) * kept // len(place))
        cell = cells(place[here], share)
        order = cell.argsort(stable=True)
        _, inverse, members = cell.unique(return_inverse=True, return_counts=True)
        centre = order[members.cumsum(0) - members + members // 2]
        middle[here] = here[centre[inverse]]
    return middle


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
