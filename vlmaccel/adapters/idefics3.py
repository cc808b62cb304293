"""Idefics3 and SmolVLM: pictures in square tiles, with tokens that name each tile's row and column before it."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import nn

from vlmaccel.adapters.base import Adapter, Parts
from vlmaccel.adapters.pictures import encode_pictures, placeholders, tiled_token_map
from vlmaccel.adapters.text import decoder_parts
from vlmaccel.hooks import Method
from vlmaccel.methods import DivPrune
from vlmaccel.run import TokenMap

CLASSES = tuple(
    f"{family}{head}" for family in ("Idefics3", "SmolVLM") for head in ("ForConditionalGeneration", "Model")
)


class Idefics3Adapter(Adapter):
    """A vision tower for tiles, several patches of which become one token. Every tile counts as a picture of its own: there is
    text between those of one picture, and no telling where the next picture begins."""

    name = "idefics3"
    summary = "Idefics3ForConditionalGeneration, SmolVLM, with any decoder of the text adapter"
    multimodal = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ in CLASSES

    def parts(self, model: nn.Module) -> Parts:
        base = model if hasattr(model, "text_model") else model.model
        return decoder_parts(base, base.text_model)

    def default(self, depth: int) -> Method:
        return DivPrune(ratio=0.5)  # as in the LLaVA and Qwen-VL families; not measured here

    def encode(self, base: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], TokenMap | None]:
        inputs = encode_pictures(base, inputs)
        encoded = inputs.get("mm_encoder_outputs")
        if not isinstance(encoded, dict) or encoded.get("image") is None:
            return inputs, None
        model: Any = base
        return inputs, tiled_token_map(placeholders(base, inputs, "image"), isqrt(model.image_seq_len))


ADAPTER = Idefics3Adapter()
