"""What tokens of a vision tower are compared by: their keys, averaged over heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

FAST = (torch.float32, torch.bfloat16, torch.float16)


def mean_key(keys: Tensor) -> Tensor:
    """(B, N, head_dim) float32 mean over heads of keys (B, H, N, head_dim); without a gradient.

    On CPUs the sum is rounded to the dtype of the keys once, as it is in the official code of ToMe.
    """
    batch, heads, n, dim = keys.shape
    if not keys.numel() or not _in_rows(keys):
        return keys.mean(1, dtype=torch.float)
    # Bags of rows are several times as fast as a sum over a dimension: heads lie side by side in the memory of a projection.
    step = [stride // dim for stride in keys.stride()[:3]]
    sample, head, token = (
        torch.arange(count, dtype=torch.int32).mul_(by) for count, by in zip(keys.shape, step, strict=False)
    )
    index = (sample[:, None, None] + token[:, None] + head).view(-1, heads)
    last = sum((count - 1) * by for count, by in zip(keys.shape, step, strict=False))
    rows = keys.as_strided((last + 1, dim), (dim, 1))
    return embedding_bag(index, rows, mode="sum").view(batch, n, dim).float().div_(heads)


def _in_rows(keys: Tensor) -> bool:
    """Whether every key lies in memory as a row of one table."""
    *strides, last = keys.stride()
    together = last == 1 and not any(stride % keys.shape[3] for stride in strides)
    return together and keys.device.type == "cpu" and keys.dtype in FAST and not torch.compiler.is_compiling()
