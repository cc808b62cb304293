"""Farthest-first order: points that are picked one after the other, each as far as can be from those before it.

It is how DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175, section 3.2) solves its Max-Min diversity problem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("farthest_first(Tensor distance, int kept) -> Tensor")

farthest_first = torch.ops.vlmaccel.farthest_first.default
"""farthest_first(distance, kept) -> (kept,) int64: which points are picked, the first one first, none twice.

The first is the point whose nearest other point is farthest, and each further one that whose nearest picked point is. Ties go
to the lowest index.

distance: (m, m) float, in row i how far each point is from point i, above -inf; the diagonal does not matter. kept: from 1 to
m. With a NaN among the distances the picks are undefined, but below m. Memory beside input and output: a copy of the distances.
"""


def reference(distance: Tensor, kept: int) -> Tensor:
    """The same, point by point."""
    rows = distance.double().tolist()
    points = range(len(rows))

    def nearest(j: int, others: range | list[int]) -> float:
        return min((rows[i][j] for i in others if i != j), default=torch.inf)

    picked = [max(points, key=lambda j: nearest(j, points))]  # the first one of equals
    while len(picked) < kept:
        picked.append(max((j for j in points if j not in picked), key=lambda j: nearest(j, picked)))
    return torch.tensor(picked)


def first(distance: Tensor) -> Tensor:
    """(1,) int64, the first pick."""
    return distance.clone().fill_diagonal_(torch.inf).amin(0).argmax(0, keepdim=True)


def _torch_form(distance: Tensor, kept: int) -> Tensor:
    picked = [first(distance)]
    left = distance.index_select(0, picked[0])[0]
    for _ in range(kept - 1):  # indices stay on the device: a GPU is not waited for
        left.index_fill_(0, picked[-1], -torch.inf)
        picked.append(left.argmax(0, keepdim=True))
        left = torch.minimum(left, distance.index_select(0, picked[-1])[0])
    return torch.cat(picked)


def _fake(distance: Tensor, kept: int) -> Tensor:
    return distance.new_empty(kept, dtype=torch.long)


_LIB.impl("farthest_first", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("farthest_first", gpu_form("farthest_first", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::farthest_first", _fake, lib=_LIB)
