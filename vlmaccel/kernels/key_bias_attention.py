"""Attention with one additive bias a key: how a merged token weighs as the tokens that it stands for.

Proportional attention of Bolya et al., arXiv 2210.09461, section 3: softmax(q k^T * scale + log size) v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("key_bias_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale) -> Tensor")

key_bias_attention = torch.ops.vlmaccel.key_bias_attention.default
"""key_bias_attention(query, key, value, bias, scale) -> (B, H, Q, head_dim): full (not causal) attention.

query: (B, H, Q, head_dim). key, value: (B, H, K, head_dim). bias: (B, K) float, added to the logits of each key, or None.
scale: of the logits. For inference: it has no gradient.

On CPUs without matrix tiles (AMX), scaled_dot_product_attention computes bfloat16 no faster than float32, and plain
matrix products over a few heads at a time are faster (`vlmaccel bench vit --operations`). In bfloat16 their logits are
rounded, so their error is larger, by what `vlmaccel bench vit` prints.
"""

CHUNK = 3 * 2**19  # logits at a time: more do not stay in the cache


def reference(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The formula, in float64."""
    logits = query.double() @ key.double().mT * scale
    logits = logits if bias is None else logits + bias.double()[:, None, None]
    return (logits.softmax(-1) @ value.double()).to(query.dtype)


def products_are_faster(dtype: torch.dtype) -> bool:
    """Whether this processor is faster with plain matrix products than with scaled_dot_product_attention."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32


def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    mask = None if bias is None else bias.to(query.dtype)[:, None, None]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _cpu(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if not products_are_faster(query.dtype):
        return _fused(query, key, value, bias, scale)
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


def _fake(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty(batch, rows, heads, dim).transpose(1, 2)


_LIB.impl("key_bias_attention", _fused, "CompositeExplicitAutograd")
_LIB.impl("key_bias_attention", _cpu, "CPU")
torch.library.register_fake("vlmaccel::key_bias_attention", _fake, lib=_LIB)
