"""What the methods that evict cache entries after the prefill share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from vlmaccel.hooks import AttentionCall, CacheEntries, Method, Modality
from vlmaccel.methods.budget import Budget, check_budget, entries_of, is_whole
from vlmaccel.methods.selection import check_choice
from vlmaccel.reduction import Reduction

Rows = Literal["last", "post-vision"]
Heads = Literal["mean", "max"]


@dataclass(frozen=True)
class Eviction(Method):
    """After a prefill, keep the best-scored entries of every KV head and evict the rest; what is generated stays.

    The attention of the prefill itself is exact. In every later turn of a conversation the budget grows with it, and old
    and new entries compete.
    budget: what stays of each layer (the mean, where layers differ): a ratio of the sequence (float), a number of tokens
        (int), or bytes of a sample's whole cache ("64MiB").
    sinks: first tokens of a sequence that stay (StreamingLLM, arXiv 2309.17453: 4). recent: last ones that do.
    """

    budget: Budget = 0.1
    sinks: int = 4
    recent: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name in ("sinks", "recent"):
            check_count(name, getattr(self, name), 0)

    def cache_layers(self, depth: int) -> Sequence[int]:
        return range(depth)

    def score(self, at: CacheEntries) -> Tensor:
        """(B, 1 or H_kv, m) float, the higher the better, of all entries."""
        raise NotImplementedError

    def layer_budget(self, at: CacheEntries) -> Tensor:
        """(B,) or (B, H_kv) int64, entries that stay in each KV head of this layer."""
        return entries_of(self.budget, at)

    def protected(self, at: CacheEntries) -> Tensor:
        """(B, G, m) bool, entries that stay as long as the budget allows it."""
        return first_and_last(at, self.sinks, self.recent)

    def cache(self, at: CacheEntries) -> Reduction | None:
        if at.decoding or is_whole(self.budget):
            return None
        budget = self.layer_budget(at)
        budget = budget[:, None] if budget.ndim == 1 else budget
        prompt = at.prompt
        if bool((prompt.sum(2) <= budget).all()):
            return None
        score = self.score(at)
        check_finite(self, at, score)
        return keep_best(at, score, budget, self.protected(at) & prompt)


@dataclass(frozen=True)
class Observed(Eviction):
    """An eviction by the attention that entries get from a few observed rows of the prompt.

    rows: "last", the last `window` tokens of the prompt; or "post-vision", the text behind the last picture, at least
        16 (where there is less, or no picture, or nothing behind it: the last `window` ones) and at most 128.
    window: observed rows, which also stay themselves.
    pool: width of the pooling along the sequence (odd; 1 is none), as `pooling` "mean" or "max". group: how the scores of
        the query heads of a KV head are put together, "mean" or "max".
    budget, sinks: see `Eviction`.
    """

    rows: Rows = "last"
    window: int = 32
    pool: int = 5
    pooling: Heads = "mean"
    group: Heads = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, get_args(Rows))
        check_choice("pooling", self.pooling, get_args(Heads))
        check_choice("group", self.group, get_args(Heads))
        check_count("window", self.window, 1)
        check_count("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ValueError(f"pool is an odd width, not {self.pool}")

    def protected(self, at: CacheEntries) -> Tensor:
        return first_and_last(at, self.sinks, max(self.recent, self.window))

    def score(self, at: CacheEntries) -> Tensor:
        attention = observed(at, self.rows, self.window)
        return pooled(by_kv_head(attention, at, self.group), at.prompt, at.slots.index, self.pool, self.pooling)


def check_count(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a whole number, {least} or more, not {value!r}")


def check_finite(method: Method, at: CacheEntries | AttentionCall, score: Tensor) -> None:
    """Raise ValueError if scores are NaN."""
    if bool(score.isnan().any()):
        raise ValueError(
            f"{method.name}: the scores of decoder layer {at.layer} are NaN, so its keys or hidden states are not finite; "
            "load the model in bfloat16 or float32"
        )


def first_and_last(at: CacheEntries, first: int, last: int | Tensor) -> Tensor:
    """(B, G, m) bool, the first entries of the prompt and its last ones; last: a number, or (B,) one for each sample."""
    prompt, index = at.prompt, at.slots.index
    before = first_position(at) + first
    after = index.masked_fill(~prompt, -1).amax(2, keepdim=True)
    after = after - (last if isinstance(last, int) else last.to(index.device)[:, None, None])
    return prompt & ((index < before) | (index > after))


def newest_half(method: Eviction, at: CacheEntries) -> Tensor:
    """(B, G, m) bool, the sinks of a method and the newest half of its budget."""
    half = (entries_of(method.budget, at) + 1) // 2
    return first_and_last(at, method.sinks, half.clamp(min=method.recent))


def first_position(at: CacheEntries) -> Tensor:
    """(B, G, 1) logical index of the first token that is no padding."""
    index, padding = at.slots.index, at.run.padding
    if padding is None:
        return torch.zeros_like(index[:, :, :1])
    return padding.to(index.device).byte().argmin(1)[:, None, None].expand(-1, index.shape[1], -1).to(index.dtype)


def system(at: CacheEntries) -> Tensor:
    """(B, G, m) bool, the text before a sample's first visual token; nothing where there is none."""
    visual = at.modality >= Modality.IMAGE
    index, end = at.slots.index, torch.iinfo(torch.int32).max
    first = index.masked_fill(~visual, end).amin(2, keepdim=True)
    return at.prompt & ~visual & (index < first) & (first < end)


def keep_best(at: CacheEntries, score: Tensor, budget: Tensor, protected: Tensor) -> Reduction | None:
    """The best `budget` (B, 1 or H_kv) entries of the prompt, and everything behind it; None if that is all.

    score: (B, 1 or H_kv, m). protected: (B, 1 or H_kv, m) bool; if they are more than the budget, then the first one
    and the newest stay. Ties go to the lowest position; padding goes first.
    """
    slots, prompt = at.slots, at.prompt
    groups = max(score.shape[1], budget.shape[1], slots.index.shape[1])
    score, protected, prompt, index, sizes = (
        x.expand(-1, groups, -1) for x in (score.float(), protected, prompt, slots.index, slots.sizes)
    )
    # among the protected: the sequence's first token, where attention sinks most, then the newest
    newest = prompt & (index == index.masked_fill(~prompt, -1).amax(2, keepdim=True))
    first, protected = protected & (index == first_position(at)), protected | newest
    worth = torch.where(protected, index.float().masked_fill(first, torch.inf), score)
    level = prompt.byte() + protected.byte()
    order = worth.argsort(dim=2, descending=True, stable=True)
    order = order.gather(2, level.gather(2, order).argsort(dim=2, descending=True, stable=True))
    place = torch.arange(score.shape[2], device=score.device).expand_as(order)
    chosen = torch.zeros_like(prompt).scatter(2, order, place < budget[..., None]) & prompt
    behind = (sizes > 0) & (index > at.end[:, None, None])
    wanted = chosen | behind
    if bool((wanted == (sizes > 0)).all()):
        return None
    return Reduction.select(wanted.flatten(0, 1))


def observed_rows(at: CacheEntries, which: Rows, window: int) -> tuple[Tensor, Tensor]:
    """Rows among the remaining new tokens whose attention is observed: (B, Q) int64, and which of them count (B, Q) bool."""
    tokens, run = at.run.remaining, at.run
    n = tokens.modality.shape[1]
    place = torch.arange(n, device=tokens.modality.device).expand(tokens.modality.shape)
    logical = place if run.index is None else run.index
    real = (tokens.modality != Modality.PAD) & (logical <= run.query.amax(1, keepdim=True))
    behind = real.flip(1).cumsum(1).flip(1)  # how many real rows there are from here on
    counts = real & (behind <= window)
    if which == "post-vision":
        visual = tokens.modality >= Modality.IMAGE
        last = torch.where(visual, place, -1).amax(1, keepdim=True)
        post = real & (place > last)
        number = post.sum(1, keepdim=True)
        post = post & (behind <= 128)
        some = real & (behind <= 16)
        post = torch.where(number >= 16, post, post | some)
        counts = torch.where((last >= 0) & (number > 0), post, counts)
    most = int(counts.sum(1).max())
    rows = torch.where(counts, place, -1).topk(most, dim=1).values.sort(1).values
    return rows.clamp(min=0), rows >= 0


def observed(at: CacheEntries, which: Rows, window: int) -> Tensor:
    """(B, H, m) float32, attention that entries get from the observed rows, the mean over the rows that are not before them."""
    rows, counts = observed_rows(at, which, window)
    assert at.scores is not None
    total = at.scores.received(rows, counts, "sum")
    return total / per_query_head(seen_by(at, rows, counts), total.shape[1]).clamp(min=1)


def attention_of_all(at: CacheEntries) -> Tensor:
    """(B, H, m) float32, the sum of the attention that entries get from all rows."""
    assert at.scores is not None
    real = at.run.remaining.modality != Modality.PAD
    rows = torch.arange(real.shape[1], device=real.device).expand_as(real)
    return at.scores.received(rows, real, "sum")


def seen_by(at: CacheEntries, rows: Tensor, counts: Tensor) -> Tensor:
    """(B, G, m) float32, how many of the rows (B, Q) that count (B, Q) are not before each entry."""
    index = at.slots.index.long()
    logical = (rows if at.run.index is None else at.run.index.gather(1, rows)) + at.run.past
    logical = logical.to(index.device).masked_fill(~counts.to(index.device), -1).sort(1).values
    before = torch.searchsorted(logical, index.flatten(1)).view_as(index)
    return (logical.shape[1] - before).float()


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """(B, G, m) as (B, 1 or H, m)."""
    return x if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], 1)


def by_kv_head(scores: Tensor, at: CacheEntries, group: Heads = "mean") -> Tensor:
    """(B, H, m) scores of query heads as those of KV heads, (B, H_kv, m)."""
    grouped = scores.unflatten(1, (at.entries.keys.shape[1], -1))
    return grouped.mean(2) if group == "mean" else grouped.amax(2)


def pooled(score: Tensor, real: Tensor, index: Tensor, width: int, how: Heads = "mean") -> Tensor:
    """Scores (B, G, m) pooled along the sequence over `width` entries, of those that are `real`, in the order of their
    `index` (B, 1 or G, m both)."""
    if width == 1:
        return score
    real = real.expand_as(score)
    order = index.int().expand_as(score).masked_fill(~real, torch.iinfo(torch.int32).max)
    together = order.argsort(dim=2, stable=True)  # in the sequence's order, padding and fillers last
    score, real = score.gather(2, together), real.gather(2, together)
    if how == "max":
        done = max_pool1d(score.masked_fill(~real, -torch.inf), width, 1, width // 2)
    else:
        weight = avg_pool1d(real.float(), width, 1, width // 2)
        done = avg_pool1d(score * real, width, 1, width // 2) / weight.clamp(min=1e-6)
    return torch.zeros_like(done).scatter(2, together, done.masked_fill(~real, 0))
