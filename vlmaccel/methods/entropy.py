"""Entropy-regularised eviction: SnapKV, with a bonus for the entries that pass things between modalities.

No paper's method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmaccel.hooks import CacheEntries, Modality
from vlmaccel.methods.eviction import Observed, check_count

MODALITIES = (Modality.TEXT, Modality.IMAGE, Modality.VIDEO)


@dataclass(frozen=True)
class EntropyEviction(Observed):
    """score = S_t (1 + lam H_t / (2 log M)), S the score of SnapKV and M the number of modalities in a sample.

    H_t = H(out_t) + H(in_t): out_t, by which modality an entry is read, the mean attention from the rows of each behind it;
    in_t, which modality it read, its own attention row. Whole rows would be the whole attention matrix, so both are
    worked out from `probes` rows of each modality, spread evenly over the prompt, and an entry has H(in) of the nearest
    probe of its own modality (0 without one, as where a later turn has text only). Acts layer by layer: the peak of the prefill falls too.
    lam: weight of the bonus, default 0.2; 0 is SnapKV, much more makes hubs win over what is attended to. probes: default 32.
    rows, window, pool, pooling, group: see `Observed`. budget, sinks, recent: see `Eviction`; sinks 0 as SnapKV.
    """

    name = "entropy"

    sinks: int = 0
    lam: float = 0.2
    probes: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("probes", self.probes, 1)
        if not 0 <= self.lam < float("inf"):
            raise ValueError(f"lam is the weight of a bonus, 0 or more, not {self.lam!r}")

    def score(self, at: CacheEntries) -> Tensor:
        score = super().score(at)
        there = torch.stack([((at.modality == m) & at.prompt).any(2).any(1) for m in MODALITIES]).sum(0)
        if self.lam == 0 or bool((there < 2).all()):
            return score
        most = 2 * there.clamp(min=2).log()[:, None, None]
        return score * (1 + self.lam * (self._entropy(at) * (there > 1)[:, None, None] / most))

    def _entropy(self, at: CacheEntries) -> Tensor:
        """(B, H_kv, m) H(out) + H(in) of all entries."""
        assert at.scores is not None
        run, modality = at.run, at.run.remaining.modality
        place = torch.arange(modality.shape[1], device=modality.device).expand(modality.shape)
        logical = place if run.index is None else run.index
        index, of, before = at.slots.index.long(), at.modality, logical <= run.query.amax(1, keepdim=True)
        out: list[Tensor] = []
        inside = torch.zeros_like(index, dtype=torch.float)
        for m in MODALITIES:
            rows, counts = evenly((modality == m) & before, self.probes)
            if rows.shape[1] == 0:
                continue
            attention = at.scores.rows(rows)
            grouped = attention.unflatten(1, (at.entries.keys.shape[1], -1)).mean(2)
            rows, counts = (x.to(index.device) for x in (logical.gather(1, rows) + run.past, counts))
            later = (rows[:, None, :, None] > index[:, :, None]) & counts[:, None, :, None]
            out.append((grouped * later).sum(2) / later.sum(2).clamp(min=1))
            split = [(grouped * (of == n)[:, :, None]).sum(3) for n in MODALITIES]
            read = entropy(torch.stack(split, -1))  # (B, H_kv, Q)
            far = (rows[:, None, :, None] - index[:, :, None]).abs()
            nearest = far.masked_fill(~counts[:, None, :, None], torch.iinfo(far.dtype).max).argmin(2)
            own = read.gather(2, nearest.expand(-1, read.shape[1], -1)) * counts.any(1)[:, None, None]
            inside = inside + own * (of == m)
        return entropy(torch.stack(out, -1)) + inside


def entropy(weight: Tensor) -> Tensor:
    """(...) entropy in nats of non-negative weights (..., M), normalised; 0 where all are 0."""
    p = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return -torch.special.xlogy(p, p).sum(-1)


def evenly(among: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Up to `most` rows of those `among` (B, n) bool, spread evenly and the last one with them: (B, Q) int64 ascending, and
    which of them count (B, Q) bool."""
    total = among.sum(1, keepdim=True)
    number, rank = total.clamp(max=most), among.cumsum(1)
    # the last of each of `number` stretches, in which rank * number / total has the same whole part
    size = total.clamp(min=1)
    chosen = among & ((rank * number) // size != ((rank - 1) * number) // size)
    place = torch.arange(among.shape[1], device=among.device).expand_as(rank)
    rows = torch.where(chosen, place, -1).topk(int(number.max()), dim=1).values.sort(1).values
    return rows.clamp(min=0), rows >= 0
