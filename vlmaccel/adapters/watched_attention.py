"""What a module's own attention call works out, for scores, without touching the module's code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vlmaccel.kernels.attention_lse import attention_lse


class WatchedAttention(TorchFunctionMode):
    """Inside it, the queries of `scaled_dot_product_attention` and the log-sum-exp of their rows are kept; its result is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        out, lse = attention_lse(*args, **kwargs)
        self.calls.append((args[0].detach(), lse))
        return out

    @property
    def query(self) -> Tensor | None:
        """(B, H, n, head_dim), if there was one call."""
        return self.calls[0][0] if len(self.calls) == 1 else None

    @property
    def lse(self) -> Tensor | None:
        """(B, H, n) float32, the rows of one call behind those of the other; None if they are not known of all."""
        found = [lse for _, lse in self.calls if lse is not None]
        return torch.cat(found, 2) if found and len(found) == len(self.calls) else None
