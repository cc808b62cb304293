"""KeyBias: the constant that some models add to all keys of a layer (`k_proj.bias` of Qwen2 and Qwen2.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    def __deepcopy__(self, memo: Any) -> KeyBias:
        """A copy of a cache shares it: it belongs to the model."""
        return self
