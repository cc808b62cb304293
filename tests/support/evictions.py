"""What the tests of methods that evict cache entries share: the methods, what they kept, and the reference's account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support import qwen_vl
from tests.support.models import IMAGE
from tests.support.reference import Positions, Reference, Trace
from vlmaccel.methods import (
    H2O,
    AdaKV,
    EntropyEviction,
    HessianEviction,
    PyramidKV,
    RandomEviction,
    Sensitivity,
    SnapKV,
    StreamingLLM,
    VLCache,
)
from vlmaccel.methods.eviction import Eviction
from vlmaccel.methods.streaming import Streaming

# small enough for prompts of 19 tokens; a new method needs an entry here, and a test of its own scores
METHODS: dict[str, Eviction] = {
    "streaming-llm": StreamingLLM(budget=0.5, sinks=2, every=1000),
    "h2o": H2O(budget=0.5, every=1000),
    "snapkv": SnapKV(budget=0.4, window=4),
    "snapkv-tokens": SnapKV(budget=7, window=3, pool=3, pooling="max", group="max", sinks=1),
    "pyramidkv": PyramidKV(budget=0.4, window=2, pool=3, beta=4),
    "adakv": AdaKV(budget=0.4, window=2, pool=1),
    "vl-cache": VLCache(budget=0.4, threshold=0.3),
    "vl-cache-layer": VLCache(budget=0.4, threshold=0.3, granularity="layer", window=4),
    "sensitivity": Sensitivity(budget=0.4, sinks=2, window=4),
    "hessian": HessianEviction(budget=0.4, sinks=2, window=4),
    "hessian-greedy": HessianEviction(budget=0.4, sinks=2, window=4, mode="greedy"),
    "entropy": EntropyEviction(budget=0.4, window=4),
    "random-eviction": RandomEviction(budget=0.4, sinks=2, recent=4),
}
UNIFORM = ("streaming-llm", "h2o", "snapkv", "snapkv-tokens")  # every layer and head has the same budget
SCORED = tuple(name for name in METHODS if name not in ("streaming-llm", "random-eviction"))
PREFILL = tuple(name for name, method in METHODS.items() if not isinstance(method, Streaming))  # evict after it only
Kept = dict[int, Tensor]  # {layer: (H_kv, S) bool}


def starts_of(mask: Tensor) -> list[int]:
    """Where each sample's first real token is."""
    return mask.argmax(1).tolist()


def held_by(layer: Any) -> list[list[list[int]]]:
    """Logical indices that a cache layer holds, fillers apart, of every sample and KV head, in the order they lie in."""
    batch, heads = layer.keys.shape[:2]
    if not hasattr(layer, "slots"):
        return [[list(range(layer.keys.shape[2])) for _ in range(heads)] for _ in range(batch)]
    index, sizes = (x.expand(-1, heads, -1) for x in (layer.slots.index, layer.slots.sizes))
    return [[index[b, g][sizes[b, g] > 0].tolist() for g in range(heads)] for b in range(batch)]


def kept_of(cache: Any, mask: Tensor, length: int | None = None) -> list[Kept]:
    """Which of the first `length` tokens (default: all seen) each layer and KV head of each sample holds, padding cut off."""
    length = mask.shape[1] if length is None else length
    found: list[Kept] = [{} for _ in mask]
    for k, layer in enumerate(cache.layers):
        for b, (start, heads) in enumerate(zip(starts_of(mask), held_by(layer), strict=True)):
            kept = torch.zeros(len(heads), length, dtype=torch.bool)
            for g, held in enumerate(heads):
                kept[g, [i for i in held if i < length]] = True
            found[b][k] = kept[:, start:]
    return found


def reference_of(
    model: Any,
    batch: dict[str, Tensor],
    later: Tensor,
    kept: Sequence[Any],
    schedules: Sequence[Any] | None = None,
    positions: Positions = "keep",
) -> list[Trace]:
    """The reference's account of every sample of `batch`, then the tokens `later` (B, T) that do not see what was evicted."""
    reference = Reference(model)
    traces = []
    for b, embeds in enumerate(reference.embed(batch)):
        sequence = reference.followed(embeds, later[b])
        schedule = None if schedules is None else schedules[b]
        traces.append(reference.run(sequence, schedule, positions, len(embeds), kept[b]))
    return traces


def alone(batch: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Sample b of a batch without its padding; of Qwen-VL, and of kinds whose pictures all have the same number of tokens."""
    if "mm_token_type_ids" in batch:
        return qwen_vl.alone(batch, b)
    real = batch["attention_mask"][b].bool()
    one = {k: batch[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}
    if "pixel_values" in batch:
        pictures = (batch["input_ids"] == IMAGE).sum(1).div(9, rounding_mode="floor")
        first, n = int(pictures[:b].sum()), int(pictures[b])
        if n:
            one["pixel_values"] = batch["pixel_values"][first : first + n]
    return one
