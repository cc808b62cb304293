"""Attention probabilities of a few query rows, without the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 64  # of attention that exist at a time


def a_few_at_a_time(rows: Tensor, keys: int) -> tuple[Tensor, ...]:
    """Rows (B, Q) in parts of 64, or of an eighth of the keys if that is less: far from the whole of short sequences too."""
    return rows.split(min(ROWS, max(1, keys // 8)), 1)


def attention_rows(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(query key^T * scale) over all keys in float32, as the model's own attention has it in those rows.

    query: (B, H, Q, head_dim), the rows wanted.
    key: (B, H_kv, K, head_dim); H is a multiple of H_kv (grouped-query attention, keys are not repeated).
    mask: (B, 1 or H, Q, K), boolean (true = may attend) or additive float.
    Returns (B, H, Q, K) float32. A row that may attend to nothing is all zeros.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    logits = (grouped @ key.transpose(2, 3)).view(batch, heads, rows, -1).float().mul_(scale)
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        logits += mask.float().masked_fill(~allowed, 0)
        mask = allowed
    probabilities = logits.masked_fill_(~mask, float("-inf")).softmax(-1)
    return probabilities.masked_fill(~mask.any(-1, keepdim=True), 0.0)
