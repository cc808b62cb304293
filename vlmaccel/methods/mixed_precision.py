"""Mixed-precision KV cache: entries that matter in many bits, the others in few.

The grid and the axes of KIVI (Liu et al., ICML 2024, arXiv 2402.02750); two classes of tokens by saliency as in ZipCache
(He et al., NeurIPS 2024, arXiv 2405.14256) and eq. 37 of the survey that this follows, bits(t) = high if S_t > tau else low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.cache import KeyBias, PrunedLayer
from vlmaccel.cache.mixed import FULL, MixedLayer
from vlmaccel.hooks import CacheEntries, Method, Modality
from vlmaccel.methods.eviction import (
    Rows,
    by_kv_head,
    check_count,
    check_finite,
    first_and_last,
    observed,
    observed_rows,
    system,
)
from vlmaccel.methods.selection import check_choice
from vlmaccel.reduction import Reduction

By = Literal["saliency", "modality", "position"]
NOTE = "saliency"


@dataclass(frozen=True)
class MixedPrecisionKV(Method):
    """Hold the KV cache in few bits: keys on a grid per channel (over `group` neighbouring tokens), values per token.

    Attention of the prefill is exact; entries are quantised after it, those of a layer before the next layer runs, and later
    ones in whole groups once they leave the residual window. Codes never change. Layers with a sliding window stay as
    they are. Works after methods that evict or drop tokens; put it last.
    by: what decides the bits of a prompt's entries.
        "saliency" (default): `high_bits` for the most salient of every KV head, `low_bits` for the others. Saliency is the
        attention from `rows` (see `Observed`): "last", the `window` last tokens, or "post-vision".
        "modality": image_bits, video_bits, text_bits, system_bits (text before the first picture); 16 is full precision.
        "position": low_bits for everything behind the residual window, as KIVI does.
    keep: share of a prompt's entries in high precision (default 0.1). tau: in place of it, as ZipVL (arXiv 2410.08584)
        chooses: the fewest that have this share of all saliency.
    high_bits: 16 (full precision, default), 8 or 4. low_bits: 8, 4 (default) or 2; what is generated later gets these too
        (by modality: text_bits).
    group: default 32, residual: so many newest tokens stay in full precision, default 128 (both as KIVI).
    sinks: first tokens that stay in full precision, default 4: their keys are far from all others.
    by_query: round keys in 2 bits one channel after the other, so that what they add to the product with the mean query of
        the prompt cancels out (see `quantize_keys`); costs no bytes but two vectors a head. Default True.
    key_bias: take rotated `k_proj.bias` off keys before they are quantised and put it back on when they are read, in models
        that have it (Qwen2, Qwen2.5); exact. Default True. Without it a large bias widens the steps of its channels, and
        on a per-token grid those of all (`python -m vlmaccel.evals.key_bias`).
    """

    name = "mixed-precision-kv"

    high_bits: int = 16
    low_bits: int = 4
    keep: float | None = None
    tau: float | None = None
    by: By = "saliency"
    group: int = 32
    residual: int = 128
    sinks: int = 4
    rows: Rows = "post-vision"
    window: int = 32
    image_bits: int = 2
    video_bits: int = 2
    text_bits: int = 4
    system_bits: int = 16
    by_query: bool = True
    key_bias: bool = True

    def __post_init__(self) -> None:
        check_choice("high_bits", self.high_bits, (4, 8, FULL))
        check_choice("low_bits", self.low_bits, (2, 4, 8))
        for name in ("image_bits", "video_bits", "text_bits", "system_bits"):
            check_choice(name, getattr(self, name), (2, 4, 8, FULL))
        check_choice("by", self.by, get_args(By))
        check_choice("rows", self.rows, get_args(Rows))
        for name, least in (("group", 1), ("residual", 0), ("sinks", 0), ("window", 1)):
            check_count(name, getattr(self, name), least)
        if self.keep is not None and self.tau is not None:
            raise ValueError("give one of keep and tau")
        for name in ("keep", "tau"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, not {share!r}")
        if self.by == "saliency" and self.low_bits >= self.high_bits:
            raise ValueError(f"low_bits are fewer than high_bits, not {self.low_bits} and {self.high_bits}")

    def cache_layers(self, depth: int) -> Sequence[int]:
        return range(depth)

    def observe(self, at: CacheEntries) -> None:
        assert at.scores is not None
        bias = at.scores.key_bias() if self.key_bias else None
        at.run.memory[self, at.layer] = bias, moments(at, self.rows) if self.by_query and self._uses_2_bits() else None
        if self.by == "saliency" and self._share() < 1:
            saliency = by_kv_head(observed(at, self.rows, self.window), at)
            check_finite(self, at, saliency)
            at.entries.notes[NOTE] = saliency

    def _uses_2_bits(self) -> bool:
        by_modality = self.image_bits, self.video_bits, self.text_bits, self.system_bits
        return 2 in (by_modality if self.by == "modality" else (self.low_bits,))

    def _share(self) -> float:
        share = self.keep if self.tau is None else self.tau
        return 0.1 if share is None else share

    def cache_layer(self, layer: PrunedLayer, at: CacheEntries) -> PrunedLayer:
        if isinstance(layer, MixedLayer) or at.window is not None or at.decoding:
            return layer
        bias: KeyBias | None = at.run.memory[self, at.layer][0]
        if at.run.past:  # positions of what came before this method was there are not known
            bias = None
        default = self.text_bits if self.by == "modality" else self.low_bits
        return MixedLayer.of(
            layer, at.run.padding, group=self.group, residual=self.residual, default=default, key_bias=bias
        )

    def cache(self, at: CacheEntries) -> Reduction | None:
        layer = at.entries
        if not isinstance(layer, MixedLayer):
            return None
        if layer.key_bias is not None:
            layer.see_positions(new_positions(at))
        if not at.decoding:
            layer.asked = at.run.memory[self, at.layer][1]
            layer.name(self._bits(at, layer))
            layer.notes.pop(NOTE, None)
            layer.settle()
        else:
            layer.settle(open_=at.run.length - 1)
        return None

    def _bits(self, at: CacheEntries, layer: MixedLayer) -> Tensor:
        """(B, G, e) int8, bits of the entries in full precision that have none yet; 0 for all others."""
        exact = layer.exact_slots.index.shape[2]
        prompt, first = (x[..., -exact:] for x in (at.prompt, first_and_last(at, self.sinks, 0)))
        open_ = layer.undecided() & prompt
        if self.by == "saliency":
            bits = torch.where(self._salient(layer, open_), self.high_bits, self.low_bits)
        elif self.by == "position":
            bits = torch.full_like(prompt, self.low_bits, dtype=torch.int)
        else:
            modality, before = (x[..., -exact:] for x in (at.modality, system(at)))
            bits = torch.full_like(modality, self.text_bits, dtype=torch.int)
            bits[modality == Modality.IMAGE] = self.image_bits
            bits[modality == Modality.VIDEO] = self.video_bits
            bits[before] = self.system_bits
        return bits.masked_fill(first, FULL).masked_fill(~open_, 0).to(torch.int8)

    def _salient(self, layer: MixedLayer, among: Tensor) -> Tensor:
        """(B, H_kv, e) bool, which entries `among` (B, G, e) those in full precision get high precision."""
        share = self._share()
        if share == 1 or NOTE not in layer.notes:
            return torch.full_like(among, share == 1)
        start = layer.held - among.shape[2]  # entries in full precision come last
        score = pad(layer.notes[NOTE], (0, layer.held - layer.notes[NOTE].shape[2]))[..., start:].float()
        among = among.expand_as(score)
        score = score.masked_fill(~among, -torch.inf)
        order = score.argsort(dim=2, descending=True, stable=True)
        place = torch.arange(score.shape[2], device=score.device)
        if self.tau is None:
            chosen = place < (among.sum(2, keepdim=True).double() * share + 1e-9).floor()
        else:
            mass = score.clamp(min=0).gather(2, order).double()
            before = mass.cumsum(2) - mass
            chosen = before < self.tau * mass.sum(2, keepdim=True)
        return torch.zeros_like(among).scatter(2, order, chosen) & among


def moments(at: CacheEntries, which: Rows) -> tuple[Tensor, Tensor]:
    """(B, H_kv, head_dim) float32 mean of the queries of a prompt's last 128 rows (or those behind its last picture, see
    `observed_rows`), those of all query heads of a KV head together, and their variance."""
    rows, counts = observed_rows(at, which, 128)
    assert at.scores is not None
    query = at.scores.queries(rows).float().unflatten(1, (at.entries.keys.shape[1], -1))  # (B, H_kv, H / H_kv, Q, d)
    share = counts.to(query)[:, None, None, :, None]
    share = share / (share.sum(3, keepdim=True) * query.shape[2]).clamp(min=1)
    mean = (query * share).sum((2, 3))
    return mean, ((query - mean[:, :, None, None]).square() * share).sum((2, 3))


def new_positions(at: CacheEntries) -> Tensor:
    """(P, B, length) int64, what the rotary embedding was given for the new tokens."""
    run, batch = at.run, at.run.tokens.modality.shape[0]
    positions = run.positions
    if positions is None:
        raise RuntimeError("the model did not call its rotary embedding, so positions of its keys are not known")
    positions = (positions if positions.ndim == 3 else positions[None]).expand(-1, batch, -1)
    lowered = torch.zeros_like(positions[0])
    if run.removed is not None and run.index is not None:
        lowered = lowered.scatter(1, run.index, run.removed.to(lowered.dtype))
    earlier = at.entries.removed  # before this forward too
    if earlier is not None and run.removed_in_all is not None:
        earlier = earlier - run.removed_in_all.to(earlier.device)
    return positions - lowered - (0 if earlier is None else earlier)
