"""Matching, merging and attention on their own: what they cost, and how other ways to compute them compare on this machine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, one_hot, scaled_dot_product_attention

from vlmaccel.adapters.mean_key import mean_key
from vlmaccel.evals.published_tome import match
from vlmaccel.evals.timing import clock_for, measure_in_turn
from vlmaccel.kernels.bipartite_match import bipartite_match
from vlmaccel.kernels.key_bias_attention import key_bias_attention, reference
from vlmaccel.kernels.merge_tokens import merge_tokens
from vlmaccel.reduction import Reduction
from vlmaccel.stats import TowerStats

CALLS = 20  # of an operation in a turn: one is too short to time


def merging_only(model: Any, pixels: Tensor, stats: TowerStats, operators: bool = False) -> Callable[[], None]:
    """A function that does what a patched forward does beside the model's own work: for every block, the mean of the
    keys, the matching, the merge of the residual stream, and the bookkeeping, over tensors of the same shapes.
    operators: matching and merging alone."""
    attention = model.blocks[0].attn
    heads, dim, batch = attention.num_heads, attention.head_dim, pixels.shape[0]
    draw = lambda *shape: torch.randn(*shape, device=pixels.device, dtype=pixels.dtype)  # noqa: E731
    work = [
        (draw(batch, n, 3, heads, dim).permute(2, 0, 3, 1, 4)[1], draw(batch, n, heads * dim), n - left)
        for n, left in pairwise(stats.tokens)
    ]

    metrics = [mean_key(keys) for keys, _, _ in work]

    @torch.no_grad()
    def matching_and_merging() -> None:
        size = None
        for metric, (_, hidden, r) in zip(metrics, work, strict=True):
            keep, group = bipartite_match(metric, r, stats.prefix)
            merge_tokens(hidden, group, size, keep.shape[1])
            size = torch.ones_like(keep)  # no block but the first goes without

    @torch.no_grad()
    def run() -> None:
        whole = None
        for keys, hidden, r in work:
            metric = mean_key(keys)
            here = Reduction.merge(*bipartite_match(metric, r, stats.prefix))
            here.apply(hidden, None if whole is None else whole.size)
            whole = here if whole is None else whole.then(here)
            whole.size.clamp(min=1).float().log()

    return matching_and_merging if operators else run


@torch.no_grad()
def attention_error(heads: int, tokens: int, dim: int, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Largest error of `key_bias_attention`, and of torch's fused attention with the bias as its mask, against float64."""
    query, key, value = (torch.randn(1, heads, tokens, dim, device=device).to(dtype) for _ in range(3))
    bias = torch.randint(1, 9, (1, tokens), device=device).float().log()
    want = reference(query.double(), key.double(), value.double(), bias, dim**-0.5)
    ours = key_bias_attention(query, key, value, bias, dim**-0.5)
    fused = scaled_dot_product_attention(query, key, value, attn_mask=bias.to(dtype)[:, None, None])
    return tuple((x.double() - want).abs().max().item() for x in (ours, fused))


def ways_to_match(metric: Tensor, r: int) -> dict[str, Callable[[], object]]:
    """Ours, and the forms that were slower."""

    def argmax() -> Tensor:
        unit = normalize(metric, dim=-1)
        scores = unit[:, ::2] @ unit[:, 1::2].mT
        partner = scores.argmax(-1)
        best = scores.gather(-1, partner[..., None])[..., 0]
        order = best.argsort(dim=-1, descending=True, stable=True)
        return torch.cat([order[:, r:].sort(dim=1).values, partner.gather(1, order[:, :r])], 1)

    return {
        "ours": lambda: bipartite_match(metric, r, 1),
        "as published": lambda: match(metric, r),
        "argmax and gather, not max": argmax,
    }


def ways_to_merge(x: Tensor, group: Tensor, n: int) -> dict[str, Callable[[], object]]:
    """Ours, and the forms that were slower."""
    batch, _, width = x.shape
    index = group[..., None].expand_as(x)
    flat = (group + n * torch.arange(batch, device=x.device)[:, None]).flatten()
    count = torch.zeros(batch, n, device=x.device).scatter_add(1, group, torch.ones(group.shape, device=x.device))
    scale = count[..., None].to(x.dtype)

    def sorted_segments() -> Tensor:
        order = flat.argsort()
        lengths = torch.bincount(flat, minlength=batch * n)
        return torch.segment_reduce(x.reshape(-1, width)[order], "mean", lengths=lengths)

    return {
        "ours (embedding_bag)": lambda: merge_tokens(x, group, None, n),
        "scatter_reduce, as published": lambda: x.new_zeros(batch, n, width).scatter_reduce(1, index, x, "sum") / scale,
        "index_add": lambda: (
            x.new_zeros(batch * n, width).index_add(0, flat, x.reshape(-1, width)).view(batch, n, width) / scale
        ),
        "one-hot product": lambda: one_hot(group, n).to(x.dtype).mT @ x / scale,
        "sort, segment_reduce": sorted_segments,
    }


def ways_to_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> dict[str, Callable[[], object]]:
    """Ours, and the forms that were slower."""
    scale, mask = query.shape[-1] ** -0.5, bias.to(query.dtype)[:, None, None]
    extra = (mask / scale).mT.expand(*key.shape[:3], 1)

    def folded() -> Tensor:
        q, k = torch.cat([query, torch.ones_like(extra)], -1), torch.cat([key, extra], -1)
        return scaled_dot_product_attention(q, k, torch.cat([value, torch.zeros_like(extra)], -1), scale=scale)[
            ..., :-1
        ]

    return {
        "ours": lambda: key_bias_attention(query, key, value, bias, scale),
        "whole softmax matrix, as published": lambda: ((query * scale) @ key.mT + mask).softmax(-1) @ value,
        "torch's fused attention, bias as mask": lambda: scaled_dot_product_attention(
            query, key, value, attn_mask=mask
        ),
        "torch's fused attention, bias as a channel": folded,
        "torch's fused attention, no bias": lambda: scaled_dot_product_attention(query, key, value),
    }


@torch.no_grad()
def compare_operations(
    batch: int, tokens: int, heads: int, dim: int, r: int, dtype: torch.dtype, device: str = "cpu", repeats: int = 5
) -> Table:
    """Every way to match, to merge and to attend, timed in turn at one shape."""
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    metric = key.mean(1, dtype=torch.float)
    keep, group = bipartite_match(metric, r, 1)
    x = torch.randn(batch, tokens, heads * dim, device=device).to(dtype)
    bias = torch.randint(1, 9, (batch, tokens), device=device).float().log()
    clock = clock_for(device)
    table = Table(
        title=f"{batch} x {tokens} tokens, {heads} heads of {dim}, r={r}, {str(dtype).removeprefix('torch.')}",
        caption=f"{'processor' if clock == 'cpu' else 'wall clock'} time of a call, and against ours in the same turn",
        box=box.SIMPLE_HEAD,
    )
    for column in ("", "way", "ms", "times ours"):
        table.add_column(column, justify="right" if column in ("ms", "times ours") else "left")
    for name, ways in (
        ("match", ways_to_match(metric, r)),
        ("merge", ways_to_merge(x, group, keep.shape[1])),
        ("attention", ways_to_attend(query, key, value, bias)),
    ):
        many = {way: (lambda call=call: [call() for _ in range(CALLS)] and None) for way, call in ways.items()}
        measured, ours = measure_in_turn(many, repeats, device=device), next(iter(ways))
        for way in ways:
            spent = measured.time(way, clock=clock).median / CALLS
            slower = measured.speedup(ours, way, clock=clock)
            table.add_row(name if way == ours else "", way, f"{1e3 * spent:.2f}", "1" if way == ours else f"{slower}")
    return table
