"""Redundancy of a token as its mean cosine similarity to its neighbours.

The form R_t = mean over neighbours i of sim(X_t, X_i), with any count T_l = T_0 (1 - alpha_l) kept at layer l, is
what surveys describe under the name of PyramidDrop, which works otherwise; it is a criterion of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.selection import SingleStage, droppable, places

OFFSETS = [(dr, dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if (dr, dc) != (0, 0)]


@dataclass(frozen=True)
class NeighbourCosine(SingleStage):
    """Drop once, ranked by the mean cosine similarity to the neighbours, least alike kept.

    Neighbours are the up to eight around a patch in its grid, or the two beside a token of text. A token none of whose neighbours is left counts as not redundant.
    layer (default 2), ratio (default 0.5, that is 1 - alpha), target, positions: see `SingleStage`.
    """

    name = "neighbour-cosine"

    def score(self, at: DecoderLayer) -> Tensor:
        segment = droppable(at, self.target)
        assert segment is not None  # there is nothing to score otherwise
        unit = normalize(at.hidden.float(), dim=-1)
        row, column = places(at).unbind(-1)
        view = at.tokens.grid[..., 0].clamp(min=0)
        width, height = int(column.max()) + 3, int(row.max()) + 3
        # a cell number for each place of each image, with an empty border so that neighbours never wrap around
        cell = ((segment * (int(view.max()) + 1) + view) * height + row + 1) * width + column + 1
        cells = int(cell.max()) + width + 2
        alone = (segment < 0) | (column < 0)  # not looked at, or the newline after a row of patches
        cell = cell.masked_fill(alone, cells)
        index = torch.arange(segment.shape[1], device=segment.device).expand_as(segment)
        token_at = torch.full((segment.shape[0], cells + 1), -1, device=segment.device).scatter(1, cell, index)
        token_at[:, cells] = -1
        steps = torch.tensor([down * width + right for down, right in OFFSETS], device=cell.device)
        near = (cell[..., None] + steps).clamp(0, cells)
        neighbour = token_at.gather(1, near.flatten(1)).view_as(near).masked_fill(alone[..., None], -1)
        # the sum of cosines is the cosine with the sum: one pass over the neighbours' rows
        batch, n, dim = unit.shape
        there = neighbour >= 0
        sample = torch.arange(batch, device=index.device)[:, None, None]
        row = (neighbour + n * sample).masked_fill(~there, batch * n)
        rows = torch.cat([unit.view(-1, dim), unit.new_zeros(1, dim)])
        together = embedding_bag(row.view(-1, len(OFFSETS)), rows, mode="sum", padding_idx=batch * n)
        return -(unit * together.view_as(unit)).sum(-1) / there.sum(-1).clamp(min=1)
