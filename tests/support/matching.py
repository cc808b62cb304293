"""Whether a bipartite matching is right, where roundings may decide between tokens that are almost as like."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmaccel.kernels.bipartite_match import merged


def assert_matches(metric: Tensor, r: int, prefix: int, keep: Tensor, group: Tensor, near: float) -> None:
    """`keep`, `group` are what bipartite_match(metric, r, prefix) may give, with cosines off by no more than `near`."""
    batch, n, _ = metric.shape
    r = merged(n, r, prefix)
    index = torch.arange(n, device=metric.device)
    a, b = (index[(index >= prefix) & (index % 2 == odd)] for odd in (0, 1))
    assert keep.dtype == group.dtype == torch.int64
    assert keep.shape == (batch, n - r) and group.shape == (batch, n)
    assert torch.equal(group.gather(1, keep), index[: n - r].expand(batch, -1)), "a slot stands for a token of its own"
    if r == 0:
        assert torch.equal(keep, index.expand(batch, -1))
        return
    assert torch.equal(keep[:, :prefix], index[:prefix].expand(batch, -1))
    assert torch.equal(keep[:, n - r - len(b) :], b.expand(batch, -1))
    left = keep[:, prefix : n - r - len(b)]
    unit = normalize(metric.double(), dim=-1, eps=1e-6)
    for x, kept, stands in zip(unit, left, keep.gather(1, group), strict=True):
        cosine = x[a] @ x[b].mT
        best = cosine.amax(1)
        is_left = torch.isin(a, kept)
        assert is_left.sum() == len(kept) == len(a) - r
        partner = torch.searchsorted(b, stands[a[~is_left]])
        assert torch.equal(b[partner], stands[a[~is_left]]), "an A token joins a B token"
        chosen = cosine[~is_left].gather(1, partner[:, None])[:, 0]
        assert (chosen >= best[~is_left] - near).all(), "joins one that is not its likest"
        if is_left.any():
            assert best[~is_left].min() >= best[is_left].max() - near, "others are more alike"
            order = kept if prefix else -best[torch.searchsorted(a, kept)]
            assert (order.diff() >= (1 if prefix else -near)).all(), "order of the slots"
