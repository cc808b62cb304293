"""PyramidDrop: drop visual tokens in stages, ranked by the attention of the prompt's last token.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
CVPR 2025, arXiv 2410.17247.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vlmaccel.hooks import DecoderLayer, Positions
from vlmaccel.methods.selection import Selection, Target, check_layer, check_ratio, prompt_attention


@dataclass(frozen=True)
class PyramidDrop(Selection):
    """Drop in stages, ranked by the attention of the prompt's last token in each stage's own layer.

    At the input of the layer its own query and keys are worked out (rotary positions included), the softmax goes over
    the whole row, the mean over heads.

    ratio: lambda of the paper, what each stage keeps of the one before. Default 0.5 (section 4.1).
    layers: decoder layers of the stages; default a quarter, half and three quarters of the depth, which is the
        official 8, 16, 24 for 32 layers.
    ratios: kept fraction of the original count at every stage, int(N * ratio) tokens; default ratio, ratio^2,
        ratio^3, so the official 0.5, 0.25, 0.125.
    positions: default None, "renumber" as the official code does, but "keep" in models with three positions a token.
    target: see `Selection`.
    """

    name = "pyramiddrop"

    ratio: float = 0.5
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    target: Target | None = None
    positions: Positions | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        for name in ("layers", "ratios"):
            if getattr(self, name) is not None:  # a list is as good, but a frozen dataclass has to be hashable
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for layer in self.layers or ():
            check_layer(layer)
        for ratio in self.ratios or ():
            check_ratio(ratio)
        stages = 3 if self.layers is None else len(self.layers)
        if self.ratios is not None and len(self.ratios) != stages:
            raise ValueError(f"{stages} stages need as many ratios, not {len(self.ratios)}")
        if list(self.layers or ()) != sorted(set(self.layers or ())):
            raise ValueError(f"layers of the stages must increase, not {self.layers}")
        if list(self.ratios or ()) != sorted(self.ratios or (), reverse=True):
            raise ValueError(f"ratios are fractions of the original count and cannot grow, not {self.ratios}")
        self.check()

    def stages(self, depth: int) -> Mapping[int, float]:
        layers = self.layers if self.layers is not None else tuple(depth * k // 4 for k in (1, 2, 3))
        ratios = self.ratios or tuple(self.ratio ** (k + 1) for k in range(len(layers)))
        return dict(zip(layers, ratios, strict=True))

    def score(self, at: DecoderLayer) -> Tensor:
        return prompt_attention(at)
