"""KV cache layers that hold fewer entries than the sequence has tokens, or hold them in fewer bits."""

from vlmaccel.cache.key_bias import KeyBias
from vlmaccel.cache.pruned import PrunedLayer, PrunedSlidingLayer, prunable, pruned_layer
from vlmaccel.cache.size import kv_bytes, kv_bytes_by_layer
from vlmaccel.cache.slots import Slots, extend

__all__ = [
    "KeyBias",
    "PrunedLayer",
    "PrunedSlidingLayer",
    "Slots",
    "extend",
    "kv_bytes",
    "kv_bytes_by_layer",
    "prunable",
    "pruned_layer",
]
