"""DivPrune: keep the tokens of an image that are most unlike one another.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv 2503.02175.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmaccel.hooks import DecoderLayer
from vlmaccel.kernels.farthest_first import farthest_first
from vlmaccel.methods.greedy import Greedy, cosines
from vlmaccel.methods.selection import at_least_one


@dataclass(frozen=True)
class DivPrune(Greedy):
    """Pick the token whose nearest neighbour is farthest, then again and again the one that is farthest from all that are
    picked, by 1 - cosine of the projected tokens (Max-Min diversity, section 3.2).

    ratio: retention ratio, int(round(N * ratio)) tokens stay; default 0.098 (section 4.1). No token is picked twice, as the
    official code may do where tokens are equal. Time and memory grow as the square of an image's tokens.
    layer, positions, target: see `Greedy`.
    """

    name = "divprune"

    ratio: float = 0.098

    def count(self, n: Tensor, ratio: float) -> Tensor:
        return at_least_one((n.double() * ratio).round().long(), ratio)

    def pick(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        return most_unlike(at.hidden[sample, index], kept)


def most_unlike(x: Tensor, kept: int) -> Tensor:
    """(kept,) int64, which rows of x (m, d) to pick; ties go to the lowest index."""
    likeness = cosines(x).fill_diagonal_(-torch.inf)
    start = (1 - likeness.amax(1)).argmax(0, keepdim=True)
    distance = torch.sub(torch.ones((), device=x.device), likeness, out=likeness)
    return farthest_first(distance, start, kept)
