"""Attention of one new token over a KV cache, with one additive bias a key: the decode step.

The query heads of a group (grouped-query attention) are the rows of one product, so that keys and values are read once
and never repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("decode_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale) -> Tensor")

decode_attention = torch.ops.vlmaccel.decode_attention.default
"""decode_attention(query, key, value, bias, scale) -> (B, H, 1, head_dim): the token may see every key.

query: (B, H, 1, head_dim). key, value: (B, H_kv, m, head_dim), H a multiple of H_kv. bias: (B, 1 or H_kv, m) float32,
added to the logits of each key (log of a merged size; -inf hides a slot), or None. scale: of the logits. For inference:
it has no gradient.

On CPUs without matrix tiles, scaled_dot_product_attention with a single bfloat16 row is 4 to 40 times slower than two
matrix products with the softmax in float32 between them (`vlmaccel bench cache`); with tiles it is up to twice as fast.
"""


def reference(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The formula, in float64, with keys and values repeated for every query head."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    logits = query.double() @ key.mT * scale
    if bias is not None:
        logits = (
            logits + bias.double().expand(-1, value.shape[1] // groups, -1).repeat_interleave(groups, 1)[:, :, None]
        )
    return (logits.softmax(-1) @ value).to(query.dtype)


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """(B, H_kv, H / H_kv, head_dim)"""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[3])


def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    mask = None if bias is None else bias.to(query.dtype)[:, :, None]
    out = scaled_dot_product_attention(_grouped(query, key.shape[1]), key, value, attn_mask=mask, scale=scale)
    return out.reshape(query.shape)


def _cpu(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if query.dtype == torch.float32 or (query.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()):
        return _fused(query, key, value, bias, scale)
    logits = (_grouped(query, key.shape[1]) @ key.mT).float().mul_(scale)
    if bias is not None:
        logits += bias[:, :, None]
    return (logits.softmax(-1).to(value.dtype) @ value).reshape(query.shape)


def _fake(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_LIB.impl("decode_attention", _fused, "CompositeExplicitAutograd")
_LIB.impl("decode_attention", _cpu, "CPU")
torch.library.register_fake("vlmaccel::decode_attention", _fake, lib=_LIB)
