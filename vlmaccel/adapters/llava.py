"""The LLaVA family of transformers: LLaVA (1.5), LLaVA-NeXT (1.6) and LLaVA-OneVision."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import isqrt
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from vlmaccel.adapters.base import Adapter, Parts, picture_token_map
from vlmaccel.adapters.patches import PatchParts, look_at_batch
from vlmaccel.adapters.pictures import encode_pictures, nowhere, placeholders, raster
from vlmaccel.adapters.text import decoder_parts
from vlmaccel.adapters.transformers_vit import vision_parts
from vlmaccel.adapters.vision import VisionParts
from vlmaccel.hooks import HOOK_POINTS, Method
from vlmaccel.methods import DivPrune
from vlmaccel.run import Modality, TokenMap

CLASSES = tuple(
    f"{family}{head}"
    for family in ("Llava", "LlavaNext", "LlavaOnevision")
    for head in ("ForConditionalGeneration", "Model")
)


class LlavaAdapter(Adapter):
    """A vision tower, a projector, and a language model that gets the projected patches as tokens."""

    name = "llava"
    summary = "LlavaForConditionalGeneration, LlavaNext, LlavaOnevision, with any decoder of the text adapter"
    hook_points = HOOK_POINTS
    multimodal = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ in CLASSES

    def parts(self, model: nn.Module) -> Parts:
        base = model if hasattr(model, "language_model") else model.model
        return decoder_parts(base, base.language_model)

    def default(self, depth: int) -> Method:
        return DivPrune(
            ratio=0.5
        )  # of all methods the best on the shipped models at half of the tokens, see docs/tokens.md

    def vision(self, model: nn.Module) -> VisionParts:
        base = self.parts(model).base
        used = base.config.vision_feature_layer
        if not isinstance(used, int):
            raise NotImplementedError(f"methods in the tower need one vision_feature_layer, not {used}")
        tower = vision_parts(base.vision_tower)
        # hidden_states[0] is what goes into the first block
        last = used - 1 if used >= 0 else len(tower.blocks) + used
        # OneVision interpolates between projected patches, so those of a group do not stay equal
        as_they_are = not type(base).__name__.startswith("LlavaOnevision")
        return replace(tower, last=last, projector=base.multi_modal_projector if as_they_are else None)

    def patches(self, model: nn.Module) -> PatchParts:
        base, tower = self.parts(model).base, self.vision(model)
        assert tower.last is not None
        return PatchParts(
            base.vision_tower,
            tower.blocks[tower.last].attention,
            ("q_proj", "k_proj"),
            partial(look_at_batch, tower.prefix > 0),
            base.multi_modal_projector,
            one_by_one=True,
            newline=partial(newline_of, base),
        )

    def encode(self, base: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], TokenMap | None]:
        inputs = encode_pictures(base, inputs)
        encoded = inputs.get("mm_encoder_outputs") or {}
        tokens = None
        if encoded.get("image") is not None:
            features = list(encoded["image"].pooler_output)
            grids = [patch_grid(base, f) for f in features]
            special = placeholders(base, inputs, "image")
            tokens = picture_token_map(special, [len(f) for f in features], Modality.IMAGE, None, grids)
        if encoded.get("video") is not None:
            special = placeholders(base, inputs, "video")
            lengths = [len(video) for video in encoded["video"].pooler_output]
            tokens = picture_token_map(special, lengths, Modality.VIDEO, tokens)
        return inputs, tokens


def newline_of(base: nn.Module) -> Tensor | None:
    """(D,) what stands behind every row of a mosaic of crops, None if nothing does."""
    with align_module_device(base):
        newline = getattr(base, "image_newline", None)
        return None if newline is None else newline.detach().clone()


def patch_grid(base: nn.Module, features: Tensor) -> Tensor:
    """(n, 3) view, row and column of every token of one picture from its projected features (n, D).

    LLaVA-NeXT and OneVision put the whole picture first, then the mosaic of crops with the learned `image_newline`
    after every row: the newline vectors tell how wide the (unpadded) mosaic is.
    """
    n = features.shape[0]
    newline = getattr(base, "image_newline", None)
    if newline is None:
        return raster(0, n, isqrt(n)) if isqrt(n) ** 2 == n else nowhere(n)
    at = (features == newline.to(features)).all(-1).nonzero().flatten().tolist()
    if not at:
        return raster(0, n, isqrt(n)) if isqrt(n) ** 2 == n else nowhere(n)
    side = base.config.vision_config.image_size // base.config.vision_config.patch_size
    whole = raster(0, side * side, side)
    rows, rest = len(at), n - side * side
    if rows == 1 and rest == 1:
        return torch.cat([whole, nowhere(1)])
    if rest <= 0 or rest % rows:
        return nowhere(n)
    mosaic = raster(1, rest, rest // rows)
    mosaic[mosaic[:, 2] == rest // rows - 1, 2] = -1  # a newline has a row, but is no patch
    return torch.cat([whole, mosaic])


ADAPTER = LlavaAdapter()
