"""What every method has to beat at an equal number of tokens: random and evenly spread tokens (and `pool`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.selection import SingleStage, place_in_segment, places

# generalised golden ratio in two dimensions: 1/p and 1/p^2 with p^3 = p + 1 (the R2 low-discrepancy sequence)
SPREAD = (0.7548776662466927, 0.5698402909980532)


@dataclass(frozen=True)
class Random(SingleStage):
    """Drop at random (baseline).

    The same places of every image of a size, so that a batch equals its samples alone. seed: which places. layer (default 0, before the decoder), ratio (default 0.5), target, positions: see `SingleStage`.
    """

    name = "random"

    layer: int = 0
    seed: int = 0

    def score(self, at: DecoderLayer) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(at.run.length, generator=generator).to(at.hidden.device)
        return order[place_in_segment(at, self.target)]


@dataclass(frozen=True)
class Uniform(SingleStage):
    """Keep tokens spread evenly over the patch grid or the text (baseline): a low-discrepancy lattice.

    layer (default 0, before the decoder), ratio (default 0.5), target, positions: see `SingleStage`.
    """

    name = "uniform"

    layer: int = 0

    def score(self, at: DecoderLayer) -> Tensor:
        row, column = places(at).clamp(min=0).double().unbind(-1)
        return -((row * SPREAD[1] + column * SPREAD[0]) % 1)
