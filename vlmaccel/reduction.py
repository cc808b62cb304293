"""Reduction: which tokens stay, which group each original token joined, how many originals each kept token stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmaccel.kernels.merge_tokens import merge_tokens


def gather(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Take entries of `x` along `dim` by a per-sample `index` (B, n); a batch of 1 in `x` is shared by all samples.

    The index follows `x` to its device, so layers that live on different devices can share one reduction.
    """
    index = index.to(x.device)
    if x.ndim == 3 and dim == 1:  # whole rows, ten times as fast as a gather on CPUs
        batch, n, width = x.shape
        if batch > 1:
            index = index + n * torch.arange(batch, device=x.device)[:, None]
        return x.reshape(-1, width).index_select(0, index.flatten()).view(*index.shape, width)
    if x.shape[0] == 1 and index.shape[0] > 1:
        x = x.expand(index.shape[0], *x.shape[1:])
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    return x.gather(dim, index.view(shape).expand(*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :]))


@dataclass(frozen=True, eq=False)
class Reduction:
    """A selection or merge of the N tokens of each of B samples down to n slots.

    keep: (B, n) int64, index of the token that each slot represents, no index twice; of an inserted slot, that of the
        token it comes behind.
    group: (B, N) int64, slot that each original token joined, -1 if it was dropped.
    size: (B, n) int64, how many original tokens a slot stands for. Samples of a batch may keep different numbers of
        tokens: the shorter ones are filled up with slots of size 0, which every attention masks.
    merges: whether some slot stands for several tokens (then `apply` averages, otherwise it only gathers).
    partition: whether it is known that every token joined a slot and no slot is a filler.
    inserts: whether there may be slots that no token is in, see `Insertion`; they count as one token.
    """

    keep: Tensor
    group: Tensor
    size: Tensor
    merges: bool = False
    partition: bool = False
    inserts: bool = False

    @classmethod
    def identity(cls, batch: int, n: int, device: torch.device | str = "cpu") -> Reduction:
        """Everything stays: n slots for n tokens."""
        index = torch.arange(n, device=device).expand(batch, n)
        return cls(index, index, torch.ones_like(index), partition=True)

    @classmethod
    def merge(cls, keep: Tensor, group: Tensor) -> Reduction:
        """Every token joins a slot: keep (B, n) and group (B, N) int64 as `vlmaccel.kernels.bipartite_match` gives them."""
        size = torch.zeros_like(keep).scatter_add_(1, group, torch.ones_like(group))
        return cls(keep, group, size, merges=True, partition=True)

    @classmethod
    def select(cls, wanted: Tensor) -> Reduction:
        """Keep the tokens where `wanted` (B, N) bool is true, in their order; all others are dropped."""
        n = int(wanted.sum(1).max())
        # fillers are the lowest unwanted indices: left padding first, so that a filled row stays ascending
        keep = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :n].sort(1).values
        size = wanted.gather(1, keep).long()
        slot = torch.arange(n, device=keep.device).expand_as(keep)
        group = torch.full(wanted.shape, -1, device=keep.device).scatter(1, keep, slot)
        return cls(keep, group.masked_fill(~wanted, -1), size)

    @classmethod
    def merge_into(cls, representative: Tensor) -> Reduction:
        """Merge every token into its representative.

        representative: (B, N) int64, index of the token that stands for each token's group (its own index for the
        representative itself), -1 for a token that is dropped.
        """
        index = torch.arange(representative.shape[1], device=representative.device)
        reduction = cls.select(representative == index)
        group = reduction.group.gather(1, representative.clamp(min=0)).masked_fill(representative < 0, -1)
        size = _sum(group, reduction.keep.shape[1], torch.ones_like(group))
        partition = bool((group >= 0).all()) and bool((reduction.size > 0).all())
        return cls(reduction.keep, group, size, merges=True, partition=partition)

    @property
    def own(self) -> Tensor:
        """(B, n) bool, the slots that the token of their `keep` is in: no fillers, nothing inserted."""
        slot = torch.arange(self.keep.shape[1], device=self.keep.device)
        return self.group.gather(1, self.keep) == slot

    @property
    def inserted(self) -> Tensor:
        """(B, n) bool, the slots that came in behind a token."""
        return ~self.own & (self.size > 0) if self.inserts else torch.zeros_like(self.keep, dtype=torch.bool)

    def apply(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Reduce `x` (B, N, ...) to (B, n, ...): gather, or the average weighted by `size` (B, N) where tokens merged.

        The average (ToMe, arXiv 2210.09461) is exact for a group of one.
        """
        if not self.merges:
            return gather(x, self.keep)
        group, size = self.group.to(x.device), None if size is None else size.to(x.device)
        if x.ndim == 3:
            return merge_tokens(x, group, size, self.keep.shape[1])
        slots = merge_tokens(x.flatten(2) if x.ndim > 2 else x[..., None], group, size, self.keep.shape[1])
        return slots.view(*self.keep.shape, *x.shape[2:])

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread slots `y` (B, n, ...) back over the N tokens: members get their group's value, dropped tokens zero."""
        group = self.group.to(y.device)
        if self.partition:
            return gather(y, group)
        spread = gather(y, group.clamp(min=0))
        return spread.masked_fill(_wide(group < 0, y), 0)

    def repeat(self, times: int) -> Reduction:
        """Every sample's reduction `times` times in a row: one for each KV head of a sample."""
        if times == 1:
            return self
        keep, group, size = (x.repeat_interleave(times, 0) for x in (self.keep, self.group, self.size))
        return Reduction(keep, group, size, self.merges, self.partition, self.inserts)

    def then(self, later: Reduction) -> Reduction:
        """The single reduction that does this one and then `later` (which counts this one's slots as its tokens)."""
        keep = self.keep.gather(1, later.keep)
        group = later.group.gather(1, self.group.clamp(min=0))
        partition = self.partition and later.partition
        if not partition:
            group = group.masked_fill(self.group < 0, -1)
        merges, inserts = self.merges or later.merges, self.inserts or later.inserts
        return Reduction(keep, group, later.total(self.size), merges, partition, inserts)

    def total(self, size: Tensor) -> Tensor:
        """Sum of the `size` (B, N) of every slot's members, (B, n) int64."""
        if self.partition:
            return torch.zeros_like(self.keep).scatter_add_(1, self.group, size)
        total = _sum(self.group, self.keep.shape[1], size)
        return total + self.inserted if self.inserts else total


@dataclass(frozen=True, eq=False)
class Insertion:
    """Rows that stand for no token, put behind tokens.

    behind: (B, R) int64, the token that each comes behind, in the order given, and whose place in the sequence it shares;
        -1 for a filler, where a sample has fewer.
    rows: (B, R, D), what they are.
    """

    behind: Tensor
    rows: Tensor

    def into(self, x: Tensor) -> tuple[Tensor, Reduction]:
        """x (B, N, D) with the rows at their places, (B, N + R, D), and the `Reduction` that says which they are."""
        batch, n, _ = x.shape
        token = torch.arange(n, device=self.behind.device).expand(batch, -1)
        place = torch.cat([token, self.behind], 1)
        order = place.argsort(dim=1, stable=True)
        keep = place.gather(1, order)
        reduction = Reduction(keep.clamp(min=0), order.argsort(dim=1)[:, :n], (keep >= 0).long(), inserts=True)
        return gather(torch.cat([x, self.rows.to(x)], 1), order), reduction


def _sum(group: Tensor, n: int, x: Tensor) -> Tensor:
    """Sum of `x` (B, N, ...) over the members of each of n slots, (B, n, ...); -1 in `group` belongs to no slot."""
    index = _wide(group + 1, x).expand_as(x)
    return x.new_zeros(x.shape[0], n + 1, *x.shape[2:]).scatter_add(1, index, x)[:, 1:]


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """(B, N) with as many trailing dimensions of 1 as `like` has."""
    return x.view(*x.shape, *[1] * (like.ndim - 2))


def top_per_segment(score: Tensor, segment: Tensor, budget: Tensor) -> Tensor:
    """Mark the best-scored tokens of every segment: (B, N) bool.

    score: (B, N) float, higher is better; ties go to the lowest index.
    segment: (B, N) int64, number of the segment (an image of the sample) a token is in, -1 for none (never marked).
    budget: (B, S) int64, how many tokens segment s may keep; more than it has keeps all of it.
    """
    if budget.shape[1] == 0:
        return torch.zeros_like(segment, dtype=torch.bool)
    best_first = score.argsort(dim=1, descending=True, stable=True)
    order = best_first.gather(1, segment.gather(1, best_first).argsort(dim=1, stable=True))
    sorted_segment = segment.gather(1, order)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    start = torch.searchsorted(sorted_segment, sorted_segment)  # where this token's segment begins
    allowed = budget.gather(1, sorted_segment.clamp(min=0))
    chosen = (place - start < allowed) & (sorted_segment >= 0)
    return torch.zeros_like(chosen).scatter(1, order, chosen)
