"""Attention of one new token over a cache of which some entries are in few bits, some in full precision, in one pass.

Codes are never made into keys and values as a whole: they are unpacked a few at a time, and the scales, which keys share
along tokens and values along channels (KIVI, arXiv 2402.02750), are multiplied into the query and the weights instead:
q . (s c + z) = (q s) . c + q . z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vlmaccel.kernels.dispatch import gpu_form
from vlmaccel.kernels.quantize_pack import dequantize

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define(
    "mixed_decode(Tensor query, Tensor key, Tensor value, Tensor[] packed, int[] bits, Tensor? bias, float scale) -> Tensor"
)

mixed_decode = torch.ops.vlmaccel.mixed_decode.default
"""mixed_decode(query, key, value, packed, bits, bias, scale) -> (B, H, 1, d) in the dtype of query: it may see every entry.

query: (B, H, 1, d) float, H a multiple of H_kv. key, value: (B, H_kv, e, d), the entries in full precision, e >= 0, in the
dtype of query. packed: six tensors for every part in few bits, those of `quantize_pack` for keys grouped along tokens and
values grouped along channels: codes (B, H_kv, n, d * bits / 8) uint8, scale and zero (B, H_kv, n / group, d); codes alike,
scale and zero (B, H_kv, n, d / channels). bits: 2, 4 or 8 for every part. Entries are counted part by part, those in full
precision last; there must be one. bias: (B, 1, H_kv or H, m) float32, added to the logits of each of the m entries (log of
a merged size; -inf hides an entry; what was taken off the keys before they were quantised), or None. scale: of the logits.
A query that may see nothing gives 0. For inference: it has no gradient.

What is made beside the result and the logits (B, H, m) is bounded: `CHUNK` values at a time.
"""

CHUNK = 2**18  # values unpacked at a time: 1 MiB in float32


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Sequence[Tensor],
    bits: Sequence[int],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The formula, in float64, with all entries written out and repeated for every query head."""
    keys, values = [], []
    for i, b in enumerate(bits):
        part = packed[6 * i : 6 * i + 6]
        keys.append(dequantize(*part[:3], b, -2, torch.float64))
        values.append(dequantize(*part[3:], b, -1, torch.float64))
    keys, values = torch.cat([*keys, key.double()], 2), torch.cat([*values, value.double()], 2)
    heads = query.shape[1]
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
    logits = query.double() @ keys.mT * scale
    if bias is not None:
        logits += bias.double().repeat_interleave(heads // bias.shape[1], 1)[:, :, None]
    return (logits.softmax(-1).nan_to_num(0.0) @ values).to(query.dtype)


def _torch_form(
    query: Tensor, key: Tensor, value: Tensor, packed: list[Tensor], bits: list[int], bias: Tensor | None, scale: float
) -> Tensor:
    work = torch.promote_types(query.dtype, torch.float)
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    parts = [packed[6 * i : 6 * i + 6] for i in range(len(bits)) if packed[6 * i].shape[2]]
    bits = [b for b, codes in zip(bits, packed[::6], strict=True) if codes.shape[2]]
    ends = list(accumulate((part[0].shape[2] for part in parts), initial=0))
    spans = [slice(a, b) for a, b in pairwise(ends)]

    logits = grouped.new_empty(*grouped.shape[:3], ends[-1] + key.shape[2], dtype=work)
    logits[..., ends[-1] :] = grouped @ key.mT
    logits[..., ends[-1] :] *= scale
    scaled = grouped.to(work) * scale
    for (codes, step, zero, *_), b, span in zip(parts, bits, spans, strict=True):
        _logits(scaled, codes, step, zero, b, logits[..., span])
    if bias is not None:
        logits += bias.unflatten(1, (logits.shape[1], -1)) if bias.shape[1] == query.shape[1] else bias[:, :, None]
    weights = _softmax(logits)
    out = (weights[..., ends[-1] :].to(value.dtype) @ value).to(work).contiguous()
    for (*_, codes, step, zero), b, span in zip(parts, bits, spans, strict=True):
        _mix(weights[..., span], codes, step, zero, b, out)
    return out.to(query.dtype).reshape(query.shape)


def _softmax(logits: Tensor) -> Tensor:
    """In place; rows of -inf become 0."""
    logits -= logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    logits.exp_()
    return logits.div_(logits.sum(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).tiny))


def _logits(query: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, out: Tensor) -> None:
    """Put query (B, H_kv, r, d) times the keys into `out` (B, H_kv, r, n)."""
    group = codes.shape[2] // scale.shape[2]
    query, codes, scale, zero = (x.flatten(0, 1) for x in (query, codes, scale, zero))
    codes, out = codes.unflatten(1, (-1, group)), out.flatten(0, 1).unflatten(2, (-1, group))
    unpack = _Unpack(codes, bits, query.dtype)
    for here in _blocks(codes.shape[0], codes.shape[1], group * query.shape[2]):
        heads, groups = here
        q, x = query[heads], unpack(codes[here])
        folded = q[:, None] * scale[here][:, :, None]  # (heads, groups, r, d)
        product = torch.bmm(folded.flatten(0, 1), x.flatten(0, 1).mT).unflatten(0, folded.shape[:2])
        shift = torch.bmm(q, zero[here].to(q.dtype).mT)
        torch.add(product.transpose(1, 2), shift[..., None], out=out[heads, :, groups])


def _mix(weights: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, out: Tensor) -> None:
    """Add weights (B, H_kv, r, n) times the values to `out` (B, H_kv, r, d)."""
    weights, codes, scale, zero, out = (x.flatten(0, 1) for x in (weights, codes, scale, zero, out))
    parts = scale.shape[2]
    out = out.unflatten(2, (parts, -1))
    unpack = _Unpack(codes, bits, out.dtype)
    for here in _blocks(codes.shape[0], codes.shape[1], out.shape[2] * out.shape[3]):
        heads, tokens = here
        w, x = weights[heads, :, tokens], unpack(codes[here]).unflatten(2, (parts, -1))
        folded = w[:, None] * scale[here].mT[:, :, None]  # (heads, parts, r, tokens)
        total = (folded @ x.transpose(1, 2)).transpose(1, 2)
        out[heads] += total.add_(torch.bmm(w, zero[here].to(w.dtype))[..., None])


def _blocks(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of a (rows, columns) matrix of things of `size` values, that have up to CHUNK values: whole rows if these are
    short, else part of one row."""
    wide = max(1, CHUNK // size)
    tall = max(1, wide // columns)
    for row in range(0, rows, tall):
        for column in range(0, columns, wide):
            yield slice(row, row + tall), slice(column, column + wide)


class _Unpack:
    """Makes codes (..., d) into numbers, see `quantize_pack`, in memory that every call uses again."""

    def __init__(self, codes: Tensor, bits: int, dtype: torch.dtype) -> None:
        self.bits, self.width = bits, codes.shape[-1]
        most = min(codes.numel(), max(CHUNK * bits // 8, codes[:1, :1].numel()))
        self.bytes = codes.new_empty(most if bits < 8 else 0)
        self.numbers = codes.new_empty(most * 8 // bits, dtype=dtype)

    def __call__(self, codes: Tensor) -> Tensor:
        n, width, mask = codes.numel(), self.width, 2**self.bits - 1
        x = self.numbers[: n * 8 // self.bits].view(*codes.shape[:-1], -1)
        if self.bits == 8:
            return x.copy_(codes)
        part = self.bytes[:n].view(codes.shape)
        for shift in range(0, 8, self.bits):
            if shift:
                torch.bitwise_right_shift(codes, shift, out=part)
            if shift + self.bits < 8:
                torch.bitwise_and(part if shift else codes, mask, out=part)
            x.narrow(-1, shift // self.bits * width, width).copy_(part)
        return x


def _fake(
    query: Tensor, key: Tensor, value: Tensor, packed: list[Tensor], bits: list[int], bias: Tensor | None, scale: float
) -> Tensor:
    return query.new_empty(query.shape)


_LIB.impl("mixed_decode", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("mixed_decode", gpu_form("mixed_decode", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::mixed_decode", _fake, lib=_LIB)
