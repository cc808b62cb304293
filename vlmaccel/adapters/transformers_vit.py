"""Vision transformers of transformers: ViT, DeiT, DINOv2 (with registers too), CLIP and SigLIP towers, under any head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from vlmaccel.adapters.base import Adapter, Parts
from vlmaccel.adapters.mean_key import mean_key
from vlmaccel.adapters.vision import BlockParts, VisionParts
from vlmaccel.hooks import Method
from vlmaccel.methods import ToMe

# what calls the blocks one after the other: where it keeps them, and how many leading tokens are no patches
TOWERS: dict[str, tuple[str, Callable[[Any], int]]] = {
    "ViTModel": ("layers", lambda config: 1),
    "DeiTModel": ("layers", lambda config: 2),
    "Dinov2Encoder": ("layer", lambda config: 1),
    "Dinov2WithRegistersEncoder": ("layer", lambda config: 1 + config.num_register_tokens),
    "CLIPVisionModel": ("encoder.layers", lambda config: 1),
    "SiglipVisionModel": ("encoder.layers", lambda config: 0),
}
# a block's attention and the norm before its MLP
BLOCKS = (("attention", "layernorm_after"), ("attention", "norm2"), ("self_attn", "layer_norm2"))


def mean_projected_key(heads: int, keys: Tensor) -> Tensor:
    """`mean_key` of projected keys (B, N, heads * head_dim)."""
    return mean_key(keys.unflatten(-1, (heads, -1)).transpose(1, 2))


def block_parts(block: nn.Module) -> BlockParts:
    """The parts of a block; raises NotImplementedError if it is of another kind."""
    for attention_name, norm_name in BLOCKS:
        attention: Any = getattr(block, attention_name, None)
        norm, mlp = getattr(block, norm_name, None), getattr(block, "mlp", None)
        if isinstance(attention, nn.Module) and norm is not None and mlp is not None and hasattr(attention, "k_proj"):
            heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
            metric = partial(mean_projected_key, heads)
            return BlockParts(block, attention, attention.k_proj, metric, norm, mlp, "attention_mask")
    raise NotImplementedError(f"tokens cannot be merged in {type(block).__name__}; " + AVAILABLE)


def vision_parts(tower: nn.Module) -> VisionParts:
    """The parts of one of `TOWERS`; raises NotImplementedError for another module."""
    if type(tower).__name__ not in TOWERS:
        raise NotImplementedError(f"tokens cannot be merged in {type(tower).__name__}; " + AVAILABLE)
    path, prefix = TOWERS[type(tower).__name__]
    config: Any = tower.config
    blocks: Any = tower.get_submodule(path)
    # MAE's weights do better without (arXiv 2210.09461, table 1)
    mae = any("MAE" in name for name in getattr(config, "architectures", None) or ())
    return VisionParts(tower, [block_parts(block) for block in blocks], prefix(config), prop_attn=not mae)


def only_one(model: nn.Module, kinds: Iterable[str], library: str) -> nn.Module | None:
    """The one module of these classes (or derived from them) in `model`, None if there is none.

    Raises NotImplementedError if there are several.
    """
    found = [
        module
        for module in model.modules()
        if any(c.__name__ in kinds and c.__module__.startswith(f"{library}.") for c in type(module).__mro__)
    ]
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module in found)
        raise NotImplementedError(f"{type(model).__name__} has several vision towers ({names}): patch one of them")
    return found[0] if found else None


class TransformersViTAdapter(Adapter):
    """A tower of `TOWERS`, alone or with a head, a text model or a feature pyramid around it."""

    name = "transformers-vit"
    summary = "ViT, DeiT, DINOv2, CLIP, SigLIP of transformers, under any head"
    hook_points = ("vision_block",)

    def matches(self, model: nn.Module) -> bool:
        return only_one(model, TOWERS, "transformers") is not None

    def parts(self, model: nn.Module) -> Parts | None:
        return None

    def default(self, depth: int) -> Method:
        return ToMe()

    def vision(self, model: nn.Module) -> VisionParts:
        tower = only_one(model, TOWERS, "transformers")
        assert tower is not None
        return vision_parts(tower)


AVAILABLE = "it works in ViT, DeiT, DINOv2, CLIP and SigLIP of transformers, and in the ViTs of timm and open_clip"
ADAPTER = TransformersViTAdapter()
