"""Image towers of open_clip that are vision transformers of its own; towers taken from timm are the timm adapter's."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from vlmaccel.adapters.base import Adapter, Parts
from vlmaccel.adapters.mean_key import mean_key
from vlmaccel.adapters.transformers_vit import only_one
from vlmaccel.adapters.vision import BlockParts, VisionParts
from vlmaccel.hooks import Method
from vlmaccel.methods import ToMe

TOWERS = ("VisionTransformer",)


def mean_projected_key(attention: Any, x: Tensor) -> Tensor:
    """(B, N, head_dim) float32 mean over heads of the keys of the attention's input `x` (B, N, D).

    Keys never leave a torch.nn.MultiheadAttention, but the mean over heads can be taken of the projection instead.
    """
    width = x.shape[-1]
    weight = attention.in_proj_weight[width : 2 * width].detach().unflatten(0, (attention.num_heads, -1)).mean(0)
    keys = (x @ weight.mT).float()
    if attention.in_proj_bias is None:
        return keys
    return keys + attention.in_proj_bias[width : 2 * width].detach().unflatten(0, (attention.num_heads, -1)).mean(0)


def block_parts(block: Any) -> BlockParts:
    """The parts of a ResidualAttentionBlock or CustomResidualAttentionBlock; NotImplementedError for another kind."""
    attention: Any = getattr(block, "attn", None)
    if getattr(attention, "in_proj_weight", None) is None or not hasattr(block, "ln_2"):
        raise NotImplementedError(f"tokens cannot be merged in {type(block).__name__} of open_clip")
    if not getattr(attention, "batch_first", True):
        raise NotImplementedError("tokens can be merged in open_clip models with batch_first=True, its default, only")
    if isinstance(attention, nn.MultiheadAttention):  # a float key_padding_mask is added to the logits
        metric = partial(mean_projected_key, attention)
        return BlockParts(block, attention, block.ln_1, metric, block.ln_2, block.mlp, "key_padding_mask")
    return BlockParts(block, attention, attention.ln_k, mean_key, block.ln_2, block.mlp, "attn_mask")


class OpenCLIPViTAdapter(Adapter):
    """VisionTransformer of open_clip, alone or as the image tower of its CLIP and CoCa models."""

    name = "open-clip-vit"
    summary = "VisionTransformer image towers of open_clip"
    hook_points = ("vision_block",)

    def matches(self, model: nn.Module) -> bool:
        return only_one(model, TOWERS, "open_clip") is not None

    def parts(self, model: nn.Module) -> Parts | None:
        return None

    def default(self, depth: int) -> Method:
        return ToMe()

    def vision(self, model: nn.Module) -> VisionParts:
        tower: Any = only_one(model, TOWERS, "open_clip")
        return VisionParts(tower, [block_parts(block) for block in tower.transformer.resblocks], prefix=1)


ADAPTER = OpenCLIPViTAdapter()
