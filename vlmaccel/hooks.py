"""Method and its hook points: the five places in the data flow where a technique may act, and what each one receives.

In the order data meets them: `vision_block` inside each ViT block, `visual_tokens` after the projector,
`decoder_layer` before a decoder layer at prefill, `attention` in place of a decoder layer's attention call
(`sparse_attention`) and right after it, `cache` when a layer's keys and values are there. A method overrides those it needs and knows only tensors; which modules they come
from is the adapters' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from vlmaccel.cache import KeyBias, PrunedLayer, Slots
from vlmaccel.flops import BlockCost
from vlmaccel.reduction import Insertion, Reduction, gather
from vlmaccel.run import Modality, Patches, Run, TokenMap

Positions = Literal["keep", "renumber", "calibrated"]
HOOK_POINTS = ("vision_block", "visual_tokens", "decoder_layer", "attention", "cache")


class Scores(Protocol):
    """Attention of the decoder layer at hand, as many rows as asked for; the full matrix is never built."""

    def rows(self, rows: Tensor) -> Tensor:
        """Softmax attention of some rows.

        rows: (B, Q) int64, row numbers among the remaining tokens.
        Returns (B, H, Q, n) float32: probabilities over the n remaining tokens, normalised over everything the row
        sees (earlier turns in the cache too), masked as the layer masks them.
        """
        ...

    def received(self, counts: Tensor) -> Tensor:
        """(B, n) float32, the attention that each remaining token gets from those of them that count, the mean over heads.

        counts: (B, n) bool. Rows are never held whole.
        """
        ...

    def keys(self) -> Tensor:
        """(B, H_kv, n, head_dim) keys of the remaining tokens, without their rotary positions."""
        ...

    def turned(self, rows: Tensor) -> Tensor:
        """(B, Q, n) float32, the mean cosine of the angles by which rotary positions turn some rows and each remaining token
        apart; rows: (B, Q) int64."""
        ...


@dataclass(frozen=True)
class Tower:
    """A vision tower, and how many tokens go into it.

    depth: number of blocks whose output is used. tokens: at the first block, the prefix included. prefix: how many leading ones (class,
    distillation, registers) are no patches and must stay. cost: of one block.
    memory: what a method wants to remember during one pass of pictures through the tower.
    """

    depth: int
    tokens: int
    prefix: int
    cost: BlockCost
    memory: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, eq=False)
class VisionBlock:
    """Between attention and MLP of one ViT block.

    tower: see `Tower`. layer: 0-based number of the block.
    hidden: (B, N, D) residual stream. metric: (B, N, head_dim) float32, the keys averaged over heads; no gradient.
    size: (B, N) int64, patches that each token stands for; None while all are 1.
    """

    tower: Tower
    layer: int
    hidden: Tensor
    metric: Tensor
    size: Tensor | None


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

    @property
    def patches(self) -> Patches:
        """What the vision tower tells of each row of `hidden`, for methods that say `sees_patches`.

        Raises ValueError where visual tokens are not what the tower's projector made, or are not finite.
        """
        assert self.run.find_patches is not None
        patches, reduction = self.run.find_patches(), self.run.reduction
        if reduction is None:
            return patches
        row = gather(patches.row, reduction.keep)
        return replace(patches, row=row.masked_fill((~reduction.own).to(row.device), -1))


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
class AttentionCall:
    """The attention call of decoder layer `layer` of `depth` at prefill.

    run: the forward pass. query: (B, H, n, head_dim), rotated, of the remaining new tokens. key: (B, H_kv, m, head_dim) of
    earlier tokens and, last, the new ones, so that row i is key i + m - n. real: (B, m) bool, the keys that are tokens: no
    padding, no fillers. scale: of the logits.
    """

    run: Run
    layer: int
    depth: int
    query: Tensor
    key: Tensor
    real: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Sparse attention over some tokens: their rows see them, as far as they are not later; all other rows get 0.

    chosen: (B, m) bool over the keys of an `AttentionCall`, none of them padding or a filler.
    """

    chosen: Tensor


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Sparse attention in which every block of rows has its own list of keys, a list for every head; causal.

    blocks: (B, H, ceil(n / block), L) int32, numbers of key blocks, ascending, -1 behind them. columns: (B, H, ceil(n / block),
    C) int32, single keys beside those blocks, ascending, -1 behind them. block: rows, and keys, of a block, 64 or 128.
    """

    blocks: Tensor
    columns: Tensor
    block: int


class EntryScores(Protocol):
    """Attention of the decoder layer at hand over its cache entries, as many rows as asked for."""

    def queries(self, rows: Tensor) -> Tensor:
        """(B, H, Q, head_dim) rotated queries of some rows; rows: (B, Q) int64, among the remaining new tokens."""
        ...

    def rows(self, rows: Tensor) -> Tensor:
        """(B, H, Q, m) float32 softmax attention of the rows over all m entries, earlier turns and merged weights
        included; a row sees no later entry, no padding and no filler."""
        ...

    def received(self, rows: Tensor, counts: Tensor, reduce: Literal["sum", "mean", "max"]) -> Tensor:
        """(B, H, m) float32, what each entry gets of the attention in `rows`, reduced over those of them that count
        (B, Q) bool: their sum, their mean over the ones that see the entry, or the largest; 0 where none does. Rows are
        never held whole, so they may be all there are."""
        ...

    def output(self) -> Tensor:
        """(H, head_dim, D) what the output projection makes of every head."""
        ...

    def key_bias(self) -> KeyBias | None:
        """What the layer adds to all its keys before rotation; None if nothing."""
        ...


@dataclass(frozen=True, eq=False)
class CacheEntries:
    """The keys and values of decoder layer `layer`: right after its attention at prefill, then at every decode step.

    entries: keys and values (B, H_kv, m, head_dim) and the slots they fill. scores: the layer's attention over them;
    None in a `cache` that comes after the whole prefill (see `Method.two_phase`).
    decoding: whether this is a decode step, or candidates of assisted decoding being checked.
    """

    run: Run
    layer: int
    depth: int
    entries: PrunedLayer
    decoding: bool
    scores: EntryScores | None

    @property
    def tokens(self) -> TokenMap:
        """What each new token of this forward is, before any reduction."""
        return self.run.tokens

    @property
    def slots(self) -> Slots:
        """What the entries stand for."""
        slots = self.entries.slots
        assert slots is not None
        return slots

    @property
    def window(self) -> int | None:
        """Sliding window of the layer in tokens; None if it sees everything."""
        return getattr(self.entries, "sliding_window", None)

    @property
    def end(self) -> Tensor:
        """(B,) int64, logical index of the last prompt token, or of the new one at a decode step."""
        run, device = self.run, self.slots.index.device
        if run.query.numel() == 0:
            return torch.full((self.slots.index.shape[0],), run.past + run.length - 1, device=device)
        return run.query.amax(1).to(device) + run.past

    @property
    def prompt(self) -> Tensor:
        """(B, G, m) bool, the entries that are tokens of the prompt or of what came before it: no padding, no fillers, no
        candidates of assisted decoding behind it, nothing that a sliding window has passed."""
        slots, run = self.slots, self.run
        real = (slots.sizes > 0) & (slots.index <= self.end[:, None, None])
        if self.window is not None:
            real &= slots.index > self.end[:, None, None] + 1 - self.window
        return real if run.padding is None else real & ~slots.padded(run.padding)

    @property
    def modality(self) -> Tensor:
        """(B, G, m) int8, the `Modality` of every entry."""
        slots = self.slots
        if slots.modality is None:
            return torch.full_like(slots.index, Modality.TEXT, dtype=torch.int8)
        return slots.modality


class Method:
    """One published technique: subclass it as a frozen dataclass of its hyper-parameters and override what it needs.

    name: how `patch(model, name)` finds it. A class in a package that declares the entry point `vlmaccel.methods`
    is found like our own.
    positions: "keep": remaining tokens keep their original position ids. "renumber": from this reduction on they are
        numbered 0, 1, 2, ... without gaps, in each layer, and new tokens continue from there. None: renumbered in models
        where a token has one position, kept where it has three (M-RoPE), which cannot be renumbered. "calibrated": kept, and
        in a decoder, from this reduction on, log(size * (2 - D(distance))) is added to the logits of visual (and merged)
        keys, where D is the mean cosine by which rotary positions turn a query and a key apart over that distance
        (RESTORE, arXiv 2606.01711).
    prop_attn: proportional attention, log(size) added to the attention logits of merged keys (arXiv 2210.09461). None:
        as the model's family does best in a vision tower, on in a decoder.
    two_phase: whether `cache` needs to know all layers first, so that in a prefill the whole cache is there once.
    sees_patches: whether it reads `VisualTokens.patches`; a model that cannot tell them is refused.
    """

    name: ClassVar[str] = ""
    positions: Positions | None = "keep"
    prop_attn: bool | None = False
    two_phase: ClassVar[bool] = False
    sees_patches: ClassVar[bool] = False

    def hook_points(self) -> tuple[str, ...]:
        """The hook points that this method acts at: those it overrides."""
        point_of = {name: name for name in HOOK_POINTS}
        point_of |= {"insert": "visual_tokens", "sparse_attention": "attention", "cache_layer": "cache"}
        points = {point for name, point in point_of.items() if getattr(type(self), name) is not getattr(Method, name)}
        return tuple(point for point in HOOK_POINTS if point in points)

    def check_decoder(self, width: int, model_type: str) -> None:
        """Raise ValueError if a decoder of hidden size `width`, in a model of that configured type, is none for this method."""

    def decoder_layers(self, depth: int) -> Sequence[int]:
        """Decoder layers (0-based, of `depth`) before which `decoder_layer` is called."""
        return ()

    def attention_layers(self, depth: int) -> Sequence[int]:
        """Decoder layers after whose attention `attention` is called."""
        return ()

    def sparse_layers(self, depth: int) -> Sequence[int]:
        """Decoder layers whose attention call `sparse_attention` may take."""
        return ()

    def cache_layers(self, depth: int) -> Sequence[int]:
        """Decoder layers whose entries `cache` is called with."""
        return ()

    def vision_blocks(self, tower: Tower) -> Sequence[int]:
        """Blocks of a vision tower in which `vision_block` is called: those that merge, for this number of tokens."""
        return range(tower.depth)

    def vision_block(self, at: VisionBlock) -> Reduction | None:
        """Merge tokens between attention and MLP of a ViT block; None leaves them."""
        return None

    def visual_tokens(self, at: VisualTokens) -> Reduction | None:
        """Select or merge visual tokens before the decoder; None leaves them."""
        return None

    def insert(self, at: VisualTokens) -> Insertion | None:
        """Rows that come in before the decoder, called right after `visual_tokens`; None for none. Each shares index and
        position of the token that it comes behind, sees all up to it and the rows in between, and is seen by what follows;
        the sequence keeps its length. Other methods see it as a visual token in no picture."""
        return None

    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        """Select or merge tokens before a decoder layer, at prefill; None leaves them."""
        return None

    def merged(self, at: VisualTokens, reduction: Reduction) -> Tensor:
        """(B, n, D), what its reduction in `visual_tokens` or `decoder_layer` makes of `at.hidden`: where tokens merged, their
        average weighted by size."""
        return reduction.apply(at.hidden, at.size)

    def sparse_attention(self, at: AttentionCall) -> TokenSet | BlockLists | None:
        """Which part of a layer's attention to compute, at prefill; None computes all of it. Only one method of a model may
        have it."""
        return None

    def attention(self, at: Attention) -> None:
        """Look at the attention of a decoder layer (and remember what is needed in `at.run.memory`)."""

    def observe(self, at: CacheEntries) -> None:
        """Look at the entries of a layer of `cache_layers` at prefill, before any method changes them. What is put into
        `at.entries.notes` follows the entries from then on."""

    def cache(self, at: CacheEntries) -> Reduction | None:
        """Evict or merge entries (batch B, or B * H_kv for a choice of every KV head); None leaves them.

        Called for every layer right after its attention, in a prefill and at each decode step. If this method or one
        before it is `two_phase`, then it is called in a prefill for all layers after the last one.
        """
        return None

    def cache_layer(self, layer: PrunedLayer, at: CacheEntries) -> PrunedLayer:
        """The cache layer that holds what `layer` holds from now on, for methods that store entries in a form of their
        own; called like `cache`, just before it."""
        return layer


def check_fits(method: Method, reduction: Reduction, hidden: Tensor) -> None:
    """Raise ValueError unless a method's reduction is one of the tokens (B, n, D) that it was given."""
    if reduction.group.shape != hidden.shape[:2]:
        raise ValueError(
            f"{method!r} returned a reduction of {tuple(reduction.group.shape)} tokens (batch, length) "
            f"where there are {tuple(hidden.shape[:2])}"
        )


__all__ = [
    "HOOK_POINTS",
    "Attention",
    "AttentionCall",
    "BlockLists",
    "CacheEntries",
    "DecoderLayer",
    "EntryScores",
    "Insertion",
    "Method",
    "Modality",
    "Patches",
    "Positions",
    "Reduction",
    "Run",
    "Scores",
    "TokenMap",
    "TokenSet",
    "Tower",
    "VisionBlock",
    "VisualTokens",
    "check_fits",
]
