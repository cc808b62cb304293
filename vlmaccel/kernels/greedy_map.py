"""Greedy MAP inference of a determinantal point process: items that are picked one after the other, each so that the
determinant of the kernel among all picked grows most (Chen et al., NeurIPS 2018, arXiv 1709.05135).

It is how CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967, section 3.2) picks tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("greedy_map(Tensor kernel, Tensor least, int most) -> (Tensor, Tensor)")

greedy_map = torch.ops.vlmaccel.greedy_map.default
"""greedy_map(kernel, least, most) -> picked, rows: which items are picked, the first one first, none twice.

An item's gain is by what factor it makes the determinant larger: at first its diagonal value, then less with each pick. The
item with the largest gain is picked, ties go to the lowest index, for `most` picks or as long as that gain is above `least`.

kernel: (c, c) float, symmetric and positive semidefinite. least: () of its dtype, not below 0. most: at least 1.
picked: (most,) int64, -1 behind the last pick. rows: (most, c) of the kernel's dtype, of the incomplete Cholesky decomposition:
rows.mT @ rows is the kernel as far as the picked items explain it, all of it in their rows; a row is nearly 0 at earlier picks,
and 0 behind the last one. With a NaN in the kernel both are undefined, but picks are below c and come once.
"""


def reference(kernel: Tensor, least: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The same, by elimination in float64."""
    left, picked = kernel.double(), torch.full((most,), -1)
    rows = left.new_zeros(most, len(left))
    for number in range(most):
        gain = left.diagonal().clone()
        gain[picked[:number]] = -torch.inf
        best = int((gain == gain.max()).nonzero()[0])
        if not gain[best] > least:
            break
        picked[number], rows[number] = best, left[best] / gain[best].sqrt()
        left = left - rows[number].outer(rows[number])
    return picked, rows.to(kernel.dtype)


def _torch_form(kernel: Tensor, least: Tensor, most: int) -> tuple[Tensor, Tensor]:
    gain = kernel.diagonal().clone()
    picked = gain.new_full((most,), -1, dtype=torch.long)
    rows = kernel.new_zeros(most, len(kernel))
    for number in range(most):
        best = gain.argmax(0, keepdim=True)
        most_gain = gain.index_select(0, best)
        if not bool(most_gain > least):  # waits for a GPU
            break
        row = kernel.index_select(0, best)[0] - rows[:number].index_select(1, best)[:, 0] @ rows[:number]
        picked[number : number + 1], rows[number] = best, row / most_gain.sqrt()
        gain = (gain - rows[number] ** 2).index_fill_(0, best, -torch.inf)
    return picked, rows


def _fake(kernel: Tensor, least: Tensor, most: int) -> tuple[Tensor, Tensor]:
    return kernel.new_empty(most, dtype=torch.long), kernel.new_empty(most, len(kernel))


_LIB.impl("greedy_map", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("greedy_map", gpu_form("greedy_map", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::greedy_map", _fake, lib=_LIB)
