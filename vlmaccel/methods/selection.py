"""What the methods that score tokens and keep the best ones share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmaccel.hooks import DecoderLayer, Method, Positions, VisualTokens
from vlmaccel.reduction import Reduction, top_per_segment
from vlmaccel.run import Modality, TokenMap

Target = Literal["image", "text"]


def check_ratio(ratio: float) -> None:
    """Raise ValueError unless `ratio` is a retention ratio."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise ValueError(f"ratio is the kept fraction, a number from 0 to 1, not {ratio!r}")


def check_share(name: str, share: float) -> None:
    """Raise ValueError unless `share` is a share of the kept tokens."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"{name} is a share of the kept tokens, a number from 0 to 1, not {share!r}")


def check_layer(layer: int, first: int = 0) -> None:
    """Raise ValueError unless `layer` is a decoder layer from `first` on."""
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < first:
        raise ValueError(f"layer is the number of a decoder layer, {first} or more, not {layer!r}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of the `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


Position = Literal["median", "first"]


class Selection(Method):
    """Before some decoder layers, keep the best-scored tokens of every image and drop the rest.

    target: what is dropped: "image" tokens, with a budget for each image; or prompt "text", all but its first token
        (an attention sink) and what follows the last prompt token. None: images where the model takes them, else text.
    positions: "keep", "renumber", "calibrated" or None, see `Method`.
    """

    target: Target | None = None

    def stages(self, depth: int) -> Mapping[int, float]:
        """Decoder layers at whose input tokens are dropped, each with the fraction of the original count kept there."""
        raise NotImplementedError

    def decoder_layers(self, depth: int) -> Sequence[int]:
        return tuple(self.stages(depth))

    def count(self, n: Tensor, ratio: float) -> Tensor:
        """How many of n (integer tensor) original tokens stay: int(n * ratio), but one if anything may stay."""
        return at_least_one((n.double() * ratio).long(), ratio)

    def score(self, at: DecoderLayer) -> Tensor:
        """(B, n) float, the higher the better, of the tokens still left."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError for a `target` or `positions` that does not exist."""
        check_choice("target", self.target, (None, *get_args(Target)))
        check_choice("positions", self.positions, (None, *get_args(Positions)))

    @torch.no_grad()
    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        segment = droppable(at, self.target)
        if segment is None:
            return None
        budget = self.count(segment_sizes(at, self.target), self.stages(at.depth)[at.layer])
        left = _count(segment, budget.shape[1])
        if bool((left <= budget).all()):
            return None
        score = self.score(at).float()
        if bool(score.isnan()[segment >= 0].any()):
            raise ValueError(
                f"{self.name}: the scores before decoder layer {at.layer} are NaN, so the hidden states are not finite; "
                "load the model in bfloat16 or float32"
            )
        return drop(at, (segment >= 0) & ~top_per_segment(score, segment, budget))


@dataclass(frozen=True)
class SingleStage(Selection):
    """A selection at one layer.

    layer: decoder layer (0-based) whose input is the first without the dropped tokens; 0 drops before the decoder.
    ratio: retention ratio, the kept fraction of each image's original tokens (at least one token if not 0).
    target, positions: see `Selection`.
    """

    layer: int = 2
    ratio: float = 0.5
    target: Target | None = None
    positions: Positions | None = "keep"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_layer(self.layer)
        self.check()

    def stages(self, depth: int) -> Mapping[int, float]:
        return {self.layer: self.ratio}


def at_least_one(kept: Tensor, ratio: float) -> Tensor:
    """The counts, but not 0 where the ratio is not."""
    return kept if ratio == 0 else kept.clamp(min=1)


def drop(at: VisualTokens, dropped: Tensor) -> Reduction:
    """Reduction without the `dropped` tokens (B, n) bool, and without padding where that makes the batch shorter."""
    wanted = ~dropped & (at.tokens.modality != Modality.PAD)
    wanted[:, -1] = True  # the model reads its next token off the last row, padding or not
    if at.run.reduction is not None and at.run.reduction.inserts:  # behind which something may have come in
        wanted |= at.run.reduction.keep == at.run.length - 1
    return Reduction.select(wanted)


def droppable(at: VisualTokens, target: Target | None) -> Tensor | None:
    """(B, n) int64, the segment (image of the sample, or 0 for text) that each remaining token may be dropped from, -1
    for those that stay; None if there are none."""
    segment = _segments(at, at.tokens, at.run.index, target)
    return segment if bool((segment >= 0).any()) else None


def segment_sizes(at: VisualTokens, target: Target | None) -> Tensor:
    """(B, S) int64, how many tokens every segment had before any reduction."""
    segment = _segments(at, at.run.tokens, None, target)
    return _count(segment, int(segment.max()) + 1)


def representatives(label: Tensor, position: Position) -> Tensor:
    """(m,) int64, the member that stands for each token's group: its first, or its median (the upper one of two).

    label: (m,) int64, tokens in order; those with the same label are a group.
    """
    order = label.argsort(stable=True)
    _, inverse, members = label.unique(return_inverse=True, return_counts=True)
    start = members.cumsum(0) - members
    return order[start + members // 2 if position == "median" else start][inverse]


def place_in_segment(at: VisualTokens, target: Target | None) -> Tensor:
    """(B, n) int64, which token of its segment each remaining one was before any reduction; 0 outside segments."""
    segment = _segments(at, at.run.tokens, None, target)
    place = torch.zeros_like(segment)
    for number in range(int(segment.max()) + 1):
        here = segment == number
        place = torch.where(here, here.cumsum(1) - 1, place)
    return to_remaining(at, place)


def _count(segment: Tensor, segments: int) -> Tensor:
    counts = torch.zeros(segment.shape[0], segments + 1, dtype=torch.long, device=segment.device)
    return counts.scatter_add(1, segment + 1, torch.ones_like(segment))[:, 1:]


def _segments(at: VisualTokens, tokens: TokenMap, index: Tensor | None, target: Target | None) -> Tensor:
    if target == "image" or (target is None and at.run.multimodal):
        return tokens.image
    real = tokens.modality != Modality.PAD
    first = real & (real.cumsum(1) == 1)
    query = at.run.query
    end = query.masked_fill(query < 0, at.run.length).amin(1, keepdim=True)
    place = torch.arange(at.run.length, device=end.device) if index is None else index
    text = (tokens.modality == Modality.TEXT) & ~first & (place < end)
    # what is added to a conversation later, or by assisted decoding, cannot be told from an answer: it stays
    return torch.where(text, 0, -1) if at.run.past == 0 else torch.full_like(place.expand_as(text), -1)


def prompt_attention(at: DecoderLayer) -> Tensor:
    """(B, n) float32, attention that each remaining token gets from the end of the prompt: the mean over heads, and in
    training over the ends of all prompts."""
    run = at.run
    query = run.query.clamp(min=0)
    rows = query if run.index is None else torch.searchsorted(run.index, query)
    used = (run.query >= 0).float().to(at.hidden.device)
    attention = at.scores.rows(rows).mean(1)
    return (attention * used[..., None]).sum(1) / used.sum(1, keepdim=True).clamp(min=1)


def to_logical(at: VisualTokens, values: Tensor) -> Tensor:
    """(B, n) values of the remaining tokens at their places in the whole sequence (B, length), 0 elsewhere."""
    return at.run.whole(values)


def to_remaining(at: VisualTokens, values: Tensor) -> Tensor:
    """(B, length) values of the whole sequence for the tokens that are left."""
    return values if at.run.index is None else values.gather(1, at.run.index.to(values.device))


def places(at: VisualTokens) -> Tensor:
    """(B, n, 2) int64 row and column of the remaining tokens in their image; what is in no grid is in a line: row 0, and
    as column its number among the sample's tokens."""
    grid = at.tokens.grid[..., 1:]
    number = (at.run.tokens.modality != Modality.PAD).cumsum(1) - 1
    column = to_remaining(at, number.clamp(min=0))
    return torch.where((grid < 0).all(-1, keepdim=True), torch.stack([torch.zeros_like(column), column], -1), grid)
