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

CANDIDATES = 256  # among which it is picked before the rows of all tokens are worked out again
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
        return largest_determinant(cosines(x).mul_(r).mul_(r[:, None]), kept, r)


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
    candidates = CANDIDATES if kernel.device.type == "cpu" else len(kernel)  # with all of them, a GPU is not waited for
    gain = kernel.diagonal().clone()
    rank_floor = 1e-6 * gain.max()
    rows = kernel.new_zeros(kept, len(kernel))
    picked: list[Tensor] = []
    gains: list[Tensor] = []
    while len(picked) < kept:
        # Gains only fall. So long as one of the first few has more than any other had, it is the best of all, and the others'
        # rows wait, to be worked out in one product.
        few = gain.argsort(descending=True, stable=True)[:candidates].sort().values
        elsewhere = gain.index_fill(0, few, -torch.inf).max()
        near, mine, first = rows.index_select(1, few), gain[few], len(picked)
        among = kernel.index_select(0, few).index_select(1, few)
        while (number := len(picked)) < kept:
            best = mine.argmax(0, keepdim=True)
            if number > first and len(few) < len(kernel) and not bool(mine[best] > elsewhere):
                break
            picked.append(few[best])
            gains.append(mine[best])
            row = among.index_select(0, best)[0] - near[:number].index_select(1, best)[:, 0] @ near[:number]
            near[number] = row / gains[-1].sqrt()
            mine = (mine - near[number] ** 2).index_fill_(0, best, -torch.inf)
        if number == kept or not bool(torch.cat(gains[first:]).min() > rank_floor):
            break
        new = torch.cat(picked[first:])
        own = near[first:number].index_select(1, torch.searchsorted(few, new)).mT.tril()
        open_rows = kernel.index_select(0, new) - rows[:first].index_select(1, new).mT @ rows[:first]
        rows[first:number] = torch.linalg.solve_triangular(own, open_rows, upper=False)
        gain = (gain - rows[first:number].square().sum(0)).index_fill_(0, new, -torch.inf)
    independent = (torch.cat(gains) > rank_floor).cumprod(0).sum()
    order = torch.cat(picked)[:independent]
    rest = then.clone().index_fill(0, order, -torch.inf).argsort(descending=True, stable=True)
    return torch.cat([order, rest[: kept - len(order)]])
