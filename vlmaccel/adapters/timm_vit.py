"""Vision transformers of timm: everything built on its VisionTransformer and Eva, alone or inside another model."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmaccel.adapters.base import Adapter, Parts
from vlmaccel.adapters.mean_key import mean_key
from vlmaccel.adapters.transformers_vit import only_one
from vlmaccel.adapters.vision import BlockParts, VisionParts
from vlmaccel.hooks import Method
from vlmaccel.methods import ToMe

TOWERS = ("VisionTransformer", "Eva")
BLOCKS = ("Block", "EvaBlock")


def block_parts(block: Any) -> BlockParts:
    """The parts of a block; raises NotImplementedError for one without a residual stream between attention and MLP."""
    if type(block).__name__ not in BLOCKS or not hasattr(block.attn, "k_norm"):
        kind = f"{type(block).__name__} with {type(getattr(block, 'attn', block)).__name__}"
        raise NotImplementedError(
            f"tokens cannot be merged in {kind}: pre-norm blocks with attention before the MLP can "
            f"({', '.join(BLOCKS)} of timm)"
        )
    # k_norm is called even where it does nothing; the qkv projection of Eva is not
    return BlockParts(block, block.attn, block.attn.k_norm, mean_key, block.norm2, block.mlp, "attn_mask")


def prefix_only(tower: Any) -> bool:
    """Whether the head reads class and distillation tokens only, and no hook on the final norm looks at the rest."""
    watched = tower.norm._forward_hooks or tower.norm._forward_pre_hooks
    return tower.global_pool == "token" and tower.attn_pool is None and not watched


class TimmViTAdapter(Adapter):
    """timm's VisionTransformer (DeiT, AugReg, DINOv2, MAE, SigLIP, ...) and Eva (EVA-02, DINOv3, ...)."""

    name = "timm-vit"
    summary = "VisionTransformer and Eva of timm, and all that is built on them"
    hook_points = ("vision_block",)

    def matches(self, model: nn.Module) -> bool:
        return only_one(model, TOWERS, "timm.models") is not None

    def parts(self, model: nn.Module) -> Parts | None:
        return None

    def default(self, depth: int) -> Method:
        return ToMe()

    def vision(self, model: nn.Module) -> VisionParts:
        tower: Any = only_one(model, TOWERS, "timm.models")
        tag = (getattr(tower, "pretrained_cfg", None) or {}).get("tag") or ""
        # MAE's weights do better without (arXiv 2210.09461, table 1)
        blocks = [block_parts(block) for block in tower.blocks]
        return VisionParts(
            tower,
            blocks,
            tower.num_prefix_tokens,
            prop_attn="mae" not in tag.split("_"),
            prefix_only=prefix_only,
        )


ADAPTER = TimmViTAdapter()
