"""VisPruner: keep the patches that the vision tower looks at, and of the others those that are unlike one another.

Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025,
arXiv 2412.01818.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.greedy import Greedy, cosines
from vlmaccel.methods.selection import check_share

ROUND = 8  # patches dropped at a time, as in the official code
MANY = 1000  # patches; of fewer, whole rows are searched as fast
NEAREST = 32  # of a row's neighbours are looked at first; 16 to 32 are as fast, more are slower


@dataclass(frozen=True)
class VisPruner(Greedy):
    """Keep the patches that the vision tower looks at, and of the others those that are unlike one another.

    Before the decoder, part of the budget goes to the patches that get the most of the tower's attention; of the
    others, those most like another are dropped, 8 at a time, until the rest of the budget is left (section 3.2). The
    attention is as in `vlmaccel.methods.VisionZip`. Likeness is the cosine of what goes into the projector (in
    Qwen-VL, of tokens), between every other patch and those in between, in order of their attention.

    ratio: retention ratio, int(N * ratio) tokens stay; default 1/9, 64 of 576 (section 4.1).
    important: share of them that is kept by attention, rounded down; default 0.5 (section 4.1). The official code
        fails where the others are odd in number, or fewer than 8 are to stay; here the last patch is compared too, and
        fewer are dropped.
    layer, positions, target: see `Greedy`. Newlines between patches go first. Memory grows as the square of an image's
        tokens.
    """

    name = "vispruner"
    sees_patches = True

    ratio: float = 1 / 9
    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "text":
            raise ValueError('vispruner ranks the tokens of pictures: target is "image" or None')
        check_share("important", self.important)

    def pick(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        patches = at.patches
        row = patches.row[sample, index.to(patches.row.device)]
        order = patches.attention[row].masked_fill(row < 0, -torch.inf).argsort(descending=True, stable=True)
        important = int(kept * self.important)
        found = max(important, int((row >= 0).sum()))
        rest, newlines = order[important:found], order[found:]
        diverse = rest[unlike(patches.features[row[rest]], min(kept - important, len(rest)))]
        return torch.cat([order[:important], diverse, newlines])[:kept].to(index.device)


def unlike(x: Tensor, kept: int) -> Tensor:
    """(kept,) int64, which rows of x (m, d) are left when those most like another are dropped, 8 at a time.

    In each round the rows at even places of the list are compared with those at odd ones. The even ones that are left
    come first in the next list, by falling likeness; then the odd ones.
    """
    cosine = cosines(x)
    # on GPUs whole rows are copied fast, and to ask which rows `highest` missed would be a wait in every round
    near = cosine.topk(NEAREST) if len(x) >= MANY and x.device.type == "cpu" else None
    left = torch.arange(len(x), device=x.device) if kept else x.new_empty(0, dtype=torch.long)
    while len(left) > kept:
        even, odd = left[::2], left[1::2]
        # other columns are hidden, since rows are copied far faster than columns
        others = cosine.new_full((len(x),), -torch.inf).index_fill_(0, odd, 0)
        alike = highest(cosine, even, others, near).argsort(descending=True, stable=True)
        dropped = min(ROUND, len(left) - kept, len(even))
        left = torch.cat([even[alike[dropped:]], odd])
    return left


def highest(cosine: Tensor, rows: Tensor, others: Tensor, near: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(n,) float32, the highest values in these rows (n,) of cosine (m, m), after others (m,), 0 or -inf, are added.

    near: values and columns of the highest K in each row of cosine, both (m, K). Where not all of these are hidden, the
        highest that is not is what is looked for; only the other rows are copied whole.
    """
    if near is None:
        return cosine.index_select(0, rows).add_(others).amax(1)
    values, columns = (x.index_select(0, rows) for x in near)
    hidden = others.index_select(0, columns.flatten()).view_as(columns)  # five times as fast as others[columns]
    found = (values + hidden).amax(1)
    missed = found.isinf().nonzero().flatten()
    return found.index_copy_(0, missed, highest(cosine, rows[missed], others))
