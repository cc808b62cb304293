"""Tiny Qwen-VL models of every generation, and inputs for them laid out as the real processors do it."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")
VISION_START, VISION_END = 122, 123
PATCH, MERGE, FRAMES = 4, 2, 2  # pixels a side of a patch, patches a side of a token, frames of a patch
SECONDS = 0.5  # between two patches of a video

Grid = tuple[int, int, int]  # patches in time, height and width
Segment = int | tuple[str, Grid]  # so many words, or a picture


def make(kind: str, text: dict[str, Any], image: int, video: int) -> nn.Module:
    """A model of one of `QWEN` whose decoder has the sizes `text`, with these placeholders for images and videos."""
    ids = dict(
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    patches = dict(patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=FRAMES, num_heads=2)
    width = text["hidden_size"]
    if kind == "qwen2-vl":
        vision = dict(patches, depth=2, embed_dim=16, hidden_size=width, mlp_ratio=2)
        text = dict(text, rope_parameters={**rope, "mrope_section": [1, 1, 2]})
        return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    vision = dict(patches, hidden_size=16, out_hidden_size=width, intermediate_size=32)
    if kind == "qwen2.5-vl":  # windows of 2 x 2 tokens
        vision |= dict(depth=2, window_size=4 * PATCH, fullatt_block_indexes=[1], tokens_per_second=4)
        text = dict(text, rope_parameters={**rope, "mrope_section": [1, 1, 2]})
        return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    vision |= dict(depth=4, num_position_embeddings=16, deepstack_visual_indexes=[0, 1, 2])
    text = dict(text, head_dim=16, rope_parameters={**rope, "mrope_section": [4, 2, 2]})
    if kind == "qwen3-vl":
        return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids))


_LAYOUTS: list[list[Segment]] = [
    [2, ("image", (1, 4, 6)), ("image", (1, 4, 4)), 3, ("image", (1, 2, 4)), 7],
    [19],
    [4, ("image", (1, 8, 6)), 5],
]
_WITH_VIDEO: list[Segment] = [2, ("video", (2, 4, 6)), 2, ("image", (1, 4, 4)), 5]


def layouts(batch: int, video: bool) -> list[list[Segment]]:
    """What the samples of a batch are made of."""
    return [_WITH_VIDEO if video and b % 3 == 2 else _LAYOUTS[b % 3] for b in range(batch)]


def inputs(
    kind: str, samples: list[list[Segment]], pad: bool, image: int, video: int, padding: int
) -> dict[str, Tensor]:
    """Model inputs of these samples, the shorter ones padded on the left, or filled up with text.

    A picture stands between tokens for its start and end. In Qwen3-VL so does every frame (here: patch in time) of a video,
    too, behind words that say which second it is from.
    """
    generator = torch.Generator().manual_seed(11)

    def words(n: int) -> list[int]:
        return torch.randint(2, 110, (n,), generator=generator).tolist()

    rows: list[list[int]] = []
    grids: dict[str, list[Grid]] = {"image": [], "video": []}
    for segments in samples:
        row: list[int] = []
        for segment in segments:
            if isinstance(segment, int):
                row += words(segment)
                continue
            what, (frames, height, width) = segment
            grids[what].append((frames, height, width))
            if what == "video" and kind.startswith("qwen3"):
                row.append(VISION_START)
                for _ in range(frames):
                    row += [*words(2), VISION_START, *[video] * (height * width // MERGE**2), VISION_END]
                row.append(VISION_END)
            else:
                tokens = frames * height * width // MERGE**2
                row += [VISION_START, *[image if what == "image" else video] * tokens, VISION_END]
        rows.append(row)
    length = max(map(len, rows))
    if not pad:
        rows = [row + words(length - len(row)) for row in rows]
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows])
    out = dict(
        input_ids=ids,
        attention_mask=torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        mm_token_type_ids=(ids == image).int() + 2 * (ids == video).int(),
    )
    for what, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[what]:
            out[f"{what}_grid_thw"] = torch.tensor(grids[what])
            patches = sum(map(math.prod, grids[what]))
            out[name] = torch.randn(patches, 3 * FRAMES * PATCH**2, generator=generator)
    if grids["video"] and kind == "qwen2.5-vl":
        out["second_per_grid_ts"] = torch.full((len(grids["video"]),), SECONDS)
    return out


def processor(kind: str, image: int, video: int, vocabulary: int) -> Any:
    """The family's own processor, with a tokenizer that knows the words w2, w3, ... by their ids."""
    special = {"<|image_pad|>": image, "<|video_pad|>": video}
    special |= {"<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END}
    words = {f"w{i}": i for i in range(2, vocabulary) if i not in special.values()}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1} | words | special, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    patches = dict(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=FRAMES)
    pictures = hf.Qwen2VLImageProcessor(**patches, size={"shortest_edge": 64, "longest_edge": 1024})
    family = {"qwen2-vl": "Qwen2VL", "qwen2.5-vl": "Qwen2_5_VL"}.get(kind, "Qwen3VL")
    videos = hf.Qwen3VLVideoProcessor if family == "Qwen3VL" else hf.Qwen2VLVideoProcessor
    videos = videos(**patches, size={"shortest_edge": 64, "longest_edge": 4096}, cap_pixels_per_frame=False)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return getattr(hf, f"{family}Processor")(pictures, tokenizer, videos, chat_template=template)


def alone(batch: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Sample b of a batch without its padding, with its own pictures only."""
    real = batch["attention_mask"][b].bool()
    one = {k: batch[k][b : b + 1, real] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for kind, (what, name) in enumerate((("image", "pixel_values"), ("video", "pixel_values_videos")), 1):
        if f"{what}_grid_thw" not in batch:
            continue
        tokens = (batch["mm_token_type_ids"] == kind).sum(1).tolist()
        patches, grids = batch[name], batch[f"{what}_grid_thw"]
        ends = (grids.prod(1) // MERGE**2).cumsum(0)
        mine = (ends > sum(tokens[:b])) & (ends <= sum(tokens[: b + 1]))
        if mine.any():
            one[f"{what}_grid_thw"] = grids[mine]
            one[name] = torch.cat(
                [x for x, own in zip(patches.split(grids.prod(1).tolist()), mine, strict=True) if own]
            )
            if what == "video" and "second_per_grid_ts" in batch:
                one["second_per_grid_ts"] = batch["second_per_grid_ts"][mine]
    return one
