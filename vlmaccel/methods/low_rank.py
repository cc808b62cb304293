"""Low-rank keys and values: what a KV cache holds of the prompt, as coordinates in fewer dimensions.

K ~ C B^T for each KV head, logits (q B) C^T. Eigen Attention (Saxena et al., Findings of EMNLP 2024, arXiv 2408.05646) fits
such bases to calibration data, once for all prompts; here each prompt has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from vlmaccel.cache import PrunedLayer, PrunedSlidingLayer
from vlmaccel.cache.low_rank import LowRankLayer
from vlmaccel.hooks import CacheEntries, Method
from vlmaccel.methods.eviction import Rows, check_count, observed_rows
from vlmaccel.methods.selection import check_choice

Basis = Literal["svd", "query"]
Scale = Literal["sqrt_d", "sqrt_r"]
Rank = int | float | None


@dataclass(frozen=True)
class LowRankKV(Method):
    """After a prefill, hold values (or keys, or both) of every KV head in the `rank` dimensions that fit this prompt best.

    All entries stay. m entries of head_dim d take rank (m + d) numbers in place of m d (rank (m + 2 d) with basis "query"), so
    a short prompt saves nothing. Attention of the prefill is exact; steps attend in the coordinates and never rebuild
    anything (in models with attn_implementation="sdpa"; elsewhere entries are rebuilt at every step, same result). A
    later turn fits the basis anew, to what the older entries have become and the new ones. Layers with a sliding
    window stay as they are. Works after methods that evict or drop tokens; nothing can be merged after it.
    rank_keys, rank_values: dimensions (int) or share of head_dim (float in (0, 1]); None leaves them in full. Keys are held
        with their rotary positions, which turn every pair of channels through all angles: they are nearly of full rank,
        and errors in them move the attention itself. Default None for keys, 0.5 for values.
    basis: "svd" (default), least squared error of what is held (Eckart-Young). "query": least error of what is made of it,
        the logits of `queries` observed rows, and the outputs after the layer's output projection.
    rows, queries: which rows, see `Observed`; "last" and 32.
    window: so many newest tokens of the answer stay exact; older ones go into the basis there is. Default 128.
    scale: of logits in coordinates: "sqrt_d" (default) keeps the model's 1 / sqrt(head_dim). "sqrt_r" divides by
        sqrt(rank_keys), as the formula is sometimes written; it sharpens the attention on all but the window.
    """

    name = "low-rank-kv"

    rank_keys: Rank = None
    rank_values: Rank = 0.5
    basis: Basis = "svd"
    rows: Rows = "last"
    queries: int = 32
    window: int = 128
    scale: Scale = "sqrt_d"

    def __post_init__(self) -> None:
        for name in ("rank_keys", "rank_values"):
            check_rank(name, getattr(self, name))
        check_choice("basis", self.basis, get_args(Basis))
        check_choice("rows", self.rows, get_args(Rows))
        check_choice("scale", self.scale, get_args(Scale))
        check_count("queries", self.queries, 1)
        check_count("window", self.window, 0)
        if self.scale == "sqrt_r" and self.rank_keys is None:
            raise ValueError('scale="sqrt_r" is about keys of reduced rank: give rank_keys')

    def cache_layers(self, depth: int) -> Sequence[int]:
        return () if self.rank_keys is None and self.rank_values is None else range(depth)

    def observe(self, at: CacheEntries) -> None:
        if self.basis == "query":
            at.run.memory[self, at.layer] = query_metric(at, self.rows, self.queries), output_metric(at)

    def cache_layer(self, layer: PrunedLayer, at: CacheEntries) -> PrunedLayer:
        if at.decoding or isinstance(layer, PrunedSlidingLayer):
            return layer
        if not isinstance(layer, LowRankLayer):
            if type(layer) is not PrunedLayer:
                raise NotImplementedError(
                    f"low-rank-kv needs entries in full, and another method holds them as a {type(layer).__name__}; "
                    "patch the model with one of the two"
                )
            layer = LowRankLayer.of(layer, self.window)
        slots = layer.slots
        assert slots is not None
        keys, values = (
            None if rank is None else rank_of(name, rank, x.shape[3])
            for name, rank, x in (
                ("rank_keys", self.rank_keys, layer.keys),
                ("rank_values", self.rank_values, layer.values),
            )
        )
        behind = int((slots.index > at.end[:, None, None]).sum(2).max())  # candidates of assisted decoding
        sharper = self.scale == "sqrt_r" and keys is not None
        gain = math.sqrt(layer.keys.shape[3] / keys) if sharper and keys is not None else 1.0
        layer.fit(keys, values, at.prompt, behind, at.run.memory.get((self, at.layer)), gain)
        return layer


def check_rank(name: str, rank: Rank) -> None:
    """Raise ValueError unless it is None, a whole number from 1 on or a share in (0, 1]."""
    if rank is None:
        return
    number = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not number and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            f"{name} is a number of dimensions (an int, 1 or more), a share of head_dim (a float, more than 0 and at most 1) "
            f"or None, not {rank!r}"
        )


def rank_of(name: str, rank: int | float, dim: int) -> int:
    """Dimensions of `dim`; raises ValueError if they are more."""
    wanted = max(1, round(rank * dim)) if isinstance(rank, float) else rank
    if wanted > dim:
        raise ValueError(f"{name}={rank} is more than the head_dim of this model, {dim}")
    return wanted


def query_metric(at: CacheEntries, rows: Rows, number: int) -> Tensor:
    """(B, H_kv, d, d) float32, sum of q q^T over the observed rows and the query heads of each KV head: in it, the error of
    a key is the squared error of its logits."""
    assert at.scores is not None
    index, counts = observed_rows(at, rows, number)
    query = at.scores.queries(index).float()
    query = query.masked_fill(~counts.to(query.device)[:, None, :, None], 0)
    query = query.unflatten(1, (at.entries.keys.shape[1], -1)).flatten(2, 3)
    return query.mT @ query


def output_metric(at: CacheEntries) -> Tensor:
    """(1, H_kv, d, d) float32, sum of W_O W_O^T over the query heads of each KV head: in it, the error of a value is the
    squared error behind the output projection."""
    assert at.scores is not None
    weight = at.scores.output().float()
    metric = weight @ weight.mT
    return metric.unflatten(0, (at.entries.keys.shape[1], -1)).sum(1)[None].to(at.entries.keys.device)
