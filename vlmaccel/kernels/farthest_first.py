"""Farthest-first order: points that are picked one after the other, each as far as can be from those before it.

It is how DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175, section 3.2) solves its Max-Min diversity problem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("farthest_first(Tensor distance, Tensor start, int kept) -> Tensor")

farthest_first = torch.ops.vlmaccel.farthest_first.default
"""farthest_first(distance, start, kept) -> (kept,) int64: which points are picked, the first one first, none twice.

The first is `start`, and each further one that whose nearest picked point is farthest. Ties go to the lowest index.

distance: (m, m) float, in row i how far each point is from point i, above -inf; the diagonal does not matter. start: (1,) int64.
kept: from 1 to m. With a NaN among the distances the picks are undefined, but below m.
"""


def reference(distance: Tensor, start: Tensor, kept: int) -> Tensor:
    """The same, point by point."""
    rows, picked = distance.double().tolist(), start.tolist()
    while len(picked) < kept:
        left = [j for j in range(len(rows)) if j not in picked]
        picked.append(max(left, key=lambda j: min(rows[i][j] for i in picked)))  # the first one of equals
    return torch.tensor(picked)


def _torch_form(distance: Tensor, start: Tensor, kept: int) -> Tensor:
    picked = [start]
    left = distance.index_select(0, start)[0]
    for _ in range(kept - 1):  # indices stay on the device: a GPU is not waited for
        left.index_fill_(0, picked[-1], -torch.inf)
        picked.append(left.argmax(0, keepdim=True))
        left = torch.minimum(left, distance.index_select(0, picked[-1])[0])
    return torch.cat(picked)


def _fake(distance: Tensor, start: Tensor, kept: int) -> Tensor:
    return distance.new_empty(kept, dtype=torch.long)


_LIB.impl("farthest_first", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("farthest_first", gpu_form("farthest_first", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::farthest_first", _fake, lib=_LIB)
