"""PyramidKV: SnapKV with more entries in the first layers than in the last.

Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmaccel.hooks import CacheEntries
from vlmaccel.methods.budget import divide, entries_of
from vlmaccel.methods.eviction import Observed


@dataclass(frozen=True)
class PyramidKV(Observed):
    """The scores of SnapKV with budgets that fall from layer to layer in equal steps.

    Of the mean budget c beside the window, the last layer keeps c / beta and the first 2c - c / beta (section 4.2). Where
    the official code's whole divisions lose entries, ours sum to the whole budget.
    beta: default 20 (the official code's). For the rest see `SnapKV`.
    """

    name = "pyramidkv"

    sinks: int = 0
    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta is a ratio of budgets, 1 or more, not {self.beta!r}")

    def layer_budget(self, at: CacheEntries) -> Tensor:
        mean, tokens = entries_of(self.budget, at), entries_of(1.0, at)
        window = torch.full_like(mean, self.window).minimum(mean)
        step = torch.linspace(2 - 1 / self.beta, 1 / self.beta, at.depth, device=mean.device, dtype=torch.double)
        weight = step.expand(len(mean), -1)
        low, high = torch.zeros_like(mean)[:, None], (tokens - window)[:, None]
        return window + divide(weight, (mean - window) * at.depth, low, high)[:, at.layer]
