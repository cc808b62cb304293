"""FastV: after a few layers, drop the visual tokens that the prompt's last token does not look at.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models", ECCV 2024, arXiv 2403.06764.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlmaccel.hooks import Attention, DecoderLayer
from vlmaccel.methods.selection import (
    SingleStage,
    at_least_one,
    check_layer,
    prompt_attention,
    to_logical,
    to_remaining,
)


@dataclass(frozen=True)
class FastV(SingleStage):
    """Drop once, ranked by the attention of the prompt's last token in the layer before (mean over heads).

    layer: K of the paper, the number of layers that see every token. Default 2 (section 4.2).
    ratio: kept fraction, 1 - R of the paper; round(N * ratio) tokens stay. Default 0.5 (section 4.2).
    positions: default "keep", as the official code does.
    target: see `Selection`.
    """

    name = "fastv"

    def __post_init__(self) -> None:
        check_layer(self.layer, first=1)
        super().__post_init__()

    def attention_layers(self, depth: int) -> Sequence[int]:
        return (self.layer - 1,) if self.ratio < 1 else ()

    def count(self, n: Tensor, ratio: float) -> Tensor:
        return at_least_one((n.double() * ratio).round().long(), ratio)

    def attention(self, at: Attention) -> None:
        at.run.memory[self] = to_logical(at, prompt_attention(at))

    def score(self, at: DecoderLayer) -> Tensor:
        return to_remaining(at, at.run.memory.pop(self))
