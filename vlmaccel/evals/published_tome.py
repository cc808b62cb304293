"""ToMe as it was published, restated plainly: the peer that ours is measured beside.

Bolya et al., arXiv 2210.09461: attention as matrix products with the whole softmax matrix, log sizes added to it, tokens
moved by gather and scatter-reduce. It runs the blocks of a timm VisionTransformer by itself, so it knows only those that
the paper's code knew: a class token, pre-norm, no LayerScale, no q or k norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PublishedToMe:
    """`PublishedToMe(model, r)(pixels)` is the model's output with r tokens merged in every block.

    model: a timm VisionTransformer with a class token. prop_attn: proportional attention.
    """

    def __init__(self, model: Any, r: int, prop_attn: bool = True) -> None:
        self.model, self.r, self.prop_attn = model, r, prop_attn

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, classes) logits of pixels (B, 3, H, W)."""
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
        size = torch.ones_like(x[..., :1])
        for number, block in enumerate(model.blocks):
            y, metric = self._attention(block.attn, block.norm1(x), size if number else None)
            x = x + y
            if (r := min(self.r, (x.shape[1] - 1) // 2)) > 0:
                x, size = merge(x, size, metric, r)
            x = x + block.mlp(block.norm2(x))
        return model.forward_head(model.norm(x))

    def _attention(self, attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, n, _ = x.shape
        qkv = attention.qkv(x).reshape(batch, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        logits = (query * attention.scale) @ key.transpose(-2, -1)
        if size is not None and self.prop_attn:
            logits = logits + size.log()[:, None, None, :, 0]
        y = (logits.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, n, -1)
        return attention.proj(y), key.mean(1)


def match(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which even tokens are left, which merge, and into which odd ones: (B, m, 1) each. metric: (B, N, d)."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -torch.inf  # the class token stays
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    left, source = order[:, r:].sort(dim=1).values, order[:, :r]
    return left, source, partner[..., None].gather(1, source)


def merge(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge the r likest tokens of x (B, N, D); size: (B, N, 1)."""
    left, source, target = match(metric, r)

    def add(y: Tensor) -> Tensor:
        even, odd = y[:, ::2], y[:, 1::2]
        width = y.shape[-1]
        kept = even.gather(1, left.expand(-1, -1, width))
        moved = even.gather(1, source.expand(-1, -1, width))
        return torch.cat([kept, odd.scatter_reduce(1, target.expand(-1, -1, width), moved, reduce="sum")], dim=1)

    total = add(size)
    return add(x * size) / total, total
