"""Merging tokens: the mean of every group's members, weighted by how many tokens each stands for already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("merge_tokens(Tensor x, Tensor group, Tensor? size, int n) -> Tensor")

merge_tokens = torch.ops.vlmaccel.merge_tokens.default
"""merge_tokens(x, group, size, n) -> (B, n, C): the size-weighted mean of every slot's members.

x: (B, N, C) float. group: (B, N) int64, slot from 0 to n - 1 that each token joins, -1 for one that is dropped.
size: (B, N), tokens that each one stands for already, or None where all are 1. A slot with one member of any size is
that member to the bit; a slot without members, or with members of size 0 only, is 0. Differentiable in x.

On CPUs this is one weighted segment sum (embedding_bag), which `vlmaccel bench vit --operations` times beside others.
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


def slots(group: Tensor, n: int) -> Tensor:
    """(B * N,): the slot of every token, counted over the batch, B * n for one that is dropped."""
    batch = group.shape[0]
    if batch == 1:
        return group[0].remainder(n + 1)
    first = torch.arange(batch, device=group.device).mul_(n)[:, None]
    return (group + first).masked_fill_(group < 0, batch * n).flatten()


def _shares(slot: Tensor, x: Tensor, size: Tensor | None, n: int) -> Tensor:
    """(B * N,): the share that every token has of its slot, in the dtype of x."""
    exact = torch.promote_types(x.dtype, torch.float)
    weight = x.new_ones(slot.shape, dtype=exact) if size is None else size.flatten().to(exact)
    total = weight.new_zeros(x.shape[0] * n + 1).index_add_(0, slot, weight)
    return (weight / total.clamp_(min=1e-9).index_select(0, slot)).to(x.dtype)


def by_slot(slot: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by slot, which keep their order in it, and where each slot starts, the end (of those kept) included.

    slot: (B * N,), from 0 to `count`. Returns (B * N,) and (count + 1,), both int64.
    """
    ordered, order = slot.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=slot.device))


def _torch_form(x: Tensor, group: Tensor, size: Tensor | None, n: int) -> Tensor:
    batch, _, width = x.shape
    slot = slots(group, n)
    order, start = by_slot(slot, batch * n)  # the last bag is what is dropped
    rows, share = x.reshape(-1, width), _shares(slot, x, size, n).index_select(0, order)
    out = embedding_bag(order, rows, start, mode="sum", per_sample_weights=share)
    return out[: batch * n].view(batch, n, width)


def _fake(x: Tensor, group: Tensor, size: Tensor | None, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n, x.shape[2])


def _keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, group, size, ctx.n = inputs
    ctx.save_for_backward(group, size)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    group, size = ctx.saved_tensors
    share = _shares(slots(group, ctx.n), grad, size, ctx.n).view(group.shape).masked_fill(group < 0, 0)
    return (
        grad.gather(1, group.clamp(min=0)[..., None].expand(-1, -1, grad.shape[2])) * share[..., None],
        None,
        None,
        None,
    )


_LIB.impl("merge_tokens", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("merge_tokens", gpu_form("merge_tokens", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::merge_tokens", _fake, lib=_LIB)
torch.library.register_autograd("vlmaccel::merge_tokens", _backward, setup_context=_keep_for_backward, lib=_LIB)
