"""CDPruner: keep tokens that are unlike one another and matter to the question.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025,
arXiv 2506.10967.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.greedy import Greedy, cosines
from vlmaccel.methods.selection import check_choice
from vlmaccel.run import Modality

Relevance = Literal["like", "unlike", "none"]


@dataclass(frozen=True)
class CDPruner(Greedy):
    """Pick tokens by a determinantal point process: greedily the set with the largest determinant of L = diag(r) S diag(r),
    S the cosines of the projected tokens and r their relevance (section 3.2).

    relevance: to the text behind the image (behind all images where several stand together; the sample's other text where
        none follows): the mean cosine of a token with the words' input embeddings, from 0 to 1 within each image. "like":
        higher for what is like the text; "unlike": the other way round, which the official code takes with the CLIP text
        encoder that its models do not ship; "none": 1 for all.
    ratio: retention ratio; default 0.111, 64 of 576 tokens (section 4). No token is picked twice: where L has no more
        independent rows, the rest is picked by relevance. Time grows as the square of the kept tokens times all.
    layer, positions, target: see `Greedy`.
    """

    name = "cdpruner"

    ratio: float = 0.111
    relevance: Relevance = "like"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, get_args(Relevance))

    def pick(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        x = at.hidden[sample, index]
        r = torch.ones(len(index), device=x.device)
        if self.relevance != "none":
            text = at.hidden[sample, question(at, sample, index)]
            likeness = (normalize(x.float(), dim=-1) @ normalize(text.float(), dim=-1).mT).mean(1)
            r = from_0_to_1(likeness if self.relevance == "like" else -likeness)
        return largest_determinant(r[:, None] * cosines(x) * r, kept, r)


def question(at: DecoderLayer, sample: int, index: Tensor) -> Tensor:
    """(t,) int64, the text tokens up to the prompt's end behind the tokens `index`, or all of the sample's text there is."""
    modality = at.tokens.modality[sample]
    text = (modality == Modality.TEXT).nonzero().flatten()
    behind = text[text > index[-1]]
    return behind if len(behind) else text


def from_0_to_1(x: Tensor) -> Tensor:
    """x (m,) so that its least is nearly 0 and its largest 1; all 1 where all are equal, or where there is nothing (NaN)."""
    low, high = x.min(), x.max()
    if not bool(high > low):
        return torch.ones_like(x)
    return (x - low + 1e-6) / (high - low)


def largest_determinant(kernel: Tensor, kept: int, then: Tensor) -> Tensor:
    """(kept,) int64, greedy maximum of the determinant of kernel (m, m), by Cholesky updates; ties go to the lowest index.

    then: (m,), by what the rest is picked, the highest first, when all that is left depends on what is picked.
    """
    gain = kernel.diagonal().clone()
    rank_floor = 1e-6 * gain.max()
    rows = kernel.new_zeros(kept, len(kernel))
    picked: list[Tensor] = []
    gains: list[Tensor] = []
    for number in range(kept):  # indices stay on the device: a GPU is not waited for
        best = gain.argmax(0, keepdim=True)
        picked.append(best)
        gains.append(gain.index_select(0, best))
        before = rows[:number]
        row = kernel.index_select(0, best) - before.index_select(1, best).mT @ before
        rows[number] = row[0] / gains[-1].sqrt()
        gain = (gain - rows[number] ** 2).index_fill(0, best, -torch.inf)
    independent = (torch.cat(gains) > rank_floor).cumprod(0).sum()
    order = torch.cat(picked)[:independent]
    rest = then.clone().index_fill(0, order, -torch.inf).argsort(descending=True, stable=True)
    return torch.cat([order, rest[: kept - len(order)]])
