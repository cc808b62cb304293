"""How many cache entries may stay: a budget as ratio, tokens or bytes, and its division among layers and heads."""

from __future__ import annotations

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from torch import Tensor

from vlmaccel.hooks import CacheEntries

Budget = float | int | str


def check_budget(budget: Budget) -> None:
    """Raise ValueError unless `budget` is a ratio (float in (0, 1]), a number of tokens (int >= 1) or of bytes ("64MiB")."""
    if isinstance(budget, str):
        try:
            fits = convert_file_size_to_int(budget) > 0
        except ValueError:
            fits = False
    elif isinstance(budget, float):
        fits = 0 < budget <= 1
    else:
        fits = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    if not fits:
        raise ValueError(
            "budget is a retention ratio (a float, more than 0 and at most 1), a number of entries for each layer (an int, "
            f'1 or more) or of bytes for the whole cache of a sample (a str such as "64MiB"), not {budget!r}'
        )


def is_whole(budget: Budget) -> bool:
    """Whether the budget is all there is; 1 is one entry, 1.0 the whole."""
    return isinstance(budget, float) and budget == 1.0


def entries_of(budget: Budget, at: CacheEntries) -> Tensor:
    """(B,) int64, how many entries of each KV head may stay in a layer, the mean over layers; at least one. A ratio is of
    the tokens seen, or of a sliding window's length where there are more."""
    before = seen(at) if at.window is None else seen(at).clamp(max=at.window - 1)
    if isinstance(budget, float):
        count = (before.double() * budget + 1e-9).long()
    elif isinstance(budget, int):
        count = torch.full_like(before, budget)
    else:
        count = torch.full_like(before, int(convert_file_size_to_int(budget) // (at.depth * bytes_of_entry(at))))
    return torch.minimum(count.clamp(min=1), before)


def seen(at: CacheEntries) -> Tensor:
    """(B,) int64, real tokens of each sample up to the end of the prompt, those dropped or evicted too."""
    end = at.end + 1
    if at.run.padding is None:
        return end
    place = torch.arange(at.run.padding.shape[1], device=end.device)
    return ((place < end[:, None]) & ~at.run.padding.to(end.device)).sum(1)


def bytes_of_entry(at: CacheEntries) -> int:
    """Bytes of one entry of one layer: its keys and values in all KV heads, and where in the sequence it is in each."""
    keys, values = at.entries.keys, at.entries.values
    return keys.shape[1] * (keys.shape[-1] * keys.itemsize + values.shape[-1] * values.itemsize + 4)


def divide(weight: Tensor, total: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B, L) int64 shares of `total` in proportion to `weight`, each from `low` to `high`, that sum to it exactly.

    weight: (B, L) float, 0 or more. total: (B,) int64. low, high: int64 that broadcast to (B, L). Water-filling: what a
    share cannot take is divided among the others by their weights; fractions go by largest remainder, ties to the lowest
    index. A total that the bounds do not allow is brought to the nearest that they do.
    """
    low, high = (x.expand_as(weight).double() for x in (low, high))
    high = torch.maximum(low, high)
    weight = weight.double().clamp(min=0) + 1e-12
    total = torch.minimum(torch.maximum(total.double(), low.sum(1)), high.sum(1))
    under, over = torch.zeros_like(total), high.amax(1) / weight.amin(1) + 1
    for _ in range(100):  # the level of the water: share = level * weight, held between low and high
        level = (under + over) / 2
        much = torch.minimum(torch.maximum(weight * level[:, None], low), high).sum(1) > total
        under, over = torch.where(much, under, level), torch.where(much, level, over)
    share = torch.minimum(torch.maximum(weight * under[:, None], low), high)
    whole = torch.maximum((share + 1e-6).floor(), low)
    rest = (total - whole.sum(1)).round().long()
    fraction = (share - whole).round(decimals=6).masked_fill(whole >= high, -1)  # equal ones are equal
    rank = fraction.argsort(dim=1, descending=True, stable=True).argsort(1)
    return (whole + (rank < rest[:, None])).long()
