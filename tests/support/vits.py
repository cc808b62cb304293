"""Tiny random vision transformers of every kind that can be patched, all over pictures of 32 x 32 in 8 x 8 patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import open_clip
import timm
import torch
import transformers as hf
from open_clip.transformer import VisionTransformer as OpenCLIPViT
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIDE, PATCH, DEPTH, PATCHES = 32, 4, 4, 64
_TIMM: dict[str, Any] = dict(img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=DEPTH, num_heads=4, num_classes=10)
_HF: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=PATCH,
)
_TEXT: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, eos_token_id=2
)
_CLIP: dict[str, Any] = dict(
    image_size=SIDE, patch_size=PATCH, width=32, layers=DEPTH, heads=4, mlp_ratio=2.0, output_dim=16
)


def _registered(name: str, **more: Any) -> nn.Module:
    return timm.create_model(name, **{**_TIMM, **more})


def _clip_model(kind: str) -> nn.Module:
    if kind == "clip":
        return hf.CLIPModel(hf.CLIPConfig(vision_config=_HF, text_config=_TEXT, projection_dim=16))
    return hf.SiglipModel(hf.SiglipConfig(vision_config=_HF, text_config=_TEXT))


def _open_clip_model() -> nn.Module:
    vision = dict(layers=DEPTH, width=32, head_width=8, patch_size=PATCH, image_size=SIDE)
    text = dict(context_length=8, vocab_size=64, width=32, heads=4, layers=2)
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "timm-class": lambda: VisionTransformer(**_TIMM),
    "timm-average": lambda: VisionTransformer(**_TIMM, global_pool="avg", fc_norm=True),
    "timm-no-class": lambda: VisionTransformer(**_TIMM, global_pool="avg", class_token=False),
    "timm-siglip": lambda: VisionTransformer(**_TIMM, global_pool="map", class_token=False),
    "timm-registers": lambda: VisionTransformer(**_TIMM, reg_tokens=4, init_values=0.3),  # DINOv2's
    "timm-qk-norm": lambda: VisionTransformer(**_TIMM, qk_norm=True),
    "timm-dynamic": lambda: VisionTransformer(**_TIMM, dynamic_img_size=True),
    "timm-unfused": lambda: _unfused(VisionTransformer(**_TIMM)),
    "timm-augreg": lambda: _registered("vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    "timm-mae": lambda: _registered("vit_base_patch16_224.mae", global_pool="avg"),
    "timm-deit": lambda: _registered("deit_tiny_patch16_224"),
    "timm-deit-distilled": lambda: _registered("deit_tiny_distilled_patch16_224"),
    "timm-deit3": lambda: _registered("deit3_small_patch16_224", init_values=0.3),
    "timm-dinov2": lambda: _registered("vit_small_patch14_reg4_dinov2", init_values=0.3),
    "timm-eva": lambda: Eva(**_TIMM, init_values=0.3),
    "timm-eva02": lambda: Eva(**_TIMM, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True),
    "timm-rope-mixed": lambda: Eva(**_TIMM, use_rot_pos_emb=True, rope_type="mixed"),
    "timm-dinov3": lambda: _registered("vit_small_patch16_dinov3", init_values=0.3),
    "hf-vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_HF)),
    "hf-deit": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**_HF)),
    "hf-dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_HF, layerscale_value=0.3, mlp_ratio=2)),
    "hf-dinov2-registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**_HF, layerscale_value=0.3, mlp_ratio=2)
    ),
    "hf-clip": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_HF)),
    "hf-siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_HF)),
    "open-clip": lambda: OpenCLIPViT(**_CLIP),
    "open-clip-average": lambda: OpenCLIPViT(**_CLIP, pool_type="avg", ls_init_value=0.3),
    "open-clip-custom": lambda: OpenCLIPViT(**_CLIP, block_type="custom", qk_norm=True),
    # inside larger models
    "hf-clip-model": lambda: _clip_model("clip"),
    "hf-siglip-model": lambda: _clip_model("siglip"),
    "open-clip-model": lambda: _open_clip_model(),
}
ROPE = ("timm-eva02", "timm-rope-mixed", "timm-dinov3")
PREFIX = {
    **dict.fromkeys(("timm-no-class", "timm-siglip", "hf-siglip", "hf-siglip-model"), 0),
    **dict.fromkeys(("timm-deit-distilled", "hf-deit"), 2),
    **dict.fromkeys(("timm-registers", "timm-dinov2", "timm-dinov3", "hf-dinov2-registers"), 5),
}
KINDS = tuple(MAKERS)


def build(kind: str) -> nn.Module:
    """A fresh fp32 model in eval mode, the same weights every time, wide enough that attention is far from uniform."""
    torch.manual_seed(3)
    model = MAKERS[kind]()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                if "gamma" not in name and "lambda" not in name and "logit_scale" not in name:
                    parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * 1.2 / math.sqrt(parameter[0].numel()))
    return model.eval()


def pictures(batch: int = 2, height: int = SIDE, width: int = SIDE) -> Tensor:
    """(batch, 3, height, width), always the same."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(11))


def outputs(model: Any, pixels: Tensor) -> Tensor:
    """What a user reads off a model, as one tensor (batch, ...): logits, embeddings or all features."""
    if hasattr(model, "get_image_features"):
        out = model.get_image_features(pixel_values=pixels)
    else:
        out = model.encode_image(pixels) if hasattr(model, "encode_image") else model(pixels)
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            last = getattr(out, "last_hidden_state", None)
            out = getattr(out, name)
            return out if last is None else torch.cat([out, last.flatten(1)], 1)
    return out


def _unfused(model: Any) -> nn.Module:
    for block in model.blocks:
        block.attn.fused_attn = False
    return model
