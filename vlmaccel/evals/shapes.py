"""Models of real shapes with random weights: what a speed measurement needs, without a download.

Time and memory depend on a model's shape, not on what its weights say. A model is built from its published
configuration, at a chosen depth, because all decoder layers are alike: four layers of a 7B model show what a
method does to one layer's work. Which tokens a random model finds important is arbitrary; how many it keeps
is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights


@dataclass(frozen=True)
class Shape:
    """A published model's shape.

    text, vision: model type and configuration fields of the decoder and of the vision tower (none for text
        models).
    family: model type of the whole, with its own fields in `extra`. image: (height, width) of the benchmark's
        picture.
    views: how often the tower runs for one picture. visual_tokens: placeholders that one picture takes in the
        prompt.
    """

    about: str
    text: tuple[str, Mapping[str, Any]]
    family: str = ""
    vision: tuple[str, Mapping[str, Any]] | None = None
    extra: Mapping[str, Any] | None = None
    image: tuple[int, int] = (0, 0)
    views: int = 1
    visual_tokens: int = 0

    def config(self, depth: int | None = None, vision_depth: int | None = None) -> PreTrainedConfig:
        """The transformers configuration, the decoder or the vision tower cut to so many layers if given."""
        text = _config(self.text, depth, "decoder")
        if self.vision is None:
            return text
        return AutoConfig.for_model(
            self.family,
            text_config=text,
            vision_config=_config(self.vision, vision_depth, "vision tower"),
            **(self.extra or {}),
        )


def _config(part: tuple[str, Mapping[str, Any]], depth: int | None, what: str) -> PreTrainedConfig:
    kind, fields = part
    name = "depth" if "depth" in fields else "num_hidden_layers"
    layers = fields[name]
    if depth is not None and not 1 <= depth <= layers:
        raise ValueError(f"the {what} of this shape has {layers} layers: ask for 1 to {layers}, not {depth}")
    return AutoConfig.for_model(kind, **{**fields, name: depth or layers})


def _decoder(
    d: int, m: int, layers: int, heads: int, kv: int, vocab: int, theta: float = 1e4, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": d,
        "intermediate_size": m,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": False,
        **more,
    }


def _tower(d: int, m: int, layers: int, size: int, patch: int = 14, heads: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": d,
        "intermediate_size": m,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
        **more,
    }


_CLIP = ("clip_vision_model", _tower(1024, 4096, 24, 336, projection_dim=768))
_SIGLIP = ("siglip_vision_model", _tower(1152, 4304, 26, 384, vision_use_head=False))
_TINY_CLIP = ("clip_vision_model", _tower(32, 64, 3, 24, patch=4, heads=2, projection_dim=32))
_TINY_SIGLIP = ("siglip_vision_model", _tower(32, 64, 3, 24, patch=4, heads=2, vision_use_head=False))
_TINY_LLAMA = _decoder(64, 96, 6, 4, 2, 128)
_TINY_GRID = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]], "image_token_index": 127}
_QWEN2_05B: dict[str, Any] = {
    "d": 896,
    "m": 4864,
    "layers": 24,
    "heads": 14,
    "kv": 2,
    "theta": 1e6,
    "tie_word_embeddings": True,
}


def _qwen2_vl(about: str, side: int, text: Mapping[str, Any], sections: list[int], **tower: int) -> Shape:
    """A Qwen2-VL with one square picture of `side` pixels. sections: of M-RoPE. tower: fields of the vision tower."""
    d, patch = text["hidden_size"], tower["patch_size"]
    rope = {**text["rope_parameters"], "mrope_section": sections}
    return Shape(
        about,
        ("qwen2_vl_text", {**text, "rope_parameters": rope}),
        family="qwen2_vl",
        vision=("qwen2_vl_vision", {"hidden_size": d, **tower}),
        extra={
            "tie_word_embeddings": True,
            "image_token_id": text["vocab_size"] - 1,
            "video_token_id": text["vocab_size"] - 2,
        },
        image=(side, side),
        visual_tokens=(side // patch // 2) ** 2,
    )


def _qwen2_vl_2b(side: int) -> Shape:
    text = _decoder(1536, 8960, 28, 12, 2, 151936, theta=1e6, tie_word_embeddings=True)
    about = f"Qwen2-VL-2B, one {side}x{side} picture, {(side // 28) ** 2} visual tokens"
    return _qwen2_vl(
        about, side, text, [16, 24, 24], depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, patch_size=14
    )


SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Shape(
        "CLIP ViT-L/14-336 and Vicuna-7B, one 336x336 picture, 576 visual tokens",
        ("llama", _decoder(4096, 11008, 32, 32, 32, 32064)),
        family="llava",
        vision=_CLIP,
        image=(336, 336),
        visual_tokens=576,
    ),
    "llava-next-7b": Shape(
        "CLIP ViT-L/14-336 and Mistral-7B, one 672x672 picture in 5 views, 2928 visual tokens",
        ("mistral", _decoder(4096, 14336, 32, 32, 8, 32064, theta=1e6, sliding_window=None)),
        family="llava_next",
        vision=_CLIP,
        image=(672, 672),
        views=5,
        visual_tokens=576 + 48 * (48 + 1),
    ),
    "llava-onevision-0.5b": Shape(
        "SigLIP so400m/14-384 and Qwen2-0.5B, one 768x768 picture in 5 views, 3699 visual tokens",
        ("qwen2", _decoder(vocab=152000, **_QWEN2_05B)),
        family="llava_onevision",
        vision=_SIGLIP,
        image=(768, 768),
        views=5,
        visual_tokens=729 + 54 * (54 + 1),
    ),
    "llava-onevision-7b": Shape(
        "SigLIP so400m/14-384 and Qwen2-7B, one 768x768 picture in 5 views, 3699 visual tokens",
        ("qwen2", _decoder(3584, 18944, 28, 28, 4, 152128, theta=1e6)),
        family="llava_onevision",
        vision=_SIGLIP,
        image=(768, 768),
        views=5,
        visual_tokens=729 + 54 * (54 + 1),
    ),
    "qwen2-vl-2b": _qwen2_vl_2b(1092),
    "qwen2-vl-2b-4k": _qwen2_vl_2b(1792),
    "llama-2-7b": Shape("text, Llama-2-7B", ("llama", _decoder(4096, 11008, 32, 32, 32, 32000))),
    "llama-3-8b": Shape("text, Llama-3-8B", ("llama", _decoder(4096, 14336, 32, 32, 8, 128256, theta=5e5))),
    "mistral-7b": Shape(
        "text, Mistral-7B v0.3",
        ("mistral", _decoder(4096, 14336, 32, 32, 8, 32768, theta=1e6, sliding_window=None)),
    ),
    "qwen2-0.5b": Shape("text, Qwen2-0.5B", ("qwen2", _decoder(vocab=151936, **_QWEN2_05B))),
    "qwen2-1.5b": Shape(
        "text, Qwen2-1.5B, the decoder of Qwen2-VL-2B",
        ("qwen2", _decoder(1536, 8960, 28, 12, 2, 151936, theta=1e6, tie_word_embeddings=True)),
    ),
    "qwen2-7b": Shape("text, Qwen2-7B", ("qwen2", _decoder(3584, 18944, 28, 28, 4, 152064, theta=1e6))),
    "tinyllama-1.1b": Shape("text, TinyLlama-1.1B", ("llama", _decoder(2048, 5632, 22, 32, 4, 32000))),
    "tiny-llava": Shape(
        "no published model: to try things in a second, 36 visual tokens",
        ("llama", _TINY_LLAMA),
        family="llava",
        vision=_TINY_CLIP,
        extra={"image_token_index": 127},
        image=(24, 24),
        visual_tokens=36,
    ),
    "tiny-llava-next": Shape(
        "no published model: to try things in a second, 192 visual tokens",
        ("mistral", _TINY_LLAMA),
        family="llava_next",
        vision=_TINY_CLIP,
        extra=_TINY_GRID,
        image=(48, 48),
        views=5,
        visual_tokens=36 + 12 * (12 + 1),
    ),
    "tiny-llava-onevision": Shape(
        "no published model: to try things in a second, 192 visual tokens",
        ("qwen2", _TINY_LLAMA),
        family="llava_onevision",
        vision=_TINY_SIGLIP,
        extra={**_TINY_GRID, "video_token_index": 126},
        image=(48, 48),
        views=5,
        visual_tokens=36 + 12 * (12 + 1),
    ),
    "tiny-qwen2-vl": _qwen2_vl(
        "no published model: to try things in a second, 36 visual tokens",
        48,
        _decoder(64, 96, 6, 4, 2, 128),
        [2, 3, 3],
        depth=3,
        embed_dim=32,
        num_heads=2,
        mlp_ratio=2,
        patch_size=4,
    ),
    "tiny-llama": Shape("no published model: text, to try things in a second", ("llama", _TINY_LLAMA)),
}


def get_shape(name: str) -> Shape:
    """The shape of this name; a ValueError that lists all names otherwise."""
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; there are: {', '.join(SHAPES)}")
    return SHAPES[name]


def build(
    name: str,
    depth: int | None = None,
    dtype: torch.dtype = torch.float32,
    vision_depth: int | None = None,
    *,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> PreTrainedModel:
    """A model of this shape with random weights, in eval mode, made in `dtype` on `device`.

    depth, vision_depth: layers of the decoder and of the vision tower; None is the published number. A cut
    tower yields as many visual tokens as a whole one. Raises ValueError for an unknown name or more layers
    than the model has.
    """
    shape = get_shape(name)
    auto = AutoModelForCausalLM if shape.vision is None else AutoModelForImageTextToText
    config = shape.config(depth, vision_depth)
    with no_init_weights(), torch.device(device):
        model = auto.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.tie_weights()
    _fill(model, seed)
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int) -> None:
    """Random matrices of variance 1 / fan-in, biases 0, norms 1: activations stay of order 1 at any width and
    depth.

    Drawing a billion normal numbers takes longer than what is to be measured, so all matrices repeat one
    short sequence; its length is a prime, so that neither rows nor matrices of a model come out equal.
    """
    device = next(model.parameters()).device
    noise = torch.randn(1_048_583, generator=torch.Generator().manual_seed(seed)).to(device)
    offset = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        flat, done = parameter.view(-1), 0
        values = (noise.roll(-offset) * (parameter.numel() // parameter.shape[0]) ** -0.5).to(parameter.dtype)
        while done < flat.numel():
            part = flat[done : done + len(values)]
            part.copy_(values[: len(part)])
            done += len(part)
        offset = (offset + flat.numel()) % len(noise)


def prompt(
    model: PreTrainedModel, name: str, text_tokens: int = 64, batch: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs for `model`, built by `build(name, ...)`: random text, and one random picture a sample where it
    sees any.

    The picture stands after the first 35 text tokens, as in LLaVA's Vicuna prompt, or after the first half of
    fewer.
    Returns input_ids and attention_mask, int64 (batch, text_tokens + visual tokens), and for a
    vision-language model pixel_values, (batch, 3, H, W) or (batch, views, 3, H, W), with image_sizes (batch,
    2) where the family takes views; in Qwen-VL (batch * patches, values of a patch), with image_grid_thw (batch, 3) and
    mm_token_type_ids.
    """
    shape = get_shape(name)
    if text_tokens < 1 or batch < 1:
        raise ValueError(f"a prompt needs at least one text token and one sample, not {text_tokens} and {batch}")
    device, rng = model.device, torch.Generator().manual_seed(seed)
    config = model.config
    # special tokens come first, placeholders for pictures last
    highest = (
        config.vocab_size if shape.vision is None else min(config.image_token_id, config.text_config.vocab_size) - 1
    )
    ids = torch.randint(3, highest, (batch, text_tokens), generator=rng)
    if shape.vision is None:
        return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    first = min(35, text_tokens // 2)
    picture = torch.full((batch, shape.visual_tokens), config.image_token_id)
    ids = torch.cat([ids[:, :first], picture, ids[:, first:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "qwen2_vl":
        tower = config.vision_config
        grid = [1, *(side // tower.patch_size for side in shape.image)]
        values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        inputs["pixel_values"] = torch.randn(batch * grid[1] * grid[2], values, generator=rng).to(model.dtype)
        inputs["image_grid_thw"] = torch.tensor([grid] * batch)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
        return {key: value.to(device) for key, value in inputs.items()}
    side = config.vision_config.image_size
    views = (shape.views,) if shape.views > 1 else ()
    inputs["pixel_values"] = torch.randn(batch, *views, 3, side, side, generator=rng).to(model.dtype)
    if shape.views > 1:
        inputs["image_sizes"] = torch.tensor([shape.image] * batch)
    return {key: value.to(device) for key, value in inputs.items()}
