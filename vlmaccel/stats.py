"""Stats: what the last prefill of a patched model really did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vlmaccel.flops import decoder_flops
from vlmaccel.run import Modality, Stage, TokenMap

if TYPE_CHECKING:
    from vlmaccel.adapters.install import Patch


@dataclass(frozen=True, eq=False)
class Stats:
    """Numbers of one prefill.

    methods: the methods in place. batch: samples. layers: decoder layers.
    tokens, visual_tokens: mean over the samples of all real tokens, and of the visual ones, at every decoder layer's
        input. nominal_visual_tokens: visual tokens before any reduction.
    kv_bytes: what the KV cache holds after the prefill, bookkeeping included. kv_bytes_full: an unpatched one.
    flops, flops_full: of the decoder, whole batch, by `vlmaccel.flops.decoder_flops`, with the kept and with all tokens.
    stages: which tokens were left from which layer on. token_map: what every token of the prompt is.
    """

    methods: tuple[str, ...]
    batch: int
    layers: int
    tokens: list[float]
    visual_tokens: list[float]
    nominal_visual_tokens: float
    kv_bytes: int
    kv_bytes_full: int
    flops: float
    flops_full: float
    stages: tuple[Stage, ...]
    token_map: TokenMap

    @property
    def mean_visual_tokens(self) -> float:
        """Mean over layers of the visual tokens at the layer's input."""
        return sum(self.visual_tokens) / self.layers

    @property
    def flops_ratio(self) -> float:
        """Share of the unpatched decoder's prefill FLOPs that was spent."""
        return self.flops / self.flops_full

    def __str__(self) -> str:
        stages = ", ".join(f"{stage.keep.shape[1]} from layer {stage.layer} on" for stage in self.stages)
        return (
            f"{' + '.join(self.methods)}, {self.batch} sample(s), {self.layers} decoder layers\n"
            f"tokens left: {stages or 'all'}\n"
            f"visual tokens: {self.mean_visual_tokens:.1f} of {self.nominal_visual_tokens:.1f} (mean over layers)\n"
            f"decoder prefill FLOPs: {self.flops_ratio:.1%} of {self.flops_full:.3g} (4nd^2 + 2n^2d + 3ndm a layer)\n"
            f"KV cache after prefill: {self.kv_bytes:,} of {self.kv_bytes_full:,} bytes"
        )


def stats_of(patch: Patch) -> Stats:
    """The statistics of a Patch whose model has run."""
    done = patch.last
    assert done is not None
    left = [_left(done.tokens, None)]
    starts = {stage.layer: stage for stage in done.stages}
    for layer in range(patch.depth):
        left.append(_left(done.tokens, starts[layer]) if layer in starts else left[-1])
    real = [tokens for tokens, _ in left[1:]]
    visual = [images.mean().item() for _, images in left[1:]]
    config = patch.parts.config
    d, m, depth = config.hidden_size, config.intermediate_size, patch.depth
    gated = not hasattr(patch.parts.layers[0].mlp, "c_fc")  # Starcoder2 has a plain MLP
    # padding is computed too, but it is no one's choice: FLOPs are those of the samples without it
    per_sample = list(zip(*(tokens.tolist() for tokens in real), strict=True))
    whole = left[0][0].tolist()
    return Stats(
        methods=tuple(repr(method) for method in patch.methods),
        batch=len(whole),
        layers=depth,
        tokens=[tokens.mean().item() for tokens in real],
        visual_tokens=visual,
        nominal_visual_tokens=left[0][1].mean().item(),
        kv_bytes=done.kv_bytes,
        kv_bytes_full=done.kv_bytes_full,
        flops=sum(decoder_flops(sample, d, m, gated) for sample in per_sample),
        flops_full=sum(decoder_flops([n] * depth, d, m, gated) for n in whole),
        stages=done.stages,
        token_map=done.tokens,
    )


def _left(tokens: TokenMap, stage: Stage | None) -> tuple[Tensor, Tensor]:
    """(B,) float counts of the real tokens, and of the visual ones, at a stage."""
    modality = tokens.modality
    if stage is not None:
        modality = tokens.at(stage.keep).modality.masked_fill(stage.size == 0, Modality.PAD)
    return (modality != Modality.PAD).sum(1).float(), (modality >= Modality.IMAGE).sum(1).float()
