"""Attention with one additive bias a key: how a merged token weighs as the tokens that it stands for.

Proportional attention of Bolya et al., arXiv 2210.09461, section 3: softmax(q k^T * scale + log size) v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("key_bias_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale) -> Tensor")

key_bias_attention = torch.ops.vlmaccel.key_bias_attention.default
"""key_bias_attention(query, key, value, bias, scale) -> (B, H, Q, head_dim): full (not causal) attention.

query: (B, H, Q, head_dim). key, value: (B, H, K, head_dim). bias: (B, K) float, added to the logits of each key, or None.
scale: of the logits. For inference: it has no gradient.

On CPUs without matrix tiles (AMX), scaled_dot_product_attention computes bfloat16 no faster than float32, and plain
matrix products over a few heads at a time are 1.1 to 1.4 times (float32) and about twice (bfloat16) as fast. Their
logits are rounded to bfloat16, so the largest error is 4 to 5 times that of scaled_dot_product_attention.
"""

CHUNK = 3 * 2**19  # logits at a time: more do not stay in the cache, and would be the peak of a block's memory


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
    chunk = max(1, min(heads, CHUNK // (rows * key.shape[2])))
    # laid out as the output projection reads it
    out = query.new_empty(batch, rows, heads, dim).transpose(1, 2)
    for b in range(batch):
        column = None if bias is None else bias[b].to(query.dtype)
        for h in range(0, heads, chunk):
            q, k, v = (x[b, h : h + chunk] for x in (query, key, value))
            out[b, h : h + chunk] = _chunk(q, k, v, column, scale)
    return out


def _chunk(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of a few heads (H, Q, head_dim)."""
    if bias is None:
        logits = torch.bmm(q * scale, k.mT)
    elif q.dtype == torch.float32:
        logits = torch.baddbmm(bias, q, k.mT, alpha=scale)
    else:  # the bias rides along as one more channel, which saves a pass over the rounded logits
        logits = torch.bmm(
            pad(q * scale, (0, 1), value=1.0), torch.cat([k, bias[:, None].expand(len(k), -1, -1)], 2).mT
        )
    return torch.bmm(torch.softmax(logits, -1, out=logits), v)


def _fake(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty(batch, rows, heads, dim).transpose(1, 2)


_LIB.impl("key_bias_attention", _fused, "CompositeExplicitAutograd")
_LIB.impl("key_bias_attention", _cpu, "CPU")
torch.library.register_fake("vlmaccel::key_bias_attention", _fake, lib=_LIB)
