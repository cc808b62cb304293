"""Tiny models that take pictures as tiles, InternVL, Idefics3 and SmolVLM, and inputs laid out as by their processors."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TILED = ("internvl", "idefics3", "smolvlm")
START, END, NAMED = 122, 123, 124  # around a picture; in Idefics3 before a tile, with a token that names it
SIDE, TOKENS = 16, 4  # pixels a side of a tile, tokens it becomes

_LAYOUTS: list[list[Any]] = [[2, (3,), (1,), 3, (1,), 5], [19], [4, (2,), 6]]  # words, or a picture of so many tiles


def make(kind: str, text: hf.PreTrainedConfig, image: int) -> nn.Module:
    """A model of one of `TILED` around a decoder of these sizes."""
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
    if kind == "internvl":
        vision |= dict(image_size=[SIDE, SIDE], patch_size=[4, 4])
        options = dict(image_token_id=image, image_seq_length=TOKENS, tie_word_embeddings=False)
        return hf.InternVLForConditionalGeneration(
            hf.InternVLConfig(vision_config=hf.InternVLVisionConfig(**vision), text_config=text, **options)
        )
    family = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    tower = getattr(hf, f"{family}VisionConfig")(**vision, image_size=SIDE)
    config = getattr(hf, f"{family}Config")(vision_config=tower, text_config=text, image_token_id=image)
    return getattr(hf, f"{family}ForConditionalGeneration")(config)


def inputs(kind: str, batch: int, pad: bool, image: int, padding: int) -> dict[str, Tensor]:
    """Model inputs, the shorter ones padded on the left, or filled up with text; sample b is laid out like sample b % 3."""
    generator = torch.Generator().manual_seed(11)

    def words(n: int) -> list[int]:
        return torch.randint(2, 110, (n,), generator=generator).tolist()

    rows, tiles = [], []
    for b in range(batch):
        rows.append([])
        tiles.append(0)
        for segment in _LAYOUTS[b % 3]:
            if isinstance(segment, int):
                rows[-1] += words(segment)
                continue
            (count,) = segment
            tiles[-1] += count
            if kind == "internvl":
                rows[-1] += [START, *[image] * (TOKENS * count), END]
            else:
                rows[-1] += [x for _ in range(count) for x in (START, NAMED, *[image] * TOKENS)] + [START]
    length = max(map(len, rows))
    if not pad:
        rows = [row + words(length - len(row)) for row in rows]
    out = dict(
        input_ids=torch.tensor([[padding] * (length - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    )
    pixels = torch.randn(sum(tiles), 3, SIDE, SIDE, generator=generator)
    if kind == "internvl":
        out["pixel_values"] = pixels
    else:  # every sample has as many, with tiles of zeros behind its own
        whole = torch.zeros(batch, max(tiles), 3, SIDE, SIDE)
        for b, own in enumerate(pixels.split(tiles)):
            whole[b, : len(own)] = own
        out["pixel_values"] = whole
    return out
