"""The demo's tiny Qwen2-VL: its vocabulary, processor and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vlmaccel.evals.easy_vqa import COLORS, SHAPES
from vlmaccel.training.demo_packing import Layout, Prompt
from vlmaccel.training.demo_stages import IMAGE_SIZE, PATCH_SIZE, QUESTION_WORDS, Family, initialise

MERGE = 2  # patches along each edge of a visual token
TOKEN_SIZE = MERGE * PATCH_SIZE
GRID = IMAGE_SIZE // TOKEN_SIZE
VISUAL_TOKENS = GRID * GRID

SPECIAL = (
    "<|endoftext|>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD, UNK, START, END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
PROMPT_WORDS = ("user", "assistant", "?", ".")
WORDS = (*SPECIAL, *PROMPT_WORDS, *QUESTION_WORDS, *COLORS, *SHAPES)
VOCABULARY = {word: i for i, word in enumerate(WORDS)}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = [{'type': 'text', 'text': message['content']}] if message['content'] is string \
else message['content'] -%}
<|im_start|>{{ message['role'] }}
{% for part in content -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Pixels. Sides are rounded to 16 px, up or down by what the picture was: between these limits every square picture, and
# not only those of some sizes, becomes 192 px.
SIZE = {"shortest_edge": (IMAGE_SIZE - 8) ** 2, "longest_edge": (IMAGE_SIZE + 8) ** 2}
PATCHING: dict[str, Any] = {
    "patch_size": PATCH_SIZE,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
TO_PATCHES = Qwen2VLImageProcessorPil(do_resize=False, **PATCHING)


def build_processor() -> Qwen2VLProcessor:
    """Tokenizer, image and video processor and chat template, with nothing to download."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[word for word in SPECIAL if word.startswith("<|")],
        padding_side="left",
        model_max_length=4096,
    )
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=SIZE, **PATCHING),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=SIZE, cap_pixels_per_frame=True, **PATCHING),
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> Qwen2VLForConditionalGeneration:
    """The untrained model."""
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": PAD,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    vision = {
        "depth": 5,
        "embed_dim": 128,
        "hidden_size": 192,
        "mlp_ratio": 3,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=PAD, eos_token_id=END, pad_token_id=PAD, max_new_tokens=24, do_sample=False
    )
    initialise(model)
    return model


def vision(model: Qwen2VLForConditionalGeneration, pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Patch features (B, n, 4, 128), by visual token, and visual tokens (B, n, 192) of uint8 pictures of one size."""
    inputs = TO_PATCHES(pictures, return_tensors="pt")
    output = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    patches = output.last_hidden_state.unflatten(0, (len(pictures), -1, MERGE * MERGE))
    return patches, output.pooler_output.unflatten(0, (len(pictures), -1))


def merge(model: Qwen2VLForConditionalGeneration, patches: Tensor) -> Tensor:
    """Visual tokens (B, n, 192) of the features (B, n, 4, 128) of their patches."""
    return model.model.visual.merger(patches).unflatten(0, patches.shape[:2])


def layout(rows: int, columns: int) -> Layout:
    """Time, row and column of the visual tokens of a picture, row by row."""
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return Layout(torch.stack([torch.zeros_like(row), row, column]), extent=max(rows, columns))


FAMILY = Family(
    prompt=Prompt(
        start="<|im_start|>user\n<|vision_start|>",
        question="<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n",
    ),
    layout=layout(GRID, GRID),
    side=GRID,
    features=lambda model, pictures: vision(model, pictures)[0],
    project=merge,
    autocast=True,
)
