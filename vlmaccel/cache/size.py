"""What a KV cache holds, in bytes."""

from __future__ import annotations

from typing import Any

from vlmaccel.cache.pruned import PrunedLayer


def kv_bytes(cache: Any) -> tuple[int, int]:
    """Bytes that a cache holds, bookkeeping included, and that an unpatched cache of the same sequence would hold."""
    held, full = kv_bytes_by_layer(cache)
    return sum(held), sum(full)


def kv_bytes_by_layer(cache: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`kv_bytes`, for each layer."""
    held, full = [], []
    for layer in cache.layers:
        if layer.keys is None or (layer.keys.numel() == 0 and not isinstance(layer, PrunedLayer)):
            continue
        length, window = layer.get_seq_length(), getattr(layer, "sliding_window", None)
        length = int(length if window is None else min(length, window - 1))
        per_token = sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for x in (layer.keys, layer.values))
        held.append(layer.nbytes if isinstance(layer, PrunedLayer) else layer.keys.nbytes + layer.values.nbytes)
        full.append(per_token * length)
    return tuple(held), tuple(full)
