"""Attention of a vision tower on CPUs by the operation that is fastest there, without touching the tower's code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vlmaccel.kernels.key_bias_attention import key_bias_attention, products_are_faster


class FastAttention(TorchFunctionMode):
    """Inside it, `scaled_dot_product_attention` over keys with this bias is `key_bias_attention`.

    bias: (B, K) float32, what the attention module is given as its mask too; None for no mask.
    """

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias

    @staticmethod
    def fits(hidden: Tensor) -> bool:
        """Whether it is worth while for attention over `hidden`: in inference on a CPU."""
        return hidden.device.type == "cpu" and not torch.is_grad_enabled() and products_are_faster(hidden.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or len(args) != 3 or args[0].shape[1] != args[1].shape[1]:
            return func(*args, **kwargs)
        if kwargs.get("is_causal") or kwargs.get("dropout_p"):
            return func(*args, **kwargs)
        scale = kwargs.get("scale") or args[0].shape[-1] ** -0.5
        return key_bias_attention(*args, self.bias, scale)
