"""Tiny random models of every supported family, and inputs for them that are awkward on purpose.

Nothing is downloaded: each model is built from its configuration and filled from a fixed seed. The fill is wider than
a trained model's, so that attention is far from uniform and no two logits are nearly equal; a token that is dropped
or read at the wrong place then moves the logits by a lot.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.support import qwen_vl, tiled
from tests.support.qwen_vl import QWEN
from tests.support.tiled import TILED

VOCAB, IMAGE, VIDEO, PAD = 128, 120, 121, 0
SIDE = 24  # pixels of the square picture a vision tower sees
PATCH = 8  # so 3 x 3 patches
WINDOW = 10  # sliding window of the two kinds that have a small one: shorter than every prompt
DEPTH = 6

_TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=127,
)
_VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=PATCH,
)
_PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 48]]

_HYBRID = ["full_attention", "sliding_attention"] * (DEPTH // 2)
TEXT_CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**_TEXT),
    "mistral": lambda: hf.MistralConfig(**_TEXT, head_dim=8),  # its default window, 4096, makes all layers sliding
    "mistral-sliding": lambda: hf.MistralConfig(**_TEXT, head_dim=8, sliding_window=WINDOW),
    "qwen2": lambda: hf.Qwen2Config(**_TEXT),
    "qwen2-hybrid": lambda: hf.Qwen2Config(
        **_TEXT, use_sliding_window=True, sliding_window=WINDOW, layer_types=list(_HYBRID)
    ),
    "qwen3": lambda: hf.Qwen3Config(**_TEXT, head_dim=8),
}
VLMS = (
    "llava-clip-llama",
    "llava-clip-mistral",
    "llava-clip-qwen2",
    "llava-siglip-llama",
    "llava-siglip-mistral",
    "llava-siglip-qwen2",
    "llava-next",
    "llava-onevision",
    *QWEN,
)
KINDS = (*TEXT_CONFIGS, *VLMS)
SLIDING = ("mistral-sliding", "qwen2-hybrid")


def build(kind: str, attn: str = "sdpa") -> nn.Module:
    """A fresh fp32 model of one of `KINDS` or `TILED` in eval mode; the same weights every time, whatever `attn` is."""
    model = copy.deepcopy(_template(kind))
    model.set_attn_implementation(attn)
    return model


@functools.cache
def _template(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)  # what a model draws for itself, such as a class token
        return _fill(_made(kind))


def _made(kind: str) -> Any:
    if kind in TEXT_CONFIGS:
        text = TEXT_CONFIGS[kind]()
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        model = getattr(hf, names[kind.split("-")[0]] + "ForCausalLM")(text)
    elif kind == "llava-next":
        model = hf.LlavaNextForConditionalGeneration(
            hf.LlavaNextConfig(
                vision_config=hf.CLIPVisionConfig(**_VISION),
                text_config=TEXT_CONFIGS["mistral"](),
                image_token_index=IMAGE,
                image_grid_pinpoints=_PINPOINTS,
            )
        )
    elif kind == "llava-onevision":
        model = hf.LlavaOnevisionForConditionalGeneration(
            hf.LlavaOnevisionConfig(
                vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
                text_config=TEXT_CONFIGS["qwen2"](),
                image_token_index=IMAGE,
                video_token_index=VIDEO,
                image_grid_pinpoints=_PINPOINTS,
                vision_aspect_ratio="anyres_max_4",  # the tallest pinpoint is over it and gets interpolated
            )
        )
    elif kind in QWEN:
        model = qwen_vl.make(kind, _TEXT, IMAGE, VIDEO)
    elif kind in TILED:
        text = TEXT_CONFIGS["qwen2" if kind == "internvl" else "llama"]()
        model = tiled.make(kind, text, IMAGE)
    elif kind in VLMS:
        _, tower, text_name = kind.split("-")
        vision = hf.CLIPVisionConfig if tower == "clip" else hf.SiglipVisionConfig
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=vision(**_VISION),
                text_config=TEXT_CONFIGS[text_name](),
                image_token_index=IMAGE,
                vision_feature_select_strategy="default" if tower == "clip" else "full",
            )
        )
    else:
        raise ValueError(f"unknown kind {kind!r}; choose from {', '.join((*KINDS, *TILED))}")
    return model


def _fill(model: Any) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norm scales around 1, biases around 0, the newline embedding
                parameter.add_(noise * 0.2)
            elif "embed" in name and "patch" not in name:
                parameter.copy_(noise)
            else:
                inward = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()  # 3: one matrix an expert
                parameter.copy_(noise * 1.2 / math.sqrt(inward))
    model.generation_config.eos_token_id = None  # every run has the length that was asked for
    model.generation_config.pad_token_id = PAD
    # a random model would otherwise write picture placeholders into its answers
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model.eval()


def inputs(kind: str, batch: int = 1, pad: bool = False, video: bool = False) -> dict[str, Tensor]:
    """Model inputs of `batch` samples, always the same for the same arguments.

    Sample 0 has three pictures, the first two with no text between them; sample 1 is text only; sample 2 has one
    picture (all text where the kind has no vision; sample b is laid out like sample b % 3). With `pad` the prompts
    differ in length and the shorter ones are padded on the left; without it they are filled up with text.
    With `video` the picture of sample 2 is a video of two frames in llava-onevision; in Qwen-VL there is a video before it.
    """
    if kind in QWEN:
        return qwen_vl.inputs(kind, qwen_vl.layouts(batch, video), pad, IMAGE, VIDEO, PAD)
    if kind in TILED:
        return tiled.inputs(kind, batch, pad, IMAGE, PAD)
    generator = torch.Generator().manual_seed(11)
    pictures: list[list[tuple[int, int]]] = []  # per sample, (height, width) of each of its pictures
    rows: list[list[int]] = []
    for b in range(batch):
        layout, sizes = _LAYOUTS[b % 3]
        rows.append([])
        pictures.append(sizes if kind in VLMS else [])
        left = list(sizes)
        for step in layout:
            if step == "picture" and kind not in VLMS:
                step = 6
            if step == "picture":
                slots = 2 * 4 + 1 if video and b % 3 == 2 else picture_tokens(kind, left.pop(0), len(sizes))
                rows[-1] += [VIDEO if video and b % 3 == 2 else IMAGE] * slots
            else:
                rows[-1] += _words(step, generator)
    length = max(map(len, rows))
    if not pad:
        rows = [row + _words(length - len(row), generator) for row in rows]
    out = dict(
        input_ids=torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    )
    if kind in VLMS:
        out |= _pixels(kind, pictures, video, generator)
    return out


_LAYOUTS: list[tuple[list[Any], list[tuple[int, int]]]] = [
    ([2, "picture", "picture", 3, "picture", 7], [(24, 32), (20, 20), (40, 20)]),
    ([19], []),
    ([4, "picture", 5], [(70, 48)]),
]


def picture_tokens(kind: str, size: tuple[int, int], together: int = 1) -> int:
    """Placeholders that one picture of (height, width) needs in a sample that has `together` pictures."""
    side = SIDE // PATCH
    if kind.startswith(("llava-clip", "llava-siglip")):
        return side * side
    if kind == "llava-onevision" and together > 1:
        return side * side + 1
    height, width = (edge // SIDE * side for edge in _resolution(size))
    if size[1] / size[0] > width / height:  # the picture is wider than its grid: blank rows above and below go
        height -= 2 * ((height - int(round(size[0] * width / size[1], 7))) // 2)
    else:
        width -= 2 * ((width - int(round(size[1] * height / size[0], 7))) // 2)
    shrink = math.sqrt(height * width / (4 * side * side))
    if kind == "llava-onevision" and shrink > 1.1:
        height, width = int(height // shrink), int(width // shrink)
    return side * side + height * (width + 1)


def _resolution(size: tuple[int, int]) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution(size, _PINPOINTS)


def _pixels(kind: str, pictures: list[list[tuple[int, int]]], video: bool, generator: Any) -> dict[str, Tensor]:
    if video:
        pictures = [[] if b % 3 == 2 else sizes for b, sizes in enumerate(pictures)]
    flat = [size for sizes in pictures for size in sizes]
    if kind not in ("llava-next", "llava-onevision"):
        pixels = torch.randn(len(flat), 3, SIDE, SIDE, generator=generator)
        return dict(pixel_values=pixels) if flat else {}
    tiles = [1 + math.prod(edge // SIDE for edge in _resolution(size)) for size in flat]
    out: dict[str, Tensor] = {}
    if flat:
        out["pixel_values"] = torch.randn(len(flat), max(tiles), 3, SIDE, SIDE, generator=generator)
        out["image_sizes"] = torch.tensor(flat)
        if kind == "llava-onevision":
            out["batch_num_images"] = torch.tensor([len(sizes) for sizes in pictures])
    if video:
        out["pixel_values_videos"] = torch.randn(1, 2, 3, SIDE, SIDE, generator=generator)
    return out


def _words(n: int, generator: Any) -> list[int]:
    return torch.randint(2, 110, (n,), generator=generator).tolist()
