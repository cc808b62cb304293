"""Duplicates: before the decoder, tokens of a picture that are equal to the bit become one that weighs as all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from vlmaccel.hooks import Method, Positions, VisualTokens
from vlmaccel.methods.selection import Position, check_choice
from vlmaccel.methods.tome import equal_tokens
from vlmaccel.reduction import Reduction


@dataclass(frozen=True)
class Duplicates(Method):
    """Merge the tokens of a picture or video that are equal to the bit into one that weighs as all of them.

    It has log(size) on its key's logits (proportional attention, arXiv 2210.09461). Equal are the tokens of frames of
    a video that stand still, in towers that see each frame alone (Qwen-VL), and those of patches that `ToMe` merged in
    the tower. Patches of equal pixels are not: a tower adds their positions before its first block, or turns their
    keys by them, so that none could be left out there without a change.

    What is the same: the values of all copies in decoder layer 0, and their keys before rotary positions; one key with
    log(size) is what so many keys at its place would be. What is not: the copies stood at different places, and behind
    layer 0 they would no longer have been equal, as each saw what was before it. So answers may change a little;
    nothing changes, to the bit, where no two tokens are equal.

    position: where the token stands, at the "median" (default, RESTORE, arXiv 2606.01711) or "first" of its copies.
    positions: default "keep", see `Method`. prop_attn: default on.
    """

    name = "duplicates"

    position: Position = "median"
    positions: Positions | None = "keep"
    prop_attn: bool = True

    def __post_init__(self) -> None:
        check_choice("position", self.position, get_args(Position))
        check_choice("positions", self.positions, (None, *get_args(Positions)))

    @torch.no_grad()
    def visual_tokens(self, at: VisualTokens) -> Reduction | None:
        representative = equal_tokens(at, self.position)
        return None if representative is None else Reduction.merge_into(representative)
