"""Torch's fused attention, with the log-sum-exp of its rows that it works out on the way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

WIDTHS = 8  # a GPU's kernels take heads of that many channels, or a multiple


def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `scaled_dot_product_attention` makes of the same arguments, to the bit, and log(sum(exp(logits))) of its rows.

    Returns (B, H, Q, head_dim), and (B, H, Q) float32 or None: only flash and cuDNN's attention tell, without a mask and without gradients.
    """
    if attn_mask is None and not dropout_p:
        kernel = _kernel(query, key, value, is_causal, scale, enable_gqa)
        aten, device = torch.ops.aten, query.device.type
        if kernel == SDPBackend.FLASH_ATTENTION.value:
            flash = (
                aten._scaled_dot_product_flash_attention_for_cpu
                if device == "cpu"
                else aten._scaled_dot_product_flash_attention
            )
            out, lse = flash(query, key, value, 0.0, is_causal, scale=scale)[:2]
            return out, lse
        if kernel == SDPBackend.CUDNN_ATTENTION.value:
            cudnn = aten._scaled_dot_product_cudnn_attention
            out, lse = cudnn(query, key, value, None, True, 0.0, is_causal, False, scale=scale)[:2]
            return out, lse.view(out.shape[:3])
    out = scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out, None


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, enable_gqa: bool
) -> int | None:
    """The `SDPBackend` that computes this; None where it cannot be called as it is."""
    device = query.device.type
    if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):  # which changes what types sdpa is given
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return None
    if device == "cuda" and (query.shape[-1] % WIDTHS or torch.version.hip is not None):
        return None
    return torch._fused_sdp_choice(query, key, value, None, 0.0, causal, scale=scale, enable_gqa=enable_gqa)
