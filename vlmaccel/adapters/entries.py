"""Calls the methods that act on cache entries: layer by layer, or after the prefill where a method needs all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmaccel.hooks import CacheEntries, Method


class Entries:
    """What the methods do to the KV cache in one forward pass.

    methods: those that act at each layer. bytes: what every layer holds at the moment; peak: the most of all together.
    """

    def __init__(self, methods: Mapping[int, Sequence[Method]]) -> None:
        self.methods = methods
        self.bytes: dict[int, int] = {}
        self.peak = 0
        self._later: list[tuple[Method, CacheEntries, Any]] = []

    def layer(self, at: CacheEntries, cache: Any) -> None:
        """The entries of a layer are there: let its methods act, or put off those that have to wait."""
        methods = self.methods.get(at.layer, ())
        self._count(at)
        if not at.decoding:
            for method in methods:
                method.observe(at)
        wait = False
        for method in methods:
            wait = wait or (method.two_phase and not at.decoding)
            if wait:
                self._later.append((method, replace(at, scores=None), cache))
            else:
                self._act(method, at, cache)
                at = replace(at, entries=cache.layers[at.layer])

    def finish(self, order: Sequence[Method]) -> None:
        """The forward pass is over: let those act that had to wait, each on all layers before the next."""
        for method in order:
            for waiting, at, cache in self._later:
                if waiting is method:
                    self._act(method, replace(at, entries=cache.layers[at.layer]), cache)
        self._later.clear()

    def _act(self, method: Method, at: CacheEntries, cache: Any) -> None:
        held = method.cache_layer(at.entries, at)
        cache.layers[at.layer] = held
        at = replace(at, entries=held)
        reduction = method.cache(at)
        if reduction is not None:
            held.reduce(reduction, prop_attn=method.prop_attn is None or method.prop_attn)
        self._count(at)

    def _count(self, at: CacheEntries) -> None:
        if not at.decoding:
            self.bytes[at.layer] = at.entries.nbytes
            self.peak = max(self.peak, sum(self.bytes.values()))
