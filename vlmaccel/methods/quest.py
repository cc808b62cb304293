"""Quest: at a decode step, read only the pages of the KV cache that can matter to the query.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024, arXiv 2406.10774.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from vlmaccel.cache import PrunedLayer, PrunedSlidingLayer
from vlmaccel.cache.paged import Group, PagedLayer
from vlmaccel.hooks import CacheEntries, Method
from vlmaccel.methods.budget import Budget, check_budget, is_whole
from vlmaccel.methods.eviction import check_count
from vlmaccel.methods.selection import check_choice


@dataclass(frozen=True)
class Quest(Method):
    """Hold all entries; a decode step reads the `budget` that its query can give most attention, a page at a time.

    A page has the largest and the smallest value of each key channel; sum_c max(q_c high_c, q_c low_c) is at least every
    logit in it (section 3.3). Nothing is evicted: it takes 1 / page of the cache (6.25 %) more memory, and a step reads less
    of it. If the entries left out have a share e of the attention, the output is off by at most 2 e max |v|. Prefills are
    exact. It acts in models with attn_implementation="sdpa", at steps of one token: elsewhere the whole cache is read, with a
    warning. Layers with a sliding window stay as they are. Works after methods that evict or drop tokens.
    budget: entries that each KV head reads, a ratio of those there are (float) or a number (int), rounded up to pages, at
        least 3 of them. Default 0.1; the paper goes from 256 to 4096 entries.
    page: entries of a page, default 16 (the paper's). The newest page is always read.
    dense_layers: so many first layers read everything, default 2 (section 3.4: they are hardly sparse).
    group: how query heads that share keys agree, see `PagedLayer`; the paper has models without such heads. Default "max".
    exact: choose single entries by their true logits: the best that any choice of this size could do, and no faster.
    """

    name = "quest"

    budget: Budget = 0.1
    page: int = 16
    dense_layers: int = 2
    group: Group = "max"
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            raise ValueError(
                f"quest evicts nothing, so no number of bytes ({self.budget!r}) can be its budget: give the share (float) "
                "or the number (int) of entries that a step reads"
            )
        check_budget(self.budget)
        check_count("page", self.page, 1)
        check_count("dense_layers", self.dense_layers, 0)
        check_choice("group", self.group, get_args(Group))

    def cache_layers(self, depth: int) -> Sequence[int]:
        return range(min(self.dense_layers, depth), depth)

    def cache_layer(self, layer: PrunedLayer, at: CacheEntries) -> PrunedLayer:
        if at.decoding or is_whole(self.budget) or isinstance(layer, PrunedSlidingLayer):
            return layer
        if isinstance(layer, PagedLayer):  # a later turn
            layer.build(at.run.padding)
            return layer
        if type(layer) is not PrunedLayer:
            raise NotImplementedError(
                f"quest needs keys in full precision, and another method holds them as a {type(layer).__name__}; "
                "patch the model with one of the two"
            )
        assert not isinstance(self.budget, str)
        return PagedLayer.of(
            layer, at.run.padding, page=self.page, budget=self.budget, group=self.group, exact=self.exact
        )
