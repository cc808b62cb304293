"""ToMe: in every block of a vision tower, merge the patches whose keys are most alike.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmaccel.hooks import Method, Positions, Tower, VisionBlock, VisualTokens
from vlmaccel.kernels.bipartite_match import bipartite_match, merged
from vlmaccel.methods.selection import Position, check_choice, representatives
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality

After = Literal["unmerge", "carry"]
SCHEDULES = {"constant": 0.0, "decreasing": -1.0, "increasing": 1.0}
DEFAULT_SPEEDUP = 1.5


@dataclass(frozen=True)
class ToMe(Method):
    """Merge the r most alike patches in every block of a vision tower, by the cosine of their keys.

    How many are merged is said in one of three ways (default: speedup=1.5):
    r: so many in every block; or a list with one number a block, filled up with zeros; or (r, inflect), which is r with
        schedule=inflect. At most half of a block's patches can go; 0 merges nothing.
    keep: retention ratio, the share of the patches that is left after the last block.
    speedup: how many times fewer FLOPs the blocks cost (`vlmaccel.flops.BlockCost`).

    schedule: "constant" (default), "decreasing" (from 2r to 0; faster, a little less accurate, section 4.1) or
        "increasing", or a number between: -1 is decreasing, 1 increasing.
    prop_attn: proportional attention, log(size) on the keys' logits. Default None: on, but off for MAE weights
        (section 4.1).
    after: what a decoder behind the tower gets: "unmerge" (default), every patch, with the value of its group; or
        "carry", one token a group, which stands at its `position` ("median" by default, or "first" member) and weighs as
        its patches. positions: for "carry", see `Method`.
    match: "keys" (default), or "random", which merges as many patches, drawn with `seed` (baseline).
    """

    name = "tome"

    r: int | Sequence[int] | tuple[int, float] | None = None
    prop_attn: bool | None = None
    schedule: float | str = 0.0
    keep: float | None = None
    speedup: float | None = None
    after: After = "unmerge"
    position: Position = "median"
    positions: Positions = "keep"
    match: Literal["keys", "random"] = "keys"
    seed: int = 0

    def __post_init__(self) -> None:
        r, schedule = self.r, self.schedule
        if isinstance(r, tuple) and len(r) == 2:
            r, schedule = r
        elif r is not None and not isinstance(r, int):
            if not isinstance(r, Sequence) or isinstance(r, str):
                raise ValueError(f"r is a whole number, a list with one a block, or (r, inflect), not {self.r!r}")
            # a frozen dataclass has to be hashable, and two numbers in a tuple would be (r, inflect)
            r = (*r, *[0] * (3 - len(r)))
        counts = r if isinstance(r, tuple) else (r,)
        if any(isinstance(x, bool) or not isinstance(x, int) for x in counts if x is not None):
            raise ValueError(f"r counts patches, in whole numbers, not {self.r!r}")
        schedule = SCHEDULES.get(schedule, schedule) if isinstance(schedule, str) else schedule
        if isinstance(schedule, bool) or not isinstance(schedule, (int, float)) or not -1 <= schedule <= 1:
            raise ValueError(f"schedule is {', '.join(SCHEDULES)}, or a number from -1 to 1, not {schedule!r}")
        object.__setattr__(self, "r", r)
        object.__setattr__(self, "schedule", float(schedule))
        if sum(x is not None for x in (r, self.keep, self.speedup)) > 1:
            raise ValueError("give one of r, keep and speedup")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(
                f"keep is the share of the patches that is left, more than 0 and at most 1, not {self.keep!r}"
            )
        if self.speedup is not None and not self.speedup >= 1:
            raise ValueError(f"speedup is a ratio of FLOPs, 1 or more, not {self.speedup!r}")
        check_choice("match", self.match, ("keys", "random"))
        check_choice("after", self.after, get_args(After))
        check_choice("position", self.position, get_args(Position))
        check_choice("positions", self.positions, get_args(Positions))

    def hook_points(self) -> tuple[str, ...]:
        return ("vision_block", "visual_tokens") if self.after == "carry" else ("vision_block",)

    def counts(self, tower: Tower) -> tuple[int, ...]:
        """r of every block of a vision tower."""
        assert isinstance(self.schedule, float)
        depth = tower.depth
        if isinstance(self.r, tuple):
            return (*self.r[:depth], *[0] * (depth - len(self.r)))
        if isinstance(self.r, int):
            low = int(self.r * (1 - self.schedule))
            step = (2 * self.r - 2 * low) / max(1, depth - 1)
            return tuple(int(low + step * i) for i in range(depth)) if depth > 1 else (self.r,)
        if self.keep is not None:
            return _keeping(self.keep, self.schedule, tower)
        return _as_fast(DEFAULT_SPEEDUP if self.speedup is None else self.speedup, self.schedule, tower)

    def vision_blocks(self, tower: Tower) -> Sequence[int]:
        counts = tower.memory[self.name] = self.counts(tower)
        left = tokens_left(counts, tower)
        return [block for block, (before, after) in enumerate(pairwise(left)) if after < before]

    def vision_block(self, at: VisionBlock) -> Reduction | None:
        r = at.tower.memory[self.name][at.layer]
        metric = at.metric if self.match == "keys" else self._noise(at)
        return Reduction.merge(*bipartite_match(metric, r, at.tower.prefix))

    def _noise(self, at: VisionBlock) -> Tensor:
        """Random vectors in place of keys, the same for all pictures: a batch is merged as each of its pictures alone."""
        batch, n, _ = at.hidden.shape
        generator = torch.Generator().manual_seed(self.seed * at.tower.depth + at.layer)
        return torch.randn(1, n, 16, generator=generator).to(at.hidden.device).expand(batch, -1, -1)

    @torch.no_grad()
    def visual_tokens(self, at: VisualTokens) -> Reduction | None:
        representative = equal_tokens(at, self.position)
        return None if representative is None else Reduction.merge_into(representative)


def spread(total: int, inflect: float, depth: int) -> list[int]:
    """`total` merges over `depth` blocks, evenly, or on a line from (1 - inflect) to (1 + inflect) times the mean."""
    weights = [1 - inflect + 2 * inflect * i / (depth - 1) for i in range(depth)] if depth > 1 else [1.0]
    share = [0.0, *accumulate(weights)]
    until = [int(total * x / share[-1] + 1e-6) for x in share]
    return [after - before for before, after in pairwise(until)]


def tokens_left(counts: Sequence[int], tower: Tower) -> list[int]:
    """Tokens before the first block, and behind each."""
    left = [tower.tokens]
    for r in counts:
        left.append(left[-1] - merged(left[-1], r, tower.prefix))
    return left


def _keeping(keep: float, inflect: float, tower: Tower) -> tuple[int, ...]:
    patches = tower.tokens - tower.prefix
    wanted = max(1, int(patches * keep + 1e-6))
    counts = spread(patches - wanted, inflect, tower.depth)
    if (least := tokens_left(counts, tower)[-1] - tower.prefix) > wanted:
        raise ValueError(
            f"{tower.depth} blocks cannot merge {patches} patches to {wanted} (keep={keep}) by this schedule, as each can "
            f"merge half of what it gets: the least is {least}"
        )
    return tuple(counts)


def _as_fast(speedup: float, inflect: float, tower: Tower) -> tuple[int, ...]:
    def faster(total: int) -> float:
        left = tokens_left(spread(total, inflect, tower.depth), tower)
        whole = tower.depth * tower.cost.flops(tower.tokens, tower.tokens)
        return whole / sum(tower.cost.flops(before, after) for before, after in pairwise(left))

    few, many = 0, tower.tokens - tower.prefix
    if faster(many) < speedup:
        raise ValueError(f"merging cannot make these blocks {speedup} times as fast, at most {faster(many):.2f} times")
    while few < many:  # the fewest merges that are enough
        middle = (few + many) // 2
        few, many = (few, middle) if faster(middle) >= speedup else (middle + 1, many)
    return tuple(spread(few, inflect, tower.depth))


def equal_tokens(at: VisualTokens, position: Position) -> Tensor | None:
    """(B, n) int64, the token that stands for each one: for visual tokens of the same image that are equal to the bit, as
    those of a group that a tower merged are, one of them; None if no two are equal. The newlines of a mosaic are no patches and stay."""
    tokens = at.tokens
    representative = torch.arange(tokens.modality.shape[1], device=at.hidden.device).repeat(len(tokens.modality), 1)
    before = representative.clone()
    newline = (tokens.grid[..., 1] >= 0) & (tokens.grid[..., 2] < 0)
    for sample, image in enumerate(tokens.image.masked_fill(newline, -1)):
        for number in range(int(image.max()) + 1):
            index = (image == number).nonzero().flatten().to(at.hidden.device)
            bits = at.hidden[sample, index].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[at.hidden.itemsize])
            label = bits.unique(dim=0, return_inverse=True)[1]
            representative[sample, index] = index[representatives(label, position)]
    if torch.equal(representative, before):
        return None
    representative.masked_fill_((tokens.modality == Modality.PAD).to(representative.device), -1)
    representative[:, -1] = representative.shape[1] - 1  # the model reads its next token off the last row
    return representative
