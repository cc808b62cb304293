"""From a boolean choice to a list of numbers."""

from __future__ import annotations

from torch import Tensor


def places(chosen: Tensor) -> Tensor:
    """(..., k) int64, where `chosen` (..., n) bool is true along the last dimension, ascending, -1 behind; k is the most of
    all."""
    most = int(chosen.sum(-1).max()) if chosen.numel() else 0
    order = (~chosen).byte().argsort(dim=-1, stable=True)[..., :most]
    return order.masked_fill(~chosen.gather(-1, order), -1)
