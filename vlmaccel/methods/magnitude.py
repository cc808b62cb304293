"""Magnitude-based importance: the norm of a token's hidden state.

The form S_i = ||T_i||_2 is that of surveys, which name PoWER-BERT for it (arXiv 2001.08950; PoWER-BERT itself sums
attention). A baseline: vision towers have high-norm artefact patches.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.selection import SingleStage


@dataclass(frozen=True)
class Magnitude(SingleStage):
    """Drop once, ranked by the L2 norm of the hidden state, largest kept.

    layer (default 2), ratio (default 0.5), target, positions: see `SingleStage`.
    """

    name = "magnitude"

    def score(self, at: DecoderLayer) -> Tensor:
        return at.hidden.float().norm(dim=-1)
