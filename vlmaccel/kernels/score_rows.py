"""What every key gets of the attention of some rows, or of all: softmax(Q K^T) reduced over its rows, never held whole.

The accumulated attention of H2O (arXiv 2306.14048, section 4) and the observation window of SnapKV (arXiv 2404.14469,
section 3) are such sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define(
    "score_rows(Tensor query, Tensor key, Tensor row, Tensor index, Tensor? bias, float scale, int window, str reduce,"
    " Tensor? lse=None) -> Tensor"
)

score_rows = torch.ops.vlmaccel.score_rows.default
"""score_rows(query, key, row, index, bias, scale, window, reduce, lse=None) -> (B, H, K) float32: the attention that each key gets.

query: (B, H, Q, head_dim), the rows that look. key: (B, H_kv, K, head_dim), H a multiple of H_kv.
row: (B, Q) int32 or int64, logical position of each row, from 0 to 2^30; -1 for one that does not count.
index: (B, 1 or H_kv, K) int32 or int64, logical position of each key, from 0 to 2^30.
bias: (B, 1 or H_kv, K) float32, added to the logits of each key (log of a merged size; -inf hides a key), or None.
scale: of the logits. window: how many positions back a row sees, itself the first; 0 or less for all.
lse: (B, H, Q) float32, the log-sum-exp of the logits that each row sees, where attention has worked it out already (see
`vlmaccel.kernels.attention_lse`), which saves half of the work on GPUs, and on CPUs the softmax where heads share no keys;
None to work it out.

A row sees the keys with row - window < index <= row that are not hidden; what keys that no row sees hold (NaN too) does not
matter. reduce: "sum" of the rows' probabilities; "mean", that sum divided by the number of rows that see the key; "max". A key
that no row sees gets 0. For inference: it has no gradient. Raises ValueError for another reduce.

Memory beside inputs and output: a number for each row on GPUs; a few million logits at a time on CPUs, where the products
round bfloat16 logits to bfloat16. Blocks of keys that come after all rows of a block, or before their windows, are skipped.
"""

REDUCTIONS = ("sum", "mean", "max")
ROWS = 128  # at a time
CHUNK = 3 * 2**19  # logits at a time: more do not stay in the cache
TILE = 2**19  # the same of rows whose log-sum-exp is known, which need not be whole


def reference(
    query: Tensor,
    key: Tensor,
    row: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scale: float,
    window: int,
    reduce: str,
    lse: Tensor | None = None,
) -> Tensor:
    """The formula, in float64, with everything repeated for every query head; it works out `lse` for itself."""
    heads, kv_heads = query.shape[1], key.shape[1]

    def each(x: Tensor) -> Tensor:
        return x.expand(-1, kv_heads, -1).repeat_interleave(heads // kv_heads, 1)[:, :, None]

    place, at = row[:, None, :, None], each(index)
    seen = (at <= place) & ((at > place - window) | (window <= 0))
    logits = query.double() @ key.double().repeat_interleave(heads // kv_heads, 1).mT * scale
    if bias is not None:
        seen = seen & (each(bias) > -torch.inf)
        logits = logits + each(bias).double()
    probabilities = logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    if reduce == "max":
        return torch.nn.functional.pad(probabilities, (0, 0, 0, 1)).amax(2)
    total = probabilities.sum(2)
    return total if reduce == "sum" else total / seen.sum(2).clamp(min=1)


def check_reduce(reduce: str) -> None:
    """Raise ValueError unless there is such a reduction."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is one of {', '.join(REDUCTIONS)}, not {reduce!r}")


def seen_by(row: Tensor, index: Tensor, window: int) -> Tensor:
    """(B, 1 or H_kv, K) int64, how many of the rows are not before each key, nor too far behind it; arguments as for `score_rows`."""
    row, index = row.long().sort(1).values, index.long()

    def before(position: Tensor) -> Tensor:
        return torch.searchsorted(row, position.flatten(1).contiguous()).view_as(index)

    return (before(index + window) if window > 0 else row.shape[1]) - before(index)


def _torch_form(
    query: Tensor,
    key: Tensor,
    row: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scale: float,
    window: int,
    reduce: str,
    lse: Tensor | None = None,
) -> Tensor:
    check_reduce(reduce)
    batch, heads, rows, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    out = query.new_zeros(batch, heads, keys, dtype=torch.float)
    if out.numel() == 0 or rows == 0:
        return out
    if query.dtype == torch.half:  # products of CPUs in float16 are several times slower than in float32
        query, key = query.float(), key.float()
    if query.dtype != torch.bfloat16:  # which would be rounded once more
        key, scale = key * scale, 1.0
    share = heads // kv_heads
    if share > 1:  # to append it to the queries of all heads that share keys takes as long as a softmax
        lse = None
    if lse is not None:
        query, key = subtracting(query, key, lse / scale)
    step = ROWS if lse is None else max(ROWS, 2 * ROWS // share)
    each = min(rows, step) * share  # logits of a key
    tile = keys if lse is None else min(keys, max(1, TILE // each))
    fit = max(1, CHUNK // (each * tile))  # KV heads at a time
    samples = max(1, fit // kv_heads)
    for b in range(0, batch, samples):
        some = slice(b, b + samples)
        hidden = None if bias is None else bias[some] == -torch.inf
        for start in range(0, rows, step):
            at = slice(start, start + step)
            block = _Block(row[some, at], index[some], hidden, window, lse is not None)
            if block.start == block.end:
                continue
            for h in _parts(kv_heads, fit):
                where = slice(h.start * share, h.stop * share)
                added = None if bias is None else _of(bias[some, :, block.start : block.end], h)
                part = block.reduced(
                    query[some, where, at], key[some, h, block.start : block.end], added, scale, h, reduce, tile
                )
                total = out[some, where, block.start : block.end]
                torch.maximum(total, part, out=total) if reduce == "max" else total.add_(part)
    if reduce == "mean":
        count = seen_by(row, index, window).clamp_(min=1)
        out.unflatten(1, (kv_heads, -1)).div_(count[:, :, None])
    return out


def subtracting(query: Tensor, key: Tensor, what: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, H, Q, head_dim) and keys with more channels, so that their products come out less `what` (B, H, Q).

    In bfloat16 it is three numbers, which hold all bits of a float32. What is not finite, of rows that see nothing, is 0.
    """
    rest, parts = what.float().masked_fill(what.isinf(), 0), []
    for _ in range(3 if query.dtype == torch.bfloat16 else 1):
        parts.append(rest.to(query.dtype))
        rest = rest - parts[-1]
    return torch.cat([query, -torch.stack(parts, -1)], -1), pad(key, (0, len(parts)), value=1.0)


def _parts(n: int, most: int) -> Iterator[slice]:
    size = max(d for d in range(1, n + 1) if n % d == 0 and d <= most)  # equal parts keep all threads busy
    return (slice(start, start + size) for start in range(0, n, size))


def _of(x: Tensor, heads: slice) -> Tensor:
    """Some KV heads of x (B, 1 or H_kv, ...)."""
    return x if x.shape[1] == 1 else x[:, heads]


class _Block:
    """A block of rows of some samples, and what they see: no key outside `start` to `end`, and all keys before `some`.

    row: (b, R). index, hidden: (b, 1 or H_kv, K). normalised: whether logits come out less the rows' log-sum-exp.
    """

    def __init__(self, row: Tensor, index: Tensor, hidden: Tensor | None, window: int, normalised: bool) -> None:
        self.counts, self.normalised = row >= 0, normalised
        self.all_rows = bool(self.counts.all())
        most = torch.iinfo(row.dtype).max
        first = row.masked_fill(~self.counts, most).amin(1)[:, None, None]
        last = row.amax(1)[:, None, None]
        reached, by_all = index <= last, index <= first
        if window > 0:
            reached, by_all = reached & (index > first - window), by_all & (index > last - window)
        if hidden is not None:
            reached, by_all = reached & ~hidden, by_all & ~hidden
        places = reached.flatten(0, 1).any(0).nonzero().flatten()
        self.start, self.end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        by_all = by_all[..., self.start : self.end].flatten(0, 1).all(0)
        self.some = self.end - self.start if bool(by_all.all()) else int(by_all.byte().argmin())
        index, place = index[:, :, None, self.start + self.some : self.end], row[:, None, :, None]
        self.unseen = index > place
        if window > 0:
            self.unseen |= index <= place - window
        if hidden is not None:
            self.unseen |= hidden[:, :, None, self.start + self.some : self.end]
        self.weight = self.counts[:, None] if self.some else self.counts[:, None] & ~self.unseen.all(-1)
        self.all_count = bool(self.weight.all())

    def reduced(
        self, query: Tensor, key: Tensor, bias: Tensor | None, scale: float, heads: slice, reduce: str, tile: int
    ) -> Tensor:
        """(b, H, end - start) float, for some KV heads and their query heads. tile: keys at a time; all of them, unless rows are
        `normalised`."""
        batch, kv_heads, keys, dim = key.shape
        if not self.all_rows:  # those of padding may be NaN
            query = query.masked_fill(~self.counts[:, None, :, None], 0)
        rows, grouped = query.shape[2], query.reshape(batch, kv_heads, -1, dim)
        found = []
        for start in range(0, keys, tile):
            part = slice(start, min(start + tile, keys))
            logits = grouped @ key[:, :, part].mT
            logits = logits.to(torch.promote_types(query.dtype, torch.float))
            if scale != 1:
                logits.mul_(scale)
            if bias is not None:
                logits += bias[:, :, None, part]
            each = logits.view(batch, kv_heads, -1, rows, part.stop - start)
            unseen = _of(self.unseen, heads)[:, :, None, :, max(start - self.some, 0) : max(part.stop - self.some, 0)]
            # finite, so that a row that sees nothing is no NaN
            each[..., each.shape[-1] - unseen.shape[-1] :].masked_fill_(unseen, torch.finfo(logits.dtype).min)
            if self.normalised:
                logits.exp_()
            else:
                torch.softmax(logits, -1, out=logits)
            if not self.all_count:
                each.masked_fill_(~_of(self.weight, heads)[:, :, None, :, None], 0)
            found.append(each.amax(3) if reduce == "max" else each.sum(3))
        return torch.cat(found, -1).flatten(1, 2)


def _fake(
    query: Tensor,
    key: Tensor,
    row: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scale: float,
    window: int,
    reduce: str,
    lse: Tensor | None = None,
) -> Tensor:
    check_reduce(reduce)
    return query.new_empty(*query.shape[:2], key.shape[2], dtype=torch.float)


_LIB.impl("score_rows", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("score_rows", gpu_form("score_rows", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::score_rows", _fake, lib=_LIB)
