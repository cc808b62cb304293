"""What the tests of sparse prefill share: what a method chose, longer prompts, and the reference's account of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tests.support.evictions import Kept, starts_of
from tests.support.models import PAD
from tests.support.reference import Positions, Reference, Trace
from vlmaccel.hooks import AttentionCall, Method, TokenSet
from vlmaccel.kernels.block_index import dense_mask
from vlmaccel.run import Run, TokenMap

Attended = dict[int, Tensor]  # {layer: (1 or H, p, p) bool}


class Seen:
    """A call of `sparse_attention`: the pattern that came of it, and which of the new tokens were left (B, n), as of then."""

    def __init__(self, at: AttentionCall, pattern: Any) -> None:
        self.at, self.pattern, self.layer = at, pattern, at.layer
        batch, _, n, _ = at.query.shape
        self.index = torch.arange(n).expand(batch, n) if at.run.index is None else at.run.index

    @property
    def mask(self) -> Tensor:
        """(B, 1 or H, n, m) bool, which key each row sees."""
        n, m = self.at.query.shape[2], self.at.key.shape[2]
        if isinstance(self.pattern, TokenSet):
            chosen = self.pattern.chosen
            pairs = chosen[:, m - n :, None] & chosen[:, None]
            return (pairs & torch.ones(n, m, dtype=torch.bool).tril(m - n))[:, None]
        lists, start = (self.pattern.blocks, self.pattern.columns), self.at.real.byte().argmax(1)
        return dense_mask(*lists, start, n, m, self.pattern.block)


def share_of(seen: Seen) -> list[float]:
    """Of every sample, the share of the pairs of a real row and a real key not behind it that were computed, over all heads."""
    found = []
    for mask, real in zip(seen.mask, seen.at.real.tolist(), strict=True):
        n, m = mask.shape[1:]
        rows = [row for row in range(n) if real[row + m - n]]
        of = sum(sum(real[: row + m - n + 1]) for row in rows)
        found.append(float(mask[:, rows].sum()) / (len(mask) * of))
    return found


def recorded(method: Method) -> tuple[Any, list[Seen]]:
    """The same method, and what it has chosen so far."""
    calls: list[Seen] = []

    class Recorded(type(method)):  # type: ignore[misc]
        def sparse_attention(self, at: AttentionCall) -> Any:
            pattern = super().sparse_attention(at)
            calls.append(Seen(at, pattern))
            return pattern

    return Recorded(**{f.name: getattr(method, f.name) for f in fields(method)}), calls  # type: ignore[arg-type]


def attended_of(calls: Sequence[Seen], mask: Tensor) -> list[Attended]:
    """What the rows of a first prompt, of which nothing came before, saw in each sample of a batch, without its padding."""
    found: list[Attended] = [{} for _ in mask]
    for seen in calls:
        if seen.pattern is None:
            continue
        for b, start in enumerate(starts_of(mask)):
            real = seen.at.real[b]
            rows, pairs = seen.index[b, real], seen.mask[b][:, real][:, :, real]
            whole = torch.zeros(len(pairs), mask.shape[1], mask.shape[1], dtype=torch.bool)
            whole[:, rows[:, None], rows] = pairs
            found[b][seen.layer] = whole[:, start:, start:]
    return found


def chosen_of(calls: Sequence[Seen], mask: Tensor, kv_heads: int = 2) -> list[Kept]:
    """{layer: (H_kv, p) bool} of every sample of a first prompt: the tokens that were chosen, padding cut off."""
    found: list[Kept] = [{} for _ in mask]
    for seen in calls:
        for b, start in enumerate(starts_of(mask)):
            whole = torch.zeros(mask.shape[1], dtype=torch.bool)
            whole[seen.index[b, seen.pattern.chosen[b]]] = True
            found[b][seen.layer] = whole[start:].expand(kv_heads, -1)
    return found


def reference_of(
    model: Any,
    batch: dict[str, Tensor],
    later: Tensor,
    attended: Sequence[Attended],
    kept: Sequence[Any] | None = None,
    schedules: Sequence[Any] | None = None,
    positions: Positions = "keep",
) -> list[Trace]:
    """The reference's account of every sample of `batch`, of which each token saw what it is said to have attended to, then the
    tokens `later` (B, T), which do not see what was evicted."""
    reference = Reference(model)
    traces = []
    for b, embeds in enumerate(reference.embed(batch)):
        sequence = reference.followed(embeds, later[b])
        schedule = None if schedules is None else schedules[b]
        evicted = None if kept is None else kept[b]
        traces.append(reference.run(sequence, schedule, positions, len(embeds), evicted, attended[b]))
    return traces


def long_inputs(lengths: Sequence[int], padded: int | None = None, seed: int = 3) -> dict[str, Tensor]:
    """Texts of these lengths, padded on the left to `padded` tokens (default: the longest)."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) if padded is None else padded
    rows = [torch.randint(2, 110, (n,), generator=generator).tolist() for n in lengths]
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return dict(input_ids=ids, attention_mask=mask)


def call(
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    n: int = 40,
    past: int = 0,
    padding: Sequence[int] | None = None,
    seed: int = 0,
    layer: int = 0,
    behind: int = 0,
    sharp: float = 2.0,
) -> AttentionCall:
    """The attention call of a layer with random queries and keys. padding: tokens on the left of each sample. behind: candidates
    of assisted decoding at the end. sharp: the larger, the less uniform is the attention."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n, 8, generator=generator) * sharp
    key = torch.randn(batch, kv_heads, past + n, 8, generator=generator)
    mask = torch.ones(batch, past + n, dtype=torch.long)
    for b, count in enumerate(padding or ()):
        mask[b, :count] = 0
    run = Run(TokenMap.text(batch, n), past, padding=None if padding is None else mask == 0)
    run.prepare(mask, None, behind + 1 if behind else 0)
    return AttentionCall(run, layer, 6, query, key, mask.bool(), 8**-0.5)
