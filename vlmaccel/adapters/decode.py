"""Decode attention straight from a cache layer, without touching the decoder's code."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vlmaccel.cache import PrunedLayer


class DecodeAttention(TorchFunctionMode):
    """Inside it, `scaled_dot_product_attention` of the newest token is `layer.attend`, however the layer holds its keys.

    It takes effect when the layer's `update` is done, since every torch call that it sees costs a call of Python.
    """

    def __init__(self, layer: PrunedLayer) -> None:
        super().__init__()
        self.layer, self.seeing = layer, False

    def __enter__(self) -> DecodeAttention:
        self.layer.__dict__["update"] = self._update
        return self

    def _update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        del self.layer.__dict__["update"]
        updated = self.layer.update(*args, **kwargs)
        super().__enter__()
        self.seeing = True
        return updated

    def __exit__(self, *error: Any) -> None:
        if self.seeing:
            super().__exit__(*error)
        self.layer.__dict__.pop("update", None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0]
        scale = kwargs.get("scale")
        return self.layer.attend(query, query.shape[-1] ** -0.5 if scale is None else scale)
