"""SparseVLM: in stages, keep the visual tokens that the words about them look at, and gather some of the others.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025,
arXiv 2410.04417. Counts and details as in version 1.5 of the official code, and in its version 2.0, SparseVLM+.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from vlmaccel.hooks import Attention, DecoderLayer, Positions, VisualTokens
from vlmaccel.kernels.attention_rows import a_few_at_a_time
from vlmaccel.methods.merging import Grouping
from vlmaccel.methods.selection import (
    at_least_one,
    check_choice,
    check_layer,
    check_ratio,
    to_logical,
    to_remaining,
)
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality

VISUAL = 576  # tokens that the official counts are for
HEADS = 14 / 32  # share of the heads that SparseVLM+ averages over


@dataclass(frozen=True)
class SparseVLM(Grouping):
    """Keep, in stages, the visual tokens that the words about them look at, and gather some of the others.

    After some layers, the tokens of every picture are ranked by the attention of its raters there, the last are
    dropped, and three tenths of what was dropped are merged into a tenth of that (section 3). Raters are the words
    behind a picture, up to the prompt's end, that its projected tokens take to most: those whose softmax over words,
    the mean over the tokens, is above its mean (section 3.1). All words where none is; the prompt's last token where
    there are no words. Ranked by the mean over raters and heads. The first of the dropped are clustered by density
    peaks (DPC-KNN) of their hidden states, each cluster becomes its plain mean; equal densities rank by place, where
    the official code adds noise. A cluster stands where its centre does, not behind the picture.

    tokens: 192 (default), 128, 96 or 64, the official names of the counts 300, 200, 110; 303, 110, 36; 238, 48, 26;
        66, 30, 17 of 576, scaled to the tokens of a picture. Clusters come on top: the mean over 32 layers is 206.5,
        145.4, 114.1, 82.3.
    layers: decoder layers (0-based) whose output is reduced; default those at 2/32, 6/32 and 15/32 of the depth.
    ratios: kept fraction of the original count at every stage, in place of `tokens`.
    positions: default None, renumbered as in the official code, but kept in models with three positions a token.
    prop_attn: weigh a cluster as its number of tokens; default off, as published.
    """

    name = "sparsevlm"
    target = "image"
    counts: ClassVar[Mapping[int, tuple[int, ...]]] = {
        192: (300, 200, 110),
        128: (303, 110, 36),
        96: (238, 48, 26),
        64: (66, 30, 17),
    }

    tokens: int = 192
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    positions: Positions | None = None
    prop_attn: bool = False

    def __post_init__(self) -> None:
        check_choice("tokens", self.tokens, tuple(self.counts))
        for name in ("layers", "ratios"):
            if getattr(self, name) is not None:  # a list is as good, but a frozen dataclass has to be hashable
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for layer in self.layers or ():
            check_layer(layer)
        for ratio in self.ratios or ():
            check_ratio(ratio)
        if list(self.layers or ()) != sorted(set(self.layers or ())):
            raise ValueError(f"layers of the stages must increase, not {self.layers}")
        ratios, stages = self._ratios(), 3 if self.layers is None else len(self.layers)
        if len(ratios) != stages:
            raise ValueError(f"{stages} stages need as many ratios, not {len(ratios)}")
        if list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(f"ratios are fractions of the original count and cannot grow, not {ratios}")
        check_choice("positions", self.positions, (None, *get_args(Positions)))

    def _ratios(self) -> tuple[float, ...]:
        return self.ratios or tuple(count / VISUAL for count in self.counts[self.tokens])

    def stages(self, depth: int) -> Mapping[int, float]:
        if self.layers is not None:
            first = [layer + 1 for layer in self.layers]
        else:
            first = [max(depth * layer // 32, i) + 1 for i, layer in enumerate((2, 6, 15))]
            first = [layer for layer in first if layer < depth]
        return dict(zip(first, self._ratios(), strict=False))

    def attention_layers(self, depth: int) -> Sequence[int]:
        return tuple(layer - 1 for layer, ratio in self.stages(depth).items() if ratio < 1)

    def count(self, n: Tensor, ratio: float) -> Tensor:
        return at_least_one((n.double() * ratio).round().long(), ratio)

    @torch.no_grad()
    def visual_tokens(self, at: VisualTokens) -> None:
        """Remember the raters, (B, S, length) bool for S pictures."""
        image, modality = at.tokens.image.to(at.hidden.device), at.tokens.modality.to(at.hidden.device)
        pictures = int(image.max()) + 1
        if not pictures:
            return
        place = torch.arange(at.run.length, device=image.device).expand(len(image), -1)
        place = place if at.run.index is None else at.run.index.to(image.device)
        end = at.run.query.amax(1).to(image.device)
        rates = torch.zeros(len(image), pictures, at.run.length, dtype=torch.bool, device=image.device)
        for sample in range(len(image)):
            for number in image[sample].unique().tolist():
                if number < 0:
                    continue
                visual = (image[sample] == number).nonzero().flatten()
                words = (modality[sample] == Modality.TEXT) & (place[sample] <= end[sample])
                words[: int(visual[-1])] = False
                text = words.nonzero().flatten()
                chosen = raters(at.hidden[sample, visual], at.hidden[sample, text]) if len(text) else None
                rates[sample, number, end[sample] if chosen is None else place[sample, text[chosen]]] = True
        at.run.memory[self, "raters"] = rates

    def attention(self, at: Attention) -> None:
        rates, image = at.run.memory.get((self, "raters")), at.tokens.image
        if rates is None or int(image.max()) < 0:
            return
        image = image.to(rates.device)
        if at.run.index is not None:
            rates = rates.gather(2, at.run.index.to(rates.device)[:, None].expand(-1, rates.shape[1], -1))
        weight = rates / rates.sum(2, keepdim=True).clamp(min=1)  # (B, S, n)
        some = rates.any(1)
        rows = (~some).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(some.sum(1).max())]
        total: Tensor | float = 0.0
        for part in a_few_at_a_time(rows, image.shape[1]):
            of = weight.gather(2, part[:, None].expand(-1, weight.shape[1], -1)).transpose(1, 2)  # (B, Q, S)
            of = of.gather(2, image.clamp(min=0)[:, None].expand(-1, of.shape[1], -1))  # (B, Q, n)
            total = total + (self.rated(at, part) * of[:, None].to(at.hidden.device)).sum(2)
        assert isinstance(total, Tensor)
        at.run.memory[self] = to_logical(at, self.over_heads(total, image.to(total.device)))

    def rated(self, at: Attention, rows: Tensor) -> Tensor:
        """(B, H, Q, n) float32, what some rows, (B, Q) int64, say of each token."""
        return at.scores.rows(rows)

    def over_heads(self, rated: Tensor, image: Tensor) -> Tensor:
        """(B, n) of what the raters say in each head, (B, H, n). image: (B, n), of each token, -1 for none."""
        return rated.mean(1)

    def represent(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        score = to_remaining(at, at.run.memory[self])[sample, index.to(at.hidden.device)]
        if bool(score.isnan().any()):
            raise ValueError(
                f"{self.name}: the scores before decoder layer {at.layer} are NaN, so the hidden states are not finite; "
                "load the model in bfloat16 or float32"
            )
        best_first = score.argsort(descending=True, stable=True)
        chosen = torch.full_like(best_first, -1)
        chosen[best_first[:kept]] = best_first[:kept]
        recycled = best_first[kept : kept + self.recycled(len(index) - kept)]
        if len(recycled):
            centre = density_peaks(at.hidden[sample, index.to(at.hidden.device)[recycled]], len(recycled) // 10 + 1)
            chosen[recycled] = recycled[centre]
        return chosen.to(index.device)

    def recycled(self, dropped: int) -> int:
        """How many of the dropped tokens are merged."""
        return int(0.3 * dropped) + 1

    def merged(self, at: VisualTokens, reduction: Reduction) -> Tensor:
        return reduction.apply(at.hidden)  # a plain mean, whatever its members stand for


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """SparseVLM without merging, its attention freed from what rotary positions do to it.

    The attention of each rater is divided by the mean cosine of the angles by which rotary positions turn it and the
    token apart (at least 0.05), then the heads in which the raters look at the picture most are averaged, 14 of 32.

    tokens: 192 (default), 128, 96 or 64: 300, 200, 118; 238, 108, 60; 246, 54, 28; 66, 34, 20 of 576; the mean over 32
        layers is 206.8, 144.1, 113.9, 81.8. positions: default "keep", as in the official code. layers, ratios: see
        `SparseVLM`.
    """

    name = "sparsevlm-plus"
    counts: ClassVar[Mapping[int, tuple[int, ...]]] = {
        192: (300, 200, 118),
        128: (238, 108, 60),
        96: (246, 54, 28),
        64: (66, 34, 20),
    }

    positions: Positions | None = "keep"

    def rated(self, at: Attention, rows: Tensor) -> Tensor:
        return at.scores.rows(rows) / at.scores.turned(rows).clamp(min=0.05)[:, None]

    def over_heads(self, rated: Tensor, image: Tensor) -> Tensor:
        pictures = torch.arange(int(image.max()) + 1, device=image.device)
        ours = (image[:, None] == pictures[:, None]).float()  # (B, S, n)
        heads = round(rated.shape[1] * HEADS)
        best = (rated @ ours.mT).topk(max(1, heads), 1).indices  # (B, heads, S)
        best = best.gather(2, image.clamp(min=0)[:, None].expand(-1, best.shape[1], -1))  # (B, heads, n)
        return rated.gather(1, best).mean(1)

    def recycled(self, dropped: int) -> int:
        return 0


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """(T,) bool, the words, of text (T, D), that visual tokens (N, D) take to more than to the mean word; all if none is."""
    taken_to = (visual.float() @ text.float().T).softmax(1).mean(0)
    chosen = taken_to > taken_to.mean()
    return chosen if bool(chosen.any()) else torch.ones_like(chosen)


def density_peaks(x: Tensor, clusters: int) -> Tensor:
    """(m,) int64, the centre that each row of x (m, d) joins, centres themselves: DPC-KNN; ties go to the lowest index.

    Centres are the rows of highest density exp(-mean squared distance to the `clusters` nearest, itself one of them)
    times distance to the nearest denser row. Distances are divided by sqrt(d).
    """
    x = x.double()  # so that products are exact enough for the distances of rows that are nearly equal
    length = x.square().sum(1)
    square = length[:, None] + length - 2 * x @ x.mT
    square.masked_fill_(square < 1e-12 * (length[:, None] + length), 0)  # rows that are equal
    distance = (square / x.shape[1]).sqrt()
    density = (-distance.topk(min(clusters, len(x)), largest=False).values.square().mean(1)).exp()
    order = density.argsort(descending=True, stable=True)
    rank = order.argsort()
    apart = distance.masked_fill(rank >= rank[:, None], torch.inf).amin(1)
    apart[order[0]] = distance.max()
    centres = (density * apart).argsort(descending=True, stable=True)[:clusters]
    joined = centres[distance[:, centres].argmin(1)]
    joined[centres] = centres
    return joined
