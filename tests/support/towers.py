"""What vision towers look at, written out slowly: whole attention matrices, one picture, frame or window at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import vlmaccel
from tests.support.models import QWEN
from vlmaccel.hooks import Method, Patches, VisualTokens


@dataclass(frozen=True, eq=False)
class Probe(Method):
    """Reduces nothing, and keeps what it sees of patches, prefill by prefill."""

    name = "probe"
    sees_patches = True
    seen: list[tuple[Patches, Tensor]] = field(default_factory=list)

    def visual_tokens(self, at: VisualTokens) -> None:
        if bool((at.tokens.image >= 0).any()):
            self.seen.append((at.patches, at.tokens.image))

    def attention_of_tokens(self) -> Tensor:
        """(V,) of all visual tokens seen, NaN for what is no patch."""
        parts = []
        for patches, image in self.seen:
            row = patches.row[image >= 0]
            parts.append(patches.attention[row].masked_fill(row < 0, math.nan))
        return torch.cat(parts)


@torch.no_grad()
def expected(kind: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(V,) attention that the patch of every visual token gets, in the order of the placeholders, NaN for newlines."""
    if kind in QWEN:
        grids = [batch[name] for name in ("image_grid_thw",) if name in batch]
        return torch.cat([_grouped(model.model.visual, batch["pixel_values"], grid) for grid in grids])
    tower = model.model.vision_tower
    pixels = batch["pixel_values"]
    if kind != "llava-next":
        return _padded(tower, pixels, model.config.vision_feature_layer).flatten()
    base = model.model
    tiles = [_padded(tower, x, model.config.vision_feature_layer) for x in _tiles(base, batch)]
    width = len(base.image_newline)
    features = [x[..., None].expand(-1, -1, width) for x in tiles]
    packed, _ = base.pack_image_features(
        features, batch["image_sizes"], "default", torch.full((width,), math.nan, dtype=features[0].dtype)
    )
    return torch.cat([x[:, 0] for x in packed])


def _tiles(base: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pins, size = base.config.image_grid_pinpoints, base.config.vision_config.image_size
    counts = [image_size_to_num_patches(s, pins, size) for s in batch["image_sizes"]]
    return [x[:n] for x, n in zip(batch["pixel_values"], counts, strict=True)]


def _padded(tower: nn.Module, pixels: Tensor, layer: int) -> Tensor:
    """(P, patches): the class token's row, or the sum of all rows where there is none, the mean over heads."""
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    block = tower.encoder.layers[layer]  # hidden_states[0] is what goes into the first block: one more of them
    attention, x = block.self_attn, block.layer_norm1(hidden[layer - 1])
    heads = attention.num_heads
    q, k = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2).double() for f in (attention.q_proj, attention.k_proj))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(1)
    return weights[:, 0, 1:] if "CLIP" in type(tower).__name__ else weights.sum(1)


def _grouped(tower: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    """(tokens,) of each 2 x 2 patches: mean of what they get from all patches of their frame, or window."""
    block, caught = tower.blocks[-2], {}

    def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs, hidden=args[0])

    handle = block.attn.register_forward_pre_hook(catch, with_kwargs=True)
    merged = {}
    other = tower.merger.register_forward_hook(lambda module, args, output: merged.update(output=output))
    try:
        final = tower(pixels, grid_thw=grid).pooler_output
    finally:
        handle.remove()
        other.remove()
    heads = block.attn.num_heads
    q, k, _ = block.attn.qkv(caught["hidden"]).unflatten(-1, (3, heads, -1)).double().unbind(1)
    cos, sin = (x.double()[:, None] for x in caught["position_embeddings"])
    half = q.shape[-1] // 2

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    q, k = turn(q), turn(k)
    total = torch.zeros(len(q), dtype=torch.double)
    ends = caught["cu_seqlens"].tolist()
    for start, end in pairwise(ends):
        for row in range(start, end):
            for head in range(heads):
                logits = k[start:end, head] @ q[row, head] / math.sqrt(q.shape[-1])
                total[start:end] += logits.softmax(0) / heads
    tokens = total.view(-1, 4).mean(1)
    order = [int((merged["output"] == token).all(-1).nonzero()[0]) for token in final]  # windows are out of order
    return tokens[order]


def probed(model: Any, batch: dict[str, Tensor], **how: Any) -> Probe:
    """What a Probe sees in a bare forward, or in `generate` with these options."""
    probe = Probe()
    with vlmaccel.patched(model, probe), torch.no_grad():
        if how:
            model.generate(**batch, max_new_tokens=2, do_sample=False, **how)
        else:
            model(**batch)
    return probe
