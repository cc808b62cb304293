"""What the methods share that pick the tokens of an image one after the other, each with an eye on those before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmaccel.hooks import DecoderLayer, Positions
from vlmaccel.methods.selection import SingleStage, droppable, segment_sizes
from vlmaccel.run import Modality


@dataclass(frozen=True)
class Greedy(SingleStage):
    """Before a decoder layer, keep the tokens of every image that are picked first. Frames of a video are picked from one by one,
    as many from each, so that time and memory grow with their number only.

    layer: default 0, the projected tokens before the decoder. positions: default None, renumbered as in the official codes,
    where the decoder never sees a gap, but kept in models with three positions a token. ratio, target: see `SingleStage`.
    """

    layer: int = 0
    positions: Positions | None = None

    def pick(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        """(kept,) int64, which of the m tokens `index` of one image to pick, none twice, the first one first; 0 < kept < m."""
        raise NotImplementedError

    def score(self, at: DecoderLayer) -> Tensor:
        segment = droppable(at, self.target)
        assert segment is not None
        budget = self.count(segment_sizes(at, self.target), self.ratio).tolist()
        score = torch.full(segment.shape, -float(segment.shape[1]), device=segment.device)
        for sample, budgets in enumerate(budget):
            for number, kept in enumerate(budgets):
                index = (segment[sample] == number).nonzero().flatten()
                if not 0 < kept < len(index):
                    continue
                parts = frames(at, sample, index)
                for part in parts:
                    share = min(-(-kept // len(parts)), len(part))
                    picked = part[self.pick(at, sample, part, share)] if share < len(part) else part
                    score[sample, picked] = -torch.arange(share, device=score.device).float()
        return score


def frames(at: DecoderLayer, sample: int, index: Tensor) -> list[Tensor]:
    """The tokens `index` (m,) of one image; those of a video by frame."""
    if at.tokens.modality[sample, index[0]] != Modality.VIDEO:
        return [index]
    frame = at.tokens.grid[sample, index, 0]
    return [index[frame == number] for number in frame.unique()]


def cosines(x: Tensor) -> Tensor:
    """(m, m) float32 cosine similarities of the rows of x (m, d); those of a zero vector are 0, but 1 with itself."""
    unit = normalize(x.float(), dim=-1, eps=1e-6)
    return (unit @ unit.mT).fill_diagonal_(1.0)
