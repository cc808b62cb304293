"""Stats and TowerStats: what the last prefill, or the last pictures, of a patched model really did."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmaccel.flops import decoder_flops
from vlmaccel.run import Modality, Stage, TokenMap

if TYPE_CHECKING:
    from vlmaccel.adapters.decoder import DecoderHooks, Finished
    from vlmaccel.adapters.install import Patch


@dataclass(frozen=True, eq=False, repr=False)
class TowerStats:
    """Numbers of one pass through a vision tower that merges.

    methods: the methods in place. batch: pictures. blocks: of the tower. prefix: leading tokens that are no patches.
    tokens: tokens a picture, the prefix included, before the first block and behind each.
    image: (height, width) in pixels that the tower was given, None if it was given something else.
    flops, flops_full: of the blocks, whole batch, a multiply-add counted once, as merged and with all tokens.
    stages: the merges of all blocks so far, behind every block that merged; groups count the prefix too.
    """

    methods: tuple[str, ...]
    batch: int
    blocks: int
    prefix: int
    tokens: list[int]
    image: tuple[int, int] | None
    flops: float
    flops_full: float
    stages: tuple[Stage, ...]

    @property
    def flops_ratio(self) -> float:
        """Share of the unpatched blocks' FLOPs that was spent."""
        return self.flops / self.flops_full

    def __repr__(self) -> str:
        return (
            f"{' + '.join(self.methods)}, {self.batch} picture(s), {self.blocks} blocks\n"
            f"tokens: {' '.join(map(str, self.tokens))}\n"
            f"FLOPs of the blocks: {self.flops_ratio:.1%} of {self.flops_full:.3g}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Stats:
    """Numbers of one prefill.

    methods: the methods in place. batch: samples. layers: decoder layers.
    tokens, visual_tokens: mean over the samples of all real tokens, and of the visual ones, at every decoder layer's
        input. nominal_visual_tokens: visual tokens before any reduction.
    kv_bytes_by_layer: what the KV cache holds after the prefill in every layer: all tensors, bookkeeping included; kv_bytes
        is their sum. kv_bytes_full: of an unpatched cache. kv_bytes_peak: the most that it held during the prefill.
    kv_bytes_transient: of the largest copy of a layer's entries that each decode step makes beside that (layers in few
        bits are unpacked a part at a time, on a CPU; an unpatched cache is copied to be appended to, which is not counted).
    attended: mean over the samples of the share of the (row, key) pairs of causal attention that each decoder layer
        computed; 1 but for sparse attention.
    flops, flops_full: of the decoder, whole batch, by `vlmaccel.flops.decoder_flops`, with the kept and with all tokens.
    stages: which tokens were left from which layer on. token_map: what every token of the prompt is.
    tower: of the vision tower, None if nothing merges there or no picture has been seen.
    """

    methods: tuple[str, ...]
    batch: int
    layers: int
    tokens: list[float]
    visual_tokens: list[float]
    nominal_visual_tokens: float
    kv_bytes_by_layer: list[int]
    kv_bytes_full: int
    kv_bytes_peak: int
    kv_bytes_transient: int
    attended: list[float]
    flops: float
    flops_full: float
    stages: tuple[Stage, ...]
    token_map: TokenMap
    tower: TowerStats | None = None

    @property
    def kv_bytes(self) -> int:
        """What the KV cache holds after the prefill."""
        return sum(self.kv_bytes_by_layer)

    @property
    def mean_visual_tokens(self) -> float:
        """Mean over layers of the visual tokens at the layer's input."""
        return sum(self.visual_tokens) / self.layers

    @property
    def flops_ratio(self) -> float:
        """Share of the unpatched decoder's prefill FLOPs that was spent."""
        return self.flops / self.flops_full

    def __repr__(self) -> str:
        stages = ", ".join(f"{stage.keep.shape[1]} from layer {stage.layer} on" for stage in self.stages)
        mean = sum(self.attended) / self.layers
        sparse = "" if mean == 1 else f"attention computed: {mean:.1%} (mean over layers)\n"
        return (
            f"{' + '.join(self.methods)}, {self.batch} sample(s), {self.layers} decoder layers\n"
            f"tokens left: {stages or 'all'}\n{sparse}"
            f"visual tokens: {self.mean_visual_tokens:.1f} of {self.nominal_visual_tokens:.1f} (mean over layers)\n"
            f"decoder prefill FLOPs: {self.flops_ratio:.1%} of {self.flops_full:.3g} (4nd^2 + 2n^2d + 3ndm a layer)\n"
            f"KV cache after prefill: {self.kv_bytes:,} of {self.kv_bytes_full:,} bytes, at most {self.kv_bytes_peak:,}"
            + ("" if self.tower is None else f"\nvision tower: {self.tower}")
        )


def stats_of(patch: Patch) -> Stats | TowerStats | None:
    """The statistics of a Patch, of the tower alone where it has no decoder; None if its model has not run."""
    if patch.decoder is None:
        return _tower_stats(patch)
    if patch.decoder.last is None:
        return None
    return _decoder_stats(patch, patch.decoder, patch.decoder.last)


def _tower_stats(patch: Patch) -> TowerStats | None:
    hooks = patch.vision
    if hooks is None or hooks.last is None:
        return None
    seen, cost, depth = hooks.last, hooks.cost, len(hooks.parts.blocks)
    tokens, stages = [seen.tokens], {stage.layer: stage for stage in seen.stages}
    for block in range(depth):
        tokens.append(stages[block].keep.shape[1] if block in stages else tokens[-1])
    return TowerStats(
        methods=tuple(repr(method) for method in hooks.methods),
        batch=seen.batch,
        blocks=depth,
        prefix=hooks.parts.prefix,
        tokens=tokens,
        image=seen.image,
        flops=seen.batch * sum(cost.flops(*pair) for pair in pairwise(tokens)),
        flops_full=seen.batch * depth * cost.flops(seen.tokens, seen.tokens),
        stages=seen.stages,
    )


def _decoder_stats(patch: Patch, decoder: DecoderHooks, done: Finished) -> Stats:
    left = [_left(done.tokens, None)]
    starts = {stage.layer: stage for stage in done.stages}
    for layer in range(decoder.depth):
        left.append(_left(done.tokens, starts[layer]) if layer in starts else left[-1])
    real = [tokens for tokens, _ in left[1:]]
    visual = [images.mean().item() for _, images in left[1:]]
    config = decoder.parts.config
    d, m, depth = config.hidden_size, config.intermediate_size, decoder.depth
    gated = not hasattr(decoder.parts.layers[0].mlp, "c_fc")  # Starcoder2 has a plain MLP
    # padding is computed too, but it is no one's choice: FLOPs are those of the samples without it
    per_sample = list(zip(*(tokens.tolist() for tokens in real), strict=True))
    whole = left[0][0].tolist()
    shares = [done.attended.get(layer, torch.ones(len(whole))).tolist() for layer in range(depth)]
    attended = list(zip(*shares, strict=True))
    return Stats(
        methods=tuple(repr(method) for method in patch.methods),
        batch=len(whole),
        layers=depth,
        tokens=[tokens.mean().item() for tokens in real],
        visual_tokens=visual,
        nominal_visual_tokens=left[0][1].mean().item(),
        kv_bytes_by_layer=list(done.kv_bytes),
        kv_bytes_full=sum(done.kv_bytes_full),
        kv_bytes_peak=done.kv_bytes_peak,
        kv_bytes_transient=done.transient,
        attended=[sum(layer) / len(layer) for layer in shares],
        flops=sum(decoder_flops(n, d, m, gated, share) for n, share in zip(per_sample, attended, strict=True)),
        flops_full=sum(decoder_flops([n] * depth, d, m, gated) for n in whole),
        stages=done.stages,
        token_map=done.tokens,
        tower=_tower_stats(patch),
    )


def _left(tokens: TokenMap, stage: Stage | None) -> tuple[Tensor, Tensor]:
    """(B,) float counts of the real tokens, and of the visual ones, at a stage."""
    modality = tokens.modality
    if stage is not None:
        modality = tokens.at(stage.keep).modality.masked_fill(stage.size == 0, Modality.PAD)
    return (modality != Modality.PAD).sum(1).float(), (modality >= Modality.IMAGE).sum(1).float()
