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
from vlmaccel.kernels.greedy_map import greedy_map
from vlmaccel.methods.greedy import Greedy, cosines
from vlmaccel.methods.selection import check_choice
from vlmaccel.run import Modality

# Among so many tokens it is picked before the rows of all are worked out again. On a GPU p picks among c tokens read 2 p² c bytes,
# at 100 GB/s, and such a round may cost half a millisecond more: by that count 1,024 of 4,096 tokens take 6 rounds and 9 ms
# among 1,024, 11 rounds and 7 ms among 512. In between, pictures of 576 and 729 tokens need a single round.
CANDIDATES = 256
CANDIDATES_ON_GPUS = 768
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
    candidates = CANDIDATES if kernel.device.type == "cpu" else CANDIDATES_ON_GPUS
    gain = kernel.diagonal().clone()
    rank_floor = 1e-6 * gain.max()
    rows = kernel.new_zeros(kept, len(kernel))
    order = gain.new_empty(0, dtype=torch.long)
    while True:
        # Gains only fall. So long as one of the first few has more than any other had, it is the best of all, and the others'
        # rows wait, to be worked out in one product. Where one of the others had as much as the best, all of the few had, and
        # these come first: then it is enough to have more than just less.
        few = gain.argsort(descending=True, stable=True)[:candidates].sort().values
        elsewhere, best = gain.index_fill(0, few, -torch.inf).max(), gain.max()
        least = elsewhere.minimum(best.nextafter(torch.full_like(best, -torch.inf))).maximum(rank_floor)
        before = rows[: len(order)]
        near = before.index_select(1, few)
        among = kernel.index_select(0, few).index_select(1, few) - near.mT @ near
        among.diagonal().copy_(gain[few])
        picked, own_rows = greedy_map(among, least, min(kept - len(order), len(few)))
        picked = picked[: int((picked >= 0).sum())]  # the one time in a round that a GPU is waited for
        new = few[picked]
        order = torch.cat([order, new])
        if len(new) == 0 or len(order) == kept or len(few) == len(kernel):
            break
        own = own_rows[: len(new)].index_select(1, picked).mT.tril()
        open_rows = kernel.index_select(0, new) - before.index_select(1, new).mT @ before
        new_rows = torch.linalg.solve_triangular(own, open_rows, upper=False)
        rows[len(before) : len(order)] = new_rows
        gain = (gain - new_rows.square().sum(0)).index_fill_(0, new, -torch.inf)
    rest = then.index_fill(0, order, -torch.inf).argsort(descending=True, stable=True)
    return torch.cat([order, rest[: kept - len(order)]])
