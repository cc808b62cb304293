"""Method and its hook points: the five places in the data flow where a technique may act, and what each one receives.

In the order data meets them: `vision_block` inside each ViT block, `visual_tokens` after the projector,
`decoder_layer` before a decoder layer at prefill, `attention` right after a decoder layer's attention, `cache` when a
layer's keys and values are there. A method overrides those it needs and knows only tensors; which modules they come
from is the adapters' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from vlmaccel.cache import PrunedLayer
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality, Run, TokenMap

Positions = Literal["keep", "renumber"]


class Scores(Protocol):
    """Attention of the decoder layer at hand, as many rows as asked for; the full matrix is never built."""

    def rows(self, rows: Tensor) -> Tensor:
        """Softmax attention of some rows.

        rows: (B, Q) int64, row numbers among the remaining tokens.
        Returns (B, H, Q, n) float32: probabilities over the n remaining tokens, normalised over everything the row
        sees (earlier turns in the cache too), masked as the layer masks them.
        """
        ...


@dataclass(frozen=True, eq=False)
class VisionBlock:
    """Between attention and MLP of one ViT block.

    layer, depth: 0-based number of the block, and how many there are.
    hidden: (B, N, D) residual stream. metric: (B, N, head_dim), the block's keys averaged over heads.
    size: (B, N) int64, patches that each token stands for; None while all are 1.
    prefix: how many leading tokens (class, distillation, registers) must stay.
    """

    layer: int
    depth: int
    hidden: Tensor
    metric: Tensor
    size: Tensor | None
    prefix: int


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """After the projector, before decoder layer 0.

    run: the forward pass. hidden: (B, N, D) input embeddings, visual features in place.
    """

    run: Run
    hidden: Tensor

    @property
    def tokens(self) -> TokenMap:
        """What each row of `hidden` is."""
        return self.run.remaining

    @property
    def size(self) -> Tensor | None:
        """(B, n), tokens each row stands for; None while all are 1."""
        return self.run.size


@dataclass(frozen=True, eq=False)
class DecoderLayer(VisualTokens):
    """Before decoder layer `layer` of `depth`, at prefill.

    hidden: (B, n, D), the layer's input; n counts the tokens still left.
    scores: the layer's own attention, computed from its query and key projections of this input.
    """

    layer: int
    depth: int
    scores: Scores


@dataclass(frozen=True, eq=False)
class Attention(DecoderLayer):
    """Right after the attention of decoder layer `layer`, at prefill: `hidden` is its normalised input, `scores` its
    attention from the keys it used."""


@dataclass(frozen=True, eq=False)
class CacheEntries:
    """The keys and values of decoder layer `layer`: once after prefill, then at every decode step.

    entries: keys and values (B, H_kv, m, head_dim) and the slots they fill.
    tokens: map of the new tokens of this forward (B, length). decoding: whether this is a decode step.
    """

    run: Run
    layer: int
    depth: int
    entries: PrunedLayer
    decoding: bool

    @property
    def tokens(self) -> TokenMap:
        """What each new token of this forward is, before any reduction."""
        return self.run.tokens


class Method:
    """One published technique: subclass it as a frozen dataclass of its hyper-parameters and override what it needs.

    name: how `patch(model, name)` finds it. A class in a package that declares the entry point `vlmaccel.methods`
    is found like our own.
    positions: "keep": remaining tokens keep their original position ids. "renumber": from this reduction on they are
        numbered 0, 1, 2, ... without gaps, in each layer, and new tokens continue from there.
    proportional: add log(size) to the attention logits of merged keys.
    """

    name: ClassVar[str] = ""
    positions: Positions = "keep"
    proportional: bool = False

    def decoder_layers(self, depth: int) -> Sequence[int]:
        """Decoder layers (0-based, of `depth`) before which `decoder_layer` is called."""
        return ()

    def attention_layers(self, depth: int) -> Sequence[int]:
        """Decoder layers after whose attention `attention` is called."""
        return ()

    def cache_layers(self, depth: int) -> Sequence[int]:
        """Decoder layers whose entries `cache` is called with."""
        return ()

    def vision_block(self, at: VisionBlock) -> Reduction | None:
        """Merge tokens between attention and MLP of a ViT block; None leaves them."""
        return None

    def visual_tokens(self, at: VisualTokens) -> Reduction | None:
        """Select or merge visual tokens before the decoder; None leaves them."""
        return None

    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        """Select or merge tokens before a decoder layer, at prefill; None leaves them."""
        return None

    def attention(self, at: Attention) -> None:
        """Look at the attention of a decoder layer (and remember what is needed in `at.run.memory`)."""

    def cache(self, at: CacheEntries) -> Reduction | None:
        """Evict or merge entries (batch B, or B * H_kv for a choice of every KV head); None leaves them."""
        return None


def check_fits(method: Method, reduction: Reduction, hidden: Tensor) -> None:
    """Raise ValueError unless a method's reduction is one of the tokens (B, n, D) that it was given."""
    if reduction.group.shape != hidden.shape[:2]:
        raise ValueError(
            f"{method!r} returned a reduction of {tuple(reduction.group.shape)} tokens (batch, length) "
            f"where there are {tuple(hidden.shape[:2])}"
        )


HOOK_POINTS = ("vision_block", "visual_tokens", "decoder_layer", "attention", "cache")


def hook_points(method: Method) -> tuple[str, ...]:
    """The hook points that a method overrides."""
    return tuple(p for p in HOOK_POINTS if getattr(type(method), p) is not getattr(Method, p))


__all__ = [
    "HOOK_POINTS",
    "Attention",
    "CacheEntries",
    "DecoderLayer",
    "Method",
    "Modality",
    "Positions",
    "Reduction",
    "Run",
    "Scores",
    "TokenMap",
    "VisionBlock",
    "VisualTokens",
    "check_fits",
    "hook_points",
]
