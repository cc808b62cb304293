"""KV cache layers that hold fewer entries than the sequence has tokens."""

from vlmaccel.cache.pruned import PrunedLayer, PrunedSlidingLayer, Slots, extend, prunable, pruned_layer

__all__ = ["PrunedLayer", "PrunedSlidingLayer", "Slots", "extend", "prunable", "pruned_layer"]
