"""Run: the state of one forward pass of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlmaccel.reduction import Reduction, gather


class Modality:
    """What a token stands for. Plain integers: torch.compile compares a tensor with an enum as two Python objects."""

    PAD = 0
    TEXT = 1
    IMAGE = 2
    VIDEO = 3


@dataclass(frozen=True, eq=False)
class TokenMap:
    """What every token of a batch is.

    modality: (B, N) int8, a `Modality`.
    image: (B, N) int64, number of the image within its sample, -1 outside images.
    grid: (B, N, 3) int64, (view, row, column) of an image token. view: in LLaVA 0 is the whole picture, 1 the mosaic of its
        high-resolution crops; in Qwen-VL the frame of a video; in InternVL the tile. -1 where a token has no place in a grid.
    """

    modality: Tensor
    image: Tensor
    grid: Tensor

    @classmethod
    def text(cls, batch: int, n: int, device: torch.device | str = "cpu") -> TokenMap:
        """All text."""
        modality = torch.full((batch, n), Modality.TEXT, dtype=torch.int8, device=device)
        outside = torch.full((batch, n), -1, device=device)
        return cls(modality, outside, outside[..., None].expand(-1, -1, 3))

    def at(self, index: Tensor) -> TokenMap:
        """The map of the tokens at `index` (B, n)."""
        return TokenMap(gather(self.modality, index), gather(self.image, index), gather(self.grid, index))


@dataclass(frozen=True, eq=False)
class Patches:
    """What the vision tower tells of the tokens that it made of pictures: each of one patch, or of a group of neighbours.

    row: (B, N) int64, row of every token in the tables (M > 0), -1 for one that is none of them (text, newlines).
    attention: (M,) float32, what each gets in one of the tower's last blocks, the mean over heads: of the attention of the
        class token where there is one; else of all patches it is seen by (of its picture, frame or window), their sum.
    keys: (M, head_dim) float32, its key there without rotary positions, the mean over heads.
    features: (M, C), what methods average: what goes into the projector if that takes one patch at a time, else tokens.
    project: makes tokens (K, D) of features (K, C).
    """

    row: Tensor
    attention: Tensor
    keys: Tensor
    features: Tensor
    project: Callable[[Tensor], Tensor]

    def at(self, index: Tensor) -> Patches:
        """The same for the tokens at `index` (B, n)."""
        return replace(self, row=gather(self.row, index))


@dataclass(frozen=True, eq=False)
class Stage:
    """What was left from one decoder layer on.

    layer: 0-based decoder layer whose input is the first with these tokens.
    keep: (B, n) int64, logical (whole-sequence) index of every remaining token; of an inserted row, that of the token it
        comes behind.
    size: (B, n) int64, how many tokens each stands for, 0 for a filler.
    group: (B, N) int64, slot that each token of the sequence joined, -1 if it was dropped.
    """

    layer: int
    keep: Tensor
    size: Tensor
    group: Tensor


@dataclass(eq=False)
class Run:
    """One forward pass of the decoder over `length` new tokens.

    tokens: map of the new tokens (B, length).
    past: how many tokens the cache had seen before.
    query: (B, Q) int64, index of the last prompt token, or of every token just before an answer in training; -1 unused.
    padding: (B, past + length) bool, the padding of the whole sequence; None if there is none, or none is known.
    may_reduce: whether tokens may be dropped in this forward (it is a prefill, and the cache can hold fewer).
    multimodal: whether the model takes pictures (text-only prompts of such a model too).
    last_only: whether only the last token's output is wanted. labels: (B, length) of training, or None.
    find_patches: what the vision tower tells of the new tokens; None where no method asks for it.
    """

    tokens: TokenMap
    past: int
    query: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    padding: Tensor | None = None
    may_reduce: bool = False
    multimodal: bool = False
    last_only: bool = False
    labels: Tensor | None = None
    find_patches: Callable[[], Patches] | None = None
    reduction: Reduction | None = None
    prop_attn: bool = False
    calibrated: Tensor | None = None  # (B, n) bool, remaining tokens whose keys are calibrated by distance
    removed: Tensor | None = None  # (B, n), by how much each remaining token's position is lowered
    removed_in_all: Tensor | None = None  # (B, 1), the same for tokens still to come
    stages: list[Stage] = field(default_factory=list)
    memory: dict[Any, Any] = field(default_factory=dict)  # what a method wants to remember between layers
    attended: dict[int, Tensor] = field(default_factory=dict)  # (B,) share of a layer's attention that was computed
    mask_known: bool = False  # the attention mask is causality and `padding`, nothing else
    keeps_modality: bool = False  # cache entries are to know their modality
    verifying: bool = False  # the new tokens are candidates of assisted decoding
    positions: Tensor | None = None  # what the model gave its rotary embedding: (B or 1, length) or (3, B, length)
    views: dict[Any, Any] = field(default_factory=dict)  # tensors of the full sequence as seen by the current stage
    mask_size: Tensor | None = None  # `size` where attention has to know it: fillers, or proportional attention
    _now: TokenMap | None = None

    def prepare(self, mask: Any, labels: Any, logits_to_keep: Any) -> None:
        """Find padding and the end of the prompt, before a prefill.

        mask: the decoder's attention mask. labels, logits_to_keep: of the causal language model's call.
        """
        self.tokens = mark_padding(self.tokens, mask)
        self.query = prompt_end(self.tokens, labels, logits_to_keep)
        self.labels = labels if isinstance(labels, Tensor) else None
        self.last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        self.verifying = self.past > 0 and isinstance(logits_to_keep, int) and 1 < logits_to_keep == self.length

    @property
    def length(self) -> int:
        """Number of new tokens, before any reduction."""
        return self.tokens.modality.shape[1]

    @property
    def index(self) -> Tensor | None:
        """(B, n), which of the new tokens are left; None while all are."""
        return None if self.reduction is None else self.reduction.keep

    @property
    def size(self) -> Tensor | None:
        """(B, n), how many tokens each remaining one stands for, 0 for a filler; None while all are left."""
        return None if self.reduction is None else self.reduction.size

    @property
    def remaining(self) -> TokenMap:
        """Map of the tokens that are left; fillers count as padding. An inserted row has the modality of the token that it
        comes behind, but is in no image, so that no method drops or merges it."""
        if self.reduction is None:
            return self.tokens
        if self._now is None:
            now = self.tokens.at(self.reduction.keep)
            filler = self.reduction.size == 0
            modality, outside = now.modality.masked_fill(filler, Modality.PAD), filler | self.reduction.inserted
            self._now = TokenMap(modality, now.image.masked_fill(outside, -1), now.grid)
        return self._now

    def whole(self, x: Tensor) -> Tensor:
        """(B, length, ...) what the remaining tokens have, x (B, n, ...), at their places in the sequence; 0 elsewhere."""
        if self.reduction is None:
            return x
        place, room = self.reduction.keep.to(x.device), self.length
        if self.reduction.inserts:  # several rows may be at one place, of which one is the token
            place, room = place.masked_fill(~self.reduction.own.to(x.device), self.length), self.length + 1
        place = place.view(*place.shape, *[1] * (x.ndim - 2)).expand_as(x)
        return x.new_zeros(x.shape[0], room, *x.shape[2:]).scatter(1, place, x)[:, : self.length]

    def reduce(
        self,
        layer: int,
        reduction: Reduction,
        renumber: bool = False,
        prop_attn: bool = False,
        calibrated: bool = False,
    ) -> None:
        """Note that from `layer` on only `reduction` (of the remaining tokens) is left; for the rest see `hooks.Method`."""
        before = self.removed
        whole = reduction if self.reduction is None else self.reduction.then(reduction)
        self.reduction, self._now = whole, None
        self.prop_attn |= prop_attn or calibrated
        if renumber:
            real = (whole.size > 0).long()  # of several rows at one place, one is enough
            kept = torch.zeros_like(self.tokens.image).scatter_add(1, whole.keep, real) > 0
            gone = (self.tokens.modality != Modality.PAD) & ~kept
            self.removed = gone.cumsum(1).gather(1, whole.keep)
            self.removed_in_all = gone.sum(1, keepdim=True)
        elif before is not None:
            self.removed = before.gather(1, reduction.keep)
        matters = (whole.size != 1) if self.prop_attn else (whole.size == 0)
        self.mask_size = whole.size if bool(matters.any()) else None
        if calibrated or self.calibrated is not None:
            self.calibrated = (self.remaining.modality >= Modality.IMAGE) | (whole.size > 1)
        self.views.clear()
        self.stages.append(Stage(layer, whole.keep, whole.size, whole.group))


def padding_of(mask: Any) -> Tensor | None:
    """(B, N) bool, where a 2-D attention mask has padding; None where it has none, or the mask tells nothing of it."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    padding = mask == 0
    return padding if bool(padding.any()) else None


def mark_padding(tokens: TokenMap, mask: Any) -> TokenMap:
    """The map with padding marked where the 2-D attention `mask` (B, past + N) is 0; other masks tell nothing of it."""
    n = tokens.modality.shape[1]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < n:
        return tokens
    padding = (mask[:, -n:] == 0).to(tokens.modality.device)
    return TokenMap(tokens.modality.masked_fill(padding, Modality.PAD), tokens.image, tokens.grid)


def prompt_end(tokens: TokenMap, labels: Any, logits_to_keep: Any) -> Tensor:
    """(B, Q) int64, the rows whose attention ranks the tokens; -1 where a sample has fewer than Q.

    In generation, the last prompt token: the first row whose logits are asked for, so that candidates of assisted
    decoding behind it do not count. In training, every token just before an answer (label -100, then another), as
    PyramidDrop's code does (arXiv 2410.17247).
    """
    batch, n = tokens.modality.shape
    if isinstance(labels, Tensor) and labels.shape == (batch, n):
        starts = (labels[:, :-1] == -100) & (labels[:, 1:] != -100)
        count = int(starts.sum(1).max())
        if count and bool(starts.any(1).all()):
            index = (~starts).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
            return index.masked_fill(~starts.gather(1, index), -1)
    end = n - logits_to_keep if isinstance(logits_to_keep, int) and 0 < logits_to_keep <= n else n - 1
    real = (tokens.modality != Modality.PAD) & (torch.arange(n, device=tokens.modality.device) <= end)
    place = torch.arange(1, n + 1, device=tokens.modality.device) * real
    return (place.amax(1, keepdim=True) - 1).clamp(min=0)
