"""Attention-based importance: what a token is paid by all others in the layers before.

The form S_i = sum over layers l and queries j of A_ij^(l) is that of surveys, which name DynamicViT for it
(arXiv 2106.02034; DynamicViT itself trains a predictor). H2O (arXiv 2306.14048) sums over all rows in this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlmaccel.hooks import Attention, DecoderLayer
from vlmaccel.methods.selection import SingleStage, check_layer, to_logical, to_remaining
from vlmaccel.run import Modality


@dataclass(frozen=True)
class AttentionSum(SingleStage):
    """Drop once, ranked by the attention received from all tokens in all layers before.

    It is summed over layers and queries (mean over heads) and divided by the number of queries that can see the token:
    in a causal model early tokens are seen by more. Costs the query-key half of every attention before `layer` a second time, but never holds more than a few rows.
    layer (default 2, at least 1), ratio (default 0.5), target, positions: see `SingleStage`.
    """

    name = "attention-sum"

    def __post_init__(self) -> None:
        check_layer(self.layer, first=1)
        super().__post_init__()

    def attention_layers(self, depth: int) -> Sequence[int]:
        return range(self.layer) if self.ratio < 1 else ()

    def attention(self, at: Attention) -> None:
        real = at.tokens.modality != Modality.PAD
        seen_by = real.flip(1).cumsum(1).flip(1).clamp(min=1)
        total = at.scores.received(real)
        received = to_logical(at, total / seen_by.to(total.device))
        at.run.memory[self] = at.run.memory.get(self, 0) + received

    def score(self, at: DecoderLayer) -> Tensor:
        return to_remaining(at, at.run.memory.pop(self))
