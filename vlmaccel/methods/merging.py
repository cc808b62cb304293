"""What the methods that merge tokens before a decoder layer share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.selection import (
    Position,
    Selection,
    SingleStage,
    check_choice,
    droppable,
    representatives,
    segment_sizes,
)
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality


class Grouping(Selection):
    """Before some decoder layers, merge the tokens of every image down to its budget, or drop them."""

    def represent(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        """(m,) int64, which of the m tokens `index` of one image stands for each of them, -1 for one that is dropped; m > kept."""
        raise NotImplementedError

    @torch.no_grad()
    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        segment = droppable(at, self.target)
        if segment is None:
            return None
        budget = self.count(segment_sizes(at, self.target), self.stages(at.depth)[at.layer]).tolist()
        n = segment.shape[1]
        representative = torch.arange(n, device=segment.device).repeat(segment.shape[0], 1)
        before = representative.clone()
        for sample, budgets in enumerate(budget):
            for number, kept in enumerate(budgets):
                index = (segment[sample] == number).nonzero().flatten()
                if len(index) > kept:
                    chosen = self.represent(at, sample, index, kept) if kept else torch.full_like(index, -1)
                    representative[sample, index] = torch.where(chosen < 0, -1, index[chosen])
        if torch.equal(representative, before):
            return None
        representative.masked_fill_(at.tokens.modality == Modality.PAD, -1)
        representative[:, -1] = n - 1  # the model reads its next token off the last row, padding or not
        return Reduction.merge_into(representative)


@dataclass(frozen=True)
class Merging(SingleStage, Grouping):
    """Before a decoder layer, merge the tokens of every image down to its budget.

    layer, ratio, target, positions: see `SingleStage`.
    prop_attn: weigh a merged key as its number of tokens (arXiv 2210.09461). position: where a group stands, at its
    "median" (RESTORE, arXiv 2606.01711) or "first" member.
    """

    prop_attn: bool = True
    position: Position = "median"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("position", self.position, get_args(Position))

    def join(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        """(m,) int64, the group (any number) that each of the m tokens `index` of one image joins; at most `kept` groups."""
        raise NotImplementedError

    def represent(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        return representatives(self.join(at, sample, index, kept), self.position)
