"""KeyBias: the constant that some models add to all keys of a layer (`k_proj.bias` of Qwen2 and Qwen2.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 1024  # positions of which cos and sin are made at a time


@dataclass(frozen=True, eq=False)
class KeyBias:
    """key = rotated(W x) + rotated(bias): what is left of a key without the second part is small and easy to quantise.

    bias: (H_kv, head_dim). rotary: (hidden, position_ids) -> cos, sin of the model. rotate: (query, key, cos, sin) ->
    both rotated.
    """

    bias: Tensor
    rotary: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[..., tuple[Tensor, Tensor]]

    def at(self, positions: Tensor) -> Tensor:
        """(B, H_kv, n, head_dim) float32, the rotated bias at positions (P, B, G, n): P = 1, or 3 for an embedding with
        several axes; G = 1, or H_kv if heads hold different tokens."""
        axes, batch, groups, n = positions.shape
        kv_heads, dim = self.bias.shape
        bias = self.bias.detach().float()[None, :, None].expand(batch, -1, n, -1)
        bias = bias.reshape(batch * groups, kv_heads // groups, n, dim)
        ids = positions.reshape(axes, batch * groups, n).long().to(bias.device)
        cos, sin = self.rotary(torch.empty(0, device=bias.device), position_ids=ids[0] if axes == 1 else ids)
        return self.rotate(bias, bias, cos, sin)[1].reshape(batch, kv_heads, n, dim)

    def logits(self, query: Tensor, positions: Tensor) -> Tensor:
        """(B, H, n) float32, products of the query (B, H, 1, head_dim) and the rotated bias at positions (P, B, G, n), which
        is never written out: what `rotate` makes of it is linear in cos and sin, so that the query goes in first."""
        axes, batch, groups, n = positions.shape
        ids = positions.reshape(axes, batch * groups, n).long().to(query.device)
        ids = ids[0] if axes == 1 else ids
        nothing = torch.empty(0, device=query.device)
        grouped = query.float().reshape(batch, groups, -1, *query.shape[2:])
        out = query.new_empty(batch * groups, grouped.shape[2], n, dtype=torch.float)
        step, weights = max(1, AT_ONCE // (batch * groups)), None
        for start in range(0, n, step):
            angles = torch.cat(self.rotary(nothing, position_ids=ids[..., start : start + step]), -1)
            if weights is None:
                weights = self._weights(grouped, angles.shape[-1] // 2).flatten(0, 1)
            torch.baddbmm(weights[..., -1:], weights[..., :-1], angles.mT, out=out[..., start : start + step])
        return out.view(batch, -1, n)

    def _weights(self, query: Tensor, width: int) -> Tensor:
        """(B, G, H / G, 2 * width + 1): query (B, G, H / G, 1, head_dim) times the rotated bias as a linear function of cos
        and sin of `width` channels, and its constant."""
        kv_heads, dim = self.bias.shape
        bias = self.bias.detach().float()[None, :, None].expand(-1, -1, 2 * width + 1, -1)
        units = torch.eye(2 * width + 1, 2 * width, device=bias.device)[None]
        rotated = self.rotate(bias, bias, units[..., :width], units[..., width:])[1][
            0
        ]  # (H_kv, 2 * width + 1, head_dim)
        rotated = rotated - torch.cat([rotated[:, -1:].expand(-1, 2 * width, -1), 0 * rotated[:, -1:]], 1)
        by_head = query.reshape(query.shape[0], kv_heads, -1, dim) @ rotated.mT
        return by_head.reshape(*query.shape[:3], -1)

    def __deepcopy__(self, memo: Any) -> KeyBias:
        """A copy of a cache shares it: it belongs to the model."""
        return self
