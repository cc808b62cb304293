"""The Qwen-VL family of transformers: Qwen2-VL, Qwen2.5-VL and Qwen3-VL, dense and with experts."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmaccel.adapters.base import Adapter, Parts, picture_token_map
from vlmaccel.adapters.patches import Block, PatchParts, received
from vlmaccel.adapters.pictures import encode_pictures, placeholders
from vlmaccel.adapters.text import decoder_parts
from vlmaccel.hooks import Method
from vlmaccel.methods import DivPrune
from vlmaccel.run import Modality, TokenMap

CLASSES = tuple(
    f"{family}{head}"
    for family in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe")
    for head in ("ForConditionalGeneration", "Model")
)
MODALITIES = {"image": Modality.IMAGE, "video": Modality.VIDEO}


class QwenVLAdapter(Adapter):
    """A vision tower for pictures of any size, which puts 2 x 2 patches into one token, and a decoder with three positions a
    token (time, row, column); in Qwen3-VL the first decoder layers are given more features of the pictures."""

    name = "qwen-vl"
    summary = "Qwen2VLForConditionalGeneration, Qwen2_5_VL, Qwen3VL, Qwen3VLMoe"
    multimodal = True

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ in CLASSES

    def parts(self, model: nn.Module) -> Parts:
        base = model if hasattr(model, "language_model") else model.model
        deepstack = len(getattr(base.config.vision_config, "deepstack_visual_indexes", ()))
        return replace(decoder_parts(base, base.language_model), axes=3, deepstack=deepstack)

    def default(self, depth: int) -> Method:
        return DivPrune(
            ratio=0.5
        )  # of all methods the best on the shipped models at half of the tokens, see docs/tokens.md

    def patches(self, model: nn.Module) -> PatchParts:
        tower: Any = self.parts(model).base.visual
        return PatchParts(
            tower,
            tower.blocks[max(0, len(tower.blocks) - 2)].attn,
            ("qkv",),
            partial(look_at_groups, tower.spatial_merge_size**2),
            tower.merger,
            one_by_one=False,
        )

    def encode(self, base: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], TokenMap | None]:
        inputs = encode_pictures(base, inputs)
        encoded = inputs.get("mm_encoder_outputs") or {}
        tokens = None
        for modality, kind in MODALITIES.items():
            if encoded.get(modality) is None:
                continue
            lengths = [len(features) for features in encoded[modality].pooler_output]
            tokens = picture_token_map(placeholders(base, inputs, modality), lengths, kind, tokens)
        if tokens is None:
            return inputs, None
        return inputs, TokenMap(tokens.modality, tokens.image, self._grid(base, inputs, tokens))

    def _grid(self, base: Any, inputs: dict[str, Any], tokens: TokenMap) -> Tensor:
        """(B, N, 3) frame, row and column of every visual token, from the positions that the model gives it."""
        positions = inputs.get("position_ids")
        if positions is None:
            positions = rope_positions(base, inputs, tokens.modality.shape[1])
        if positions is None or positions.ndim < 3 or len(positions) < 3:  # one number a token
            return tokens.grid
        positions = positions[-3:].to(tokens.image.device)
        return grid_of(positions.expand(-1, len(tokens.image), -1), tokens)


def look_at_groups(group: int, block: Block) -> tuple[Tensor, Tensor]:
    """`PatchParts.look` of a tower that sees all pictures in one row, each frame or window on its own, and makes a token of every
    `group` neighbours: means over these."""
    attention = block.attention
    projected = block.projected["qkv"]
    query, key, _ = projected.view(len(projected), 3, attention.num_heads, -1).unbind(1)  # (N, H, head_dim)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    query, rotated = rotate(query, key, *block.kwargs["position_embeddings"])
    ends = block.kwargs["cu_seqlens"].to(key.device)
    lengths, starts = ends.diff(), ends[:-1]
    total = torch.zeros(len(key), device=key.device)
    for length in lengths.unique().tolist():  # all that are as long at once
        index = starts[lengths == length][:, None] + torch.arange(length, device=key.device)
        lse = None if block.lse is None else block.lse[0, :, index].transpose(0, 1)
        total[index] = received(
            query[index].transpose(1, 2), rotated[index].transpose(1, 2), attention.scaling, None, lse
        )
    return total.view(1, -1, group).mean(-1), key.float().mean(1).unflatten(0, (1, -1, group)).mean(2)


def rope_positions(base: Any, inputs: dict[str, Any], n: int) -> Tensor | None:
    """(3, B, n) positions of a call that is given none, padding counted, None where it has not what they are made of."""
    ids, kinds = inputs.get("input_ids"), inputs.get("mm_token_type_ids")
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if ids is None or kinds is None or not given:
        return None
    return base.get_rope_index(ids, kinds[:, -n:], **given)[0]


def grid_of(positions: Tensor, tokens: TokenMap) -> Tensor:
    """(B, N, 3) frame, row and column of every visual token, -1 for others.

    positions: (3, B, N) by time, row and column, which count from the same number in a picture: in a video in every frame from
    that of the first, unless text stands between them. Frames may be so short that they have the same time.
    """
    grid = tokens.grid.clone()
    for sample, image in enumerate(tokens.image):
        for number in image.unique().tolist():
            if number < 0:
                continue
            at = (image == number).nonzero().flatten()
            time, row, column = positions[:, sample, at]
            further = (row.diff() > 0) | ((row.diff() == 0) & (column.diff() > 0))
            frame = pad(~further | (time.diff() != 0), (1, 0)).cumsum(0)
            first = torch.full((int(frame[-1]) + 1,), int(positions.max()), device=row.device)
            # time tells where a picture begins if a chunk of a prompt has only the rest of it
            start = first.scatter_reduce(0, frame, positions[:, sample, at].amin(0), "amin")[frame]
            grid[sample, at] = torch.stack([frame, row - start, column - start], 1)
    return grid


ADAPTER = QwenVLAdapter()
