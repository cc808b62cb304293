"""ToMe's merging, before a layer of a decoder: neighbours whose keys are alike become one token.

Bipartite soft matching of Bolya et al., arXiv 2210.09461, limited to neighbours in the picture, so that a merged token
has a place; log-size attention and its place as RESTORE found best (arXiv 2606.01711).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.merging import Merging
from vlmaccel.methods.selection import places


@dataclass(frozen=True)
class ToMeDecoder(Merging):
    """Merge neighbouring tokens of the same image by the cosine of their keys in a decoder layer.

    In rounds, until the budget is met: every other token looks among the others for the likest one that is at most 1 row
    and column away, in the next round 2, then 4; the best matched join. Keys are the layer's own, without rotary
    positions, averaged over heads. Text merges along the line.

    layer (default 2), ratio (default 0.5), prop_attn (default on), position (default "median"), and the others:
    see `Merging`.
    """

    name = "tome-decoder"

    def join(self, at: DecoderLayer, sample: int, index: Tensor, kept: int) -> Tensor:
        keys = at.scores.keys()[sample, :, index].float().mean(0)
        if bool(keys.isnan().any()):
            raise ValueError(
                f"{self.name}: the keys of decoder layer {at.layer} are NaN, so the hidden states are not finite; "
                "load the model in bfloat16 or float32"
            )
        size = torch.ones_like(index) if at.size is None else at.size[sample, index]
        return merge_down(keys, size, places(at)[sample, index], at.tokens.grid[sample, index, 0], kept)


def merge_down(metric: Tensor, size: Tensor, place: Tensor, view: Tensor, kept: int) -> Tensor:
    """(m,) int64, the group that each of m tokens joins when `kept` groups are to be left.

    metric: (m, d) float32. size: (m,) tokens that each stands for. place: (m, 2) row and column, in the grid `view` (m,).
    """
    label = torch.arange(len(metric), device=metric.device)
    row, column = place.unbind(1)
    total, left, reach = metric * size[:, None], label, 1
    while len(left) > kept:
        a, b = left[::2], left[1::2]
        unit = normalize(total, dim=-1, eps=1e-6)
        away = (row[a][:, None] - row[b]).abs().maximum((column[a][:, None] - column[b]).abs())
        away += (view[a][:, None] != view[b]) * 2**20
        best, partner = (unit[a] @ unit[b].T).masked_fill(away > reach, -torch.inf).max(1)
        r = min(len(left) - kept, int((best > -torch.inf).sum()))
        source = best.argsort(descending=True, stable=True)[:r]
        into = torch.arange(len(metric), device=metric.device)
        into[a[source]] = b[partner[source]]
        total = total.index_add(0, into[a[source]], total[a[source]])
        label, left, reach = into[label], left[into[left] == left], 2 * reach
    return label
