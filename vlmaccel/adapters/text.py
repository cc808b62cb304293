"""Text LLMs of transformers: Llama, Mistral, Qwen2, Qwen3, and every decoder of the same shape."""

from __future__ import annotations

import inspect
import sys

from torch import nn

from vlmaccel.adapters.base import Adapter, Parts
from vlmaccel.hooks import Method
from vlmaccel.methods import FastV

LAYER_PARTS = ("input_layernorm", "self_attn")
ATTENTION_PARTS = ("q_proj", "k_proj", "head_dim", "scaling")
LAYER_INPUTS = ("position_embeddings", "attention_mask", "cache")


def missing(text: nn.Module) -> list[str]:
    """What a decoder stack lacks of the shape that the hooks rely on; empty if it fits."""
    lacks = [f"{type(text).__name__}.{name}" for name in ("layers", "norm", "rotary_emb") if not hasattr(text, name)]
    rotary = getattr(text, "rotary_emb", None)
    if rotary is not None and "layer_type" in inspect.signature(type(rotary).forward).parameters:
        lacks.append("single rotary embedding for all layers")
    if getattr(text.config, "attn_logit_softcapping", None) is not None:
        lacks.append("plain softmax in its attention (attn_logit_softcapping is set)")
    for layer in getattr(text, "layers", [])[:1]:
        lacks += [f"{type(layer).__name__}.{name}" for name in LAYER_PARTS if not hasattr(layer, name)]
        inputs = inspect.signature(type(layer).forward).parameters
        named = {"cache" if name == "past_key_values" else name for name in inputs}  # its name until transformers 5.23
        lacks += [f"{type(layer).__name__}.forward(..., {name}=)" for name in LAYER_INPUTS if name not in named]
        attention = getattr(layer, "self_attn", None)
        if attention is not None:
            kind = type(attention)
            lacks += [f"{kind.__name__}.{name}" for name in ATTENTION_PARTS if not hasattr(attention, name)]
            if hasattr(attention, "rotary_ndims"):
                lacks.append(f"rotary positions over whole heads ({kind.__name__}.rotary_ndims is set)")
            if not hasattr(sys.modules[kind.__module__], "apply_rotary_pos_emb"):
                lacks.append(f"{kind.__module__}.apply_rotary_pos_emb")
    return lacks


def decoder_parts(base: nn.Module, text: nn.Module) -> Parts:
    """The parts of a decoder stack; raises NotImplementedError naming what it lacks."""
    if lacks := missing(text):
        raise NotImplementedError(
            f"{type(text).__name__} is not a decoder that vlmaccel can hook: it has no {', no '.join(lacks)}. "
            "Pre-norm decoders with separate q_proj and k_proj and rotary positions work (Llama, Mistral, Qwen2, Qwen3)"
        )
    return Parts(base, text, text.layers, text.norm, text.rotary_emb, text.config)


class TextAdapter(Adapter):
    """A causal language model, or its decoder stack alone."""

    name = "text"
    summary = "Llama, Mistral, Qwen2, Qwen3 and any transformers decoder of the same shape"

    def matches(self, model: nn.Module) -> bool:
        return hasattr(self._stack(model), "layers") and hasattr(self._stack(model), "embed_tokens")

    def parts(self, model: nn.Module) -> Parts:
        text = self._stack(model)
        return decoder_parts(text, text)

    def default(self, depth: int) -> Method:
        # half way down, not after two layers as for pictures: until there text tokens still read one another
        return FastV(layer=max(1, depth // 2), ratio=0.75)

    @staticmethod
    def _stack(model: nn.Module) -> nn.Module:
        return getattr(model, getattr(model, "base_model_prefix", "") or "model", model)


ADAPTER = TextAdapter()
