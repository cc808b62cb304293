"""InternVL as transformers has it: InternVL3 and its relatives, pictures in square tiles."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmaccel.adapters.base import Adapter, Parts
from vlmaccel.adapters.pictures import encode_pictures, placeholders, tiled_token_map
from vlmaccel.adapters.text import decoder_parts
from vlmaccel.hooks import Method
from vlmaccel.methods import DivPrune
from vlmaccel.run import TokenMap

CLASSES = ("InternVLForConditionalGeneration", "InternVLModel")


class InternVLAdapter(Adapter):
    """A vision tower for tiles, four patches of which become one token; the tiles of a picture, the last one all of it in small,
    or a frame of a video follow each other without a gap."""

    name = "internvl"
    summary = "InternVLForConditionalGeneration, with any decoder of the text adapter"
    multimodal = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ in CLASSES

    def parts(self, model: nn.Module) -> Parts:
        base = model if hasattr(model, "language_model") else model.model
        return decoder_parts(base, base.language_model)

    def default(self, depth: int) -> Method:
        return DivPrune(ratio=0.5)  # as in the LLaVA and Qwen-VL families; not measured here

    def encode(self, base: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], TokenMap | None]:
        inputs = encode_pictures(base, inputs)
        if (inputs.get("mm_encoder_outputs") or {}).get("image") is None:
            return inputs, None
        config: Any = base.config
        patches = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
        special = placeholders(base, inputs, "image")
        return inputs, tiled_token_map(special, int(patches * config.downsample_ratio))


ADAPTER = InternVLAdapter()
