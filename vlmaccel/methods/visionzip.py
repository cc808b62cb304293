"""VisionZip: keep the patches that the vision tower looks at, and a few in which the others are gathered.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmaccel.hooks import DecoderLayer, Positions, VisualTokens
from vlmaccel.methods.merging import Grouping
from vlmaccel.methods.selection import at_least_one, check_choice, check_ratio, check_share
from vlmaccel.reduction import Reduction, gather


@dataclass(frozen=True)
class VisionZip(Grouping):
    """Keep the patches that the vision tower looks at, and merge the others into a few.

    Before the decoder, the dominant patches of a picture are kept by the attention that they get in the tower; the
    others are merged into contextual ones by the cosine of their keys there. The attention is that of the class token
    in one of the tower's last blocks, the one whose output the model uses; in a tower without one, and in Qwen-VL
    (second last block, means over the patches of a token), that of all patches (section 3.2). In Qwen2.5-VL that block
    looks at windows, whose tokens share alike, so that the dominant ones are spread over them. Contextual targets are
    every s-th of the patches left, in order; a contextual token is the sum of its target and the mean of those that
    joined it, as in the official code, of what goes into the projector (in Qwen-VL, of tokens).

    ratio: retention ratio, int(N * ratio) tokens stay; default 1/9, the paper's 64 of 576 (section 4.1).
    contextual: share of them that are contextual, at least one of two; default 10/64, 10 beside 54 dominant (section
        4.1).
    prop_attn: weigh a contextual key as its number of tokens; default off, as published.
    positions: default None, renumbered as in the official code for LLaVA, but kept in models with three positions a
        token.

    Unlike the official code, it sends no class token along, for which a prompt has no place (there it is one of the
    54); a contextual token stands where its target does, not behind all dominant ones; the crops of a picture share
    one budget, and the newlines between their patches go first. In Qwen3-VL it has its target's deepstack features.
    """

    name = "visionzip"
    target = "image"
    sees_patches = True

    ratio: float = 1 / 9
    contextual: float = 10 / 64
    positions: Positions | None = None
    prop_attn: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_share("contextual", self.contextual)
        check_choice("positions", self.positions, (None, *get_args(Positions)))

    def stages(self, depth: int) -> Mapping[int, float]:
        return {0: self.ratio}

    def count(self, n: Tensor, ratio: float) -> Tensor:
        return at_least_one((n.double() * ratio + 1e-6).long(), ratio)

    def represent(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        patches, index = at.patches, index.to(at.hidden.device)
        row = patches.row[sample, index]
        attention = patches.attention[row].masked_fill(row < 0, -torch.inf)
        found = int((row >= 0).sum())
        merged = self.split(kept) if found > kept else 0
        dominant = attention.argsort(descending=True, stable=True)[: kept - merged]
        chosen = torch.full_like(index, -1)
        chosen[dominant] = dominant
        rest = ((chosen < 0) & (row >= 0)).nonzero().flatten()
        if merged:
            chosen[rest] = rest[join_targets(patches.keys[row[rest]], merged)]
        return chosen.to(at.run.tokens.image.device)

    def split(self, kept: int) -> int:
        """How many of the kept tokens are contextual: int(kept * share), but one of two or more if any are to be."""
        return min(kept - 1, max(1, int(kept * self.contextual + 1e-6))) if self.contextual and kept else 0

    def merged(self, at: VisualTokens, reduction: Reduction) -> Tensor:
        tokens, patches, many = gather(at.hidden, reduction.keep), at.patches, reduction.size > 1
        if not bool(many.any()):
            return tokens
        features = patches.features[patches.row].float()  # rows of other tokens hold anything: they are alone
        target, size = gather(features, reduction.keep)[many], reduction.size[many, None].to(features.device)
        others = (reduction.apply(features)[many] * size - target) / (size - 1)
        tokens[many.to(tokens.device)] = patches.project((target + others).to(patches.features)).to(tokens)
        return tokens


def join_targets(keys: Tensor, number: int) -> Tensor:
    """(R,) int64, the target that each of R patches joins, targets themselves; `number` targets, every s-th, at most R.

    keys: (R, d) float32. The target with the highest cosine is chosen, the first of several.
    """
    number = min(number, len(keys))
    target = torch.arange(number, device=keys.device) * (len(keys) // number)
    unit = normalize(keys, dim=-1)
    joined = target[(unit @ unit[target].T).argmax(1)]
    joined[target] = target
    return joined
