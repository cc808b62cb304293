"""Causal attention among chosen tokens: the prefill of ZipVL (He et al., ICCV 2025, arXiv 2410.08584, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("token_prefill(Tensor query, Tensor key, Tensor value, Tensor tokens, float scale) -> Tensor")

token_prefill = torch.ops.vlmaccel.token_prefill.default
"""token_prefill(query, key, value, tokens, scale) -> (B, H, N, head_dim): chosen tokens see the chosen ones up to themselves.

The rows of tokens that are not chosen are 0. query: (B, H, N, head_dim). key, value: (B, H_kv, M, head_dim), H a multiple
of H_kv; row i is key i + M - N, the keys before belong to earlier turns. tokens: (B, T) int64, the chosen key numbers of
each sample, ascending, with -1 behind them. scale: of the logits. The result is laid out as (B, N, H, head_dim), which the
output projection reads. For inference: it has no gradient.

On CPUs the chosen rows, keys and values are copied together and given to scaled_dot_product_attention, one sample at a
time, so that samples with fewer tokens cost less; a sample of which all is chosen is what that function gives, to the bit.
"""

CHUNK = 256  # rows at a time where there are earlier keys: no more of the mask than this times all keys


def reference(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """The same with a mask, in float64."""
    n, m, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    index = torch.arange(m, device=key.device)
    chosen = (tokens[:, :, None] == index).any(1)
    seen = chosen[:, m - n :, None] & chosen[:, None] & (index <= index[m - n :, None])
    logits = (query.double() @ key.mT * scale).masked_fill(~seen[:, None], -torch.inf)
    return (logits.softmax(-1).nan_to_num() @ value).to(query.dtype)


def _torch_form(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, scale: float) -> Tensor:
    batch, heads, n, dim = query.shape
    out = query.new_empty(batch, n, heads, dim)
    for b, (chosen, count) in enumerate(zip(tokens, (tokens >= 0).sum(1).tolist(), strict=True)):
        q, k, v = query[b], key[b], value[b]
        if count == k.shape[1]:
            out[b] = _causal(q, k, v, scale).transpose(0, 1)
            continue
        chosen = chosen[:count]
        rows = chosen[chosen >= k.shape[1] - n] - (k.shape[1] - n)
        out[b] = 0
        if len(rows):
            mixed = _causal(_take(q, rows), _take(k, chosen), _take(v, chosen), scale)
            out[b].index_copy_(0, rows, mixed.transpose(0, 1))
    return out.transpose(1, 2)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (H, n, d): whole tokens at a time where the heads of one lie together."""
    by_token = x.transpose(0, 1)
    return by_token.index_select(0, index).transpose(0, 1) if by_token.is_contiguous() else x.index_select(1, index)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(H, N, d) of the last N tokens of M."""
    n, m = query.shape[1], key.shape[1]
    q, k, v = query[None], key[None], value[None]
    if n == m:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0]
    parts = []
    for begin in range(0, n, CHUNK):
        end = min(n, begin + CHUNK)
        index = torch.arange(end + m - n, device=query.device)
        mask = index <= index[begin + m - n :, None]
        part = (q[:, :, begin:end], k[:, :, : len(index)], v[:, :, : len(index)])
        parts.append(scaled_dot_product_attention(*part, attn_mask=mask, scale=scale, enable_gqa=True)[0])
    return torch.cat(parts, 1)


def _fake(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, scale: float) -> Tensor:
    batch, heads, n, dim = query.shape
    return query.new_empty(batch, n, heads, dim).transpose(1, 2)


_LIB.impl("token_prefill", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("token_prefill", gpu_form("token_prefill", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::token_prefill", _fake, lib=_LIB)
