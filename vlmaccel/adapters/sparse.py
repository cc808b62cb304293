"""Sparse attention at prefill in place of a decoder layer's attention call, without touching the decoder's code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vlmaccel.adapters.base import Parts
from vlmaccel.adapters.masks import USE_SDPA
from vlmaccel.adapters.view import View
from vlmaccel.hooks import AttentionCall, Method, TokenSet
from vlmaccel.kernels.block_index import computed_share
from vlmaccel.kernels.block_prefill import block_prefill, where_it_pays
from vlmaccel.kernels.places import places
from vlmaccel.kernels.token_prefill import token_prefill
from vlmaccel.run import Run


class SparseAttention(TorchFunctionMode):
    """Inside it, `scaled_dot_product_attention` computes what a method chooses.

    layer, depth: which decoder layer it is. real: see `AttentionCall`. mask: of the whole attention, for a method that declines.
    """

    def __init__(
        self, method: Method, run: Run, layer: int, depth: int, kv_heads: int, real: Tensor, mask: Tensor | None
    ) -> None:
        super().__init__()
        self.method, self.run, self.layer, self.depth = method, run, layer, depth
        self.kv_heads, self.real, self.mask = kv_heads, real, mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        repeated = key.shape[1] // self.kv_heads  # transformers repeats keys and values where there is a mask
        key, value = key[:, ::repeated], value[:, ::repeated]
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        with torch.no_grad():
            out = self._sparse(query.detach(), key.detach(), value.detach(), scale)
        if out is None:
            return self._all(query, key, value, scale, kwargs.get("dropout_p", 0.0))
        return NoGradient.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
        """What the method chooses of the attention; None for all of it."""
        n, m = query.shape[2], key.shape[2]
        at = AttentionCall(self.run, self.layer, self.depth, query, key, self.real, scale)
        pattern = self.method.sparse_attention(at)
        if pattern is None:
            return None
        if isinstance(pattern, TokenSet):
            self.run.attended[self.layer] = token_share(pattern.chosen, self.real, n)
            return token_prefill(query, key, value, places(pattern.chosen), scale)
        start = self.real.byte().argmax(1)
        lists = where_it_pays(query, key, pattern.blocks, pattern.columns, start, pattern.block)
        self.run.attended[self.layer] = computed_share(*lists, start, n, m, pattern.block).mean(1)
        return block_prefill(query, key, value, *lists, start, pattern.block, scale)

    def _all(self, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
        if self.mask is None:
            return scaled_dot_product_attention(query, key, value, None, dropout, True, scale=scale, enable_gqa=True)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=self.mask, dropout_p=dropout, scale=scale)


class NoGradient(torch.autograd.Function):
    """Says so when somebody trains through sparse attention, whose operators have no gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "sparse attention is for inference and has no gradient: call vlmaccel.unpatch(model) to train"
        )


def sparse_call(run: Run, parts: Parts, layer: int, view: View, method: Method) -> tuple[View, SparseAttention | None]:
    """The view that a layer whose attention `method` may take is given, and what takes it; None where all of it is computed:
    in a layer whose sliding window is shorter than the sequence, over earlier turns whose heads hold different tokens, and of
    candidates of assisted decoding over a cache.

    Raises NotImplementedError where sparse attention cannot be had.
    """
    config, columns = parts.config, view.columns
    if config._attn_implementation != "sdpa":
        raise NotImplementedError(
            f'{method!r} takes the place of attention only with attn_implementation="sdpa", and this model has '
            f'"{config._attn_implementation}"; load the model with attn_implementation="sdpa"'
        )
    if not run.mask_known:
        raise NotImplementedError(
            f"{method!r} knows only masks of padding (batch, length), not one of pairs; " + USE_SDPA
        )
    if columns.prop_attn or columns.calibrated is not None:
        raise NotImplementedError(
            f"{method!r} does not weigh keys, merged or calibrated; give the method before it prop_attn=False, and other positions than "
            '"calibrated"'
        )
    window = window_of(config, layer)  # the view has it from a cache, which there may be none of
    passed = window is not None and run.past + run.length > window
    if passed or columns.index.shape[1] > 1 or run.verifying:
        return view, None
    real = (columns.sizes > 0)[:, 0]
    if run.padding is not None:
        real = real & ~columns.padded(run.padding)[:, 0]
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    attending = SparseAttention(method, run, layer, len(parts.layers), kv_heads, real, view.mask)
    # with a mask, keys would be repeated for all heads; without one and with earlier keys, the model would take the wrong ones
    return (replace(view, mask=None) if run.past == 0 else view), attending


def window_of(config: Any, layer: int) -> int | None:
    """Sliding window of a decoder layer in tokens; None if it sees everything."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds is not None and kinds[layer] == "full_attention" else getattr(config, "sliding_window", None)


def token_share(chosen: Tensor, real: Tensor, rows: int) -> Tensor:
    """(B,) float32, share of the causal (row, key) pairs of `real` tokens that `chosen` ones are; the rows are the last."""

    def pairs(which: Tensor) -> Tensor:
        return (which.cumsum(1) * which)[:, -rows:].sum(1).float()

    return pairs(chosen) / pairs(real).clamp(min=1)
