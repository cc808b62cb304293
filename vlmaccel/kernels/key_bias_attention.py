"""Attention with one additive bias a key: how a merged token weighs as the tokens that it stands for.

Proportional attention of Bolya et al., arXiv 2210.09461, section 3: softmax(q k^T * scale + log size) v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define(
    "key_bias_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, bool causal=False) -> Tensor"
)

key_bias_attention = torch.ops.vlmaccel.key_bias_attention.default
"""key_bias_attention(query, key, value, bias, scale, causal=False) -> (B, H, Q, head_dim).

query: (B, H, Q, head_dim). key, value: (B, H_kv, K, head_dim), H a multiple of H_kv. scale: of the logits.
bias: (B, K) float, added to the logits of each key (log of a merged size; -inf hides a key), or None.
causal: row i sees key j where j <= i + K - Q: the last row sees all. A row that sees no key gives 0.
Laid out (B, Q, H, head_dim), as the output projection reads it. For inference: it has no gradient.

On CPUs without matrix tiles (AMX), scaled_dot_product_attention computes bfloat16 no faster than float32, and plain
matrix products over a few heads at a time are faster in both; with tiles it is the faster one (`vlmaccel bench vit
--operations`). In bfloat16 the products' logits are rounded, so their error is larger, by what `vlmaccel bench vit`
prints. That is the form of full attention with a key head for each query head. In causal attention the bias is one more channel of queries and keys, which leaves
scaled_dot_product_attention its own causal mask, and with that half of the work to skip.
"""

CHUNK = 3 * 2**19  # logits at a time: more do not stay in the cache


def reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    """The formula, in float64."""
    share = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(share, 1) for x in (key, value))
    logits = query.double() @ key.mT * scale
    logits = logits if bias is None else logits + bias.double()[:, None, None]
    if causal:
        after = torch.ones(logits.shape[2:], dtype=torch.bool, device=query.device).triu(
            key.shape[2] - query.shape[2] + 1
        )
        logits = logits.masked_fill(after, -torch.inf)
    unseen = logits == -torch.inf
    return (logits.softmax(-1).masked_fill(unseen, 0) @ value).to(query.dtype)


def products_are_faster(dtype: torch.dtype) -> bool:
    """Whether this processor is faster with plain matrix products than with scaled_dot_product_attention."""
    if torch.cpu._is_amx_tile_supported():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())


def _torch_form(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    return _finished(_fused(query, key, value, _finite(bias, query.dtype), scale, causal), bias, causal, key.shape[2])


def _finite(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias with a number in place of -inf that hides a key as well: products with -inf, and rows of it, give NaN."""
    # a quarter of the range, so that it stays finite when it is divided by a scale or added to logits
    return None if bias is None else bias.to(dtype).clamp(min=max(-1e30, torch.finfo(dtype).min / 4))


def _finished(out: Tensor, bias: Tensor | None, causal: bool, keys: int) -> Tensor:
    """`out` (B, H, Q, head_dim) as the output projection reads it, with 0 in the rows that see no key."""
    out, rows = out.transpose(1, 2).contiguous().transpose(1, 2), out.shape[2]
    hidden = bias is not None and bool((bias[:, : 1 if causal else None] == -torch.inf).any())
    if not hidden and not (causal and rows > keys):
        return out
    last = torch.arange(rows, device=out.device) + (keys - rows) if causal else out.new_full((rows,), keys)
    sees = torch.ones(1, keys, dtype=torch.bool, device=out.device) if bias is None else bias > -torch.inf
    first = torch.where(sees.any(1), sees.byte().argmax(1), keys + 1)
    return out.masked_fill_((last < first[:, None])[:, None, :, None], 0)


def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    shared, mask = query.shape[1] != key.shape[1], None if bias is None else bias[:, None, None]
    if causal:
        rows, keys = query.shape[2], key.shape[2]
        after = torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(keys - rows + 1)
        none = query.new_zeros(()) if mask is None else mask
        mask = none.masked_fill(after, max(-1e30, torch.finfo(query.dtype).min / 2))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=shared)


def _cpu(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    known = _finite(bias, query.dtype)
    if causal:
        square = query.shape[2] == key.shape[2]
        out = _triangle(query, key, value, known, scale) if square else _fused(query, key, value, known, scale, True)
    elif query.shape[1] == key.shape[1] and products_are_faster(query.dtype):
        out = _in_parts(query, key, value, known, scale)
    else:
        out = _fused(query, key, value, known, scale, False)
    return _finished(out, bias, causal, key.shape[2])


def _triangle(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Causal attention of as many rows as keys; the bias as one more channel."""
    shared = query.shape[1] != key.shape[1]
    if bias is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
    query, key = _with_channel(query, 1.0), _with_channel(key, (bias / scale)[:, None])
    value = pad(value, (0, 1))
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)[..., :-1]


def _in_parts(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Full attention with as many key heads as query heads, a few heads at a time."""
    batch, heads, rows, dim = query.shape
    # laid out as the output projection reads it
    out = query.new_empty(batch, rows, heads, dim).transpose(1, 2)
    # no more than 2.5 times the queries either, so that attention is never the peak of a block's memory
    fit = max(1, min(CHUNK, 5 * query.numel() // 2) // (rows * key.shape[2]))  # heads
    samples = max(1, fit // heads)
    chunk = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)  # equal parts keep all threads busy
    for b in range(0, batch, samples):
        for h in range(0, heads, chunk):
            part = (slice(b, b + samples), slice(h, h + chunk))
            column = None if bias is None else bias[part[0]]
            out[part] = _chunk(query[part], key[part], value[part], column, scale)
    return out


def _chunk(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of a few samples and heads."""
    if query.dtype == torch.float32 and bias is not None:
        q, k = query.flatten(0, 1), key.flatten(0, 1)
        logits = torch.baddbmm(bias.repeat_interleave(query.shape[1], 0)[:, None], q, k.mT, alpha=scale)
    else:
        q, k = _with_channel(query, 1.0, scale), _with_channel(key, 0.0 if bias is None else bias[:, None])
        logits = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
    mixed = torch.bmm(torch.softmax(logits, -1, out=logits), value.flatten(0, 1))
    return mixed.view(*query.shape[:3], -1)


def _with_channel(x: Tensor, channel: Tensor | float, scale: float = 1.0) -> Tensor:
    """x (B, H, N, d) * scale with one more channel: so the bias rides along in the product, which saves a pass over
    logits that are rounded already."""
    wider = x.new_empty(*x.shape[:3], x.shape[3] + 1)
    torch.mul(x, scale, out=wider[..., :-1])
    wider[..., -1] = channel
    return wider


def _fake(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty(batch, rows, heads, dim).transpose(1, 2)


_LIB.impl("key_bias_attention", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("key_bias_attention", _cpu, "CPU")
_LIB.impl("key_bias_attention", gpu_form("key_bias_attention", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::key_bias_attention", _fake, lib=_LIB)
