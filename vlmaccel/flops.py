"""FLOPs of a decoder: the closed form that papers print, and a count of what really ran.

The convention of the closed form, which every table of this package uses: a layer costs

    4 n d^2  (query, key, value and output projections)
  + 2 n^2 d  (scores and weighted sum; the whole square, as if attention were not causal)
  + 3 n d m  (gated MLP; 2 n d m for a plain one)

for n tokens, hidden size d and MLP width m, where one multiply-add counts as one. It is the convention of the
PyramidDrop paper (3.82 TFLOPs for the 576 visual tokens of LLaVA-1.5-7B) and, with 2 n d m, of FastV.
It leaves out embeddings, norms, the language-model head, the vision tower and the saving of grouped-query
attention.

`count_flops` counts with torch's FlopCounterMode, which takes a multiply-add as **two**, also counts the
whole square of
attention, and sees every matrix product that ran: the head, scoring, narrower key and value projections. For
the layers of a decoder without grouped-query attention it is exactly twice the closed form. Compare ratios,
not absolutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlmaccel.kernels.bipartite_match import bipartite_match
from vlmaccel.kernels.block_index import computed_share
from vlmaccel.kernels.block_prefill import block_prefill
from vlmaccel.kernels.key_bias_attention import key_bias_attention
from vlmaccel.kernels.score_rows import score_rows
from vlmaccel.kernels.token_prefill import token_prefill


def layer_flops(n: float, d: int, m: int, gated: bool = True, attended: float = 1.0) -> float:
    """FLOPs of one decoder layer over `n` tokens (a multiply-add is one; see the module's convention).

    n: tokens at the layer's input. d: hidden size. m: MLP width. gated: three MLP matrices instead of two. attended: share
    of the attention that is computed.
    """
    return 4 * n * d**2 + attended * 2 * n**2 * d + (3 if gated else 2) * n * d * m


def decoder_flops(
    tokens_per_layer: Sequence[float], d: int, m: int, gated: bool = True, attended: Sequence[float] | None = None
) -> float:
    """FLOPs of one sample's prefill: `layer_flops` summed over layers, each with its tokens at the input.

    attended: share of every layer's attention that is computed; None for all of it.
    """
    shares = [1.0] * len(tokens_per_layer) if attended is None else attended
    return sum(layer_flops(n, d, m, gated, share) for n, share in zip(tokens_per_layer, shares, strict=True))


@dataclass(frozen=True)
class BlockCost:
    """What one block of a vision transformer costs (a multiply-add is one).

    width: hidden size d. attention, mlp: matrix entries of the two halves, 4 d^2 and 2 d m (3 d m gated) for most, each
    used once a token.
    """

    width: int
    attention: int
    mlp: int

    @classmethod
    def of(cls, attention: nn.Module, mlp: nn.Module) -> BlockCost:
        """Read off the modules of a block."""
        sizes = [sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (attention, mlp)]
        return cls(next(p.shape[1] for p in mlp.parameters() if p.ndim == 2), *sizes)

    def flops(self, into: float, out: float) -> float:
        """FLOPs of a block whose attention sees `into` tokens and whose MLP `out`: with as many, `layer_flops`."""
        return into * self.attention + 2 * into**2 * self.width + out * self.mlp


def _sdpa(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Forward of attention from shapes (B, H, q, d), (B, H or fewer, k, d), (B, H or fewer, k, d_v).

    Keys and values with fewer heads are shared by groups of query heads: the work is that of the query heads.
    Causal attention counts as the whole square, as for all attention formulas of torch.
    """
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


def _sdpa_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Backward of attention: scores again, then the gradients of probabilities, values, queries and keys."""
    return 2 * prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


def _match(metric: Sequence[int], r: int, prefix: int, *_: Any, **__: Any) -> int:
    """Similarities of all tokens at even places with all at odd ones."""
    batch, n, d = metric
    if r <= 0:
        return 0
    return 2 * batch * ((n - prefix) // 2) * ((n - prefix + 1) // 2) * d


def _score(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Logits of all rows with all keys."""
    return 2 * prod(query) * key[2]


def _token_prefill(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], tokens: Sequence[int], *_: Any, **__: Any
) -> int:
    """Attention of the chosen tokens over themselves, the whole square."""
    return 4 * query[0] * query[1] * query[3] * tokens[1] ** 2


def _block_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    columns: Tensor,
    start: Tensor,
    block: int,
    *_: Any,
    **__: Any,
) -> int:
    """The share of all attention that the lists hold, of the whole square."""
    share = computed_share(blocks, columns, start, query.shape[2], key.shape[2], block).mean().item()
    return round(4 * query.numel() * key.shape[2] * share)


_block_prefill._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode: the tensors, and not only their shapes


# torch up to 2.14 has no formula for the attention kernel that CPUs use, and would count none of its work; those for GPUs
# refuse grouped queries up to 2.11
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention: _sdpa,
    torch.ops.aten._scaled_dot_product_efficient_attention: _sdpa,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    key_bias_attention._overloadpacket: _sdpa,
    bipartite_match._overloadpacket: _match,
    score_rows._overloadpacket: _score,
    token_prefill._overloadpacket: _token_prefill,
    block_prefill._overloadpacket: _block_prefill,
}


def count_flops(fn: Callable[[], object]) -> int:
    """Run `fn()` once and return the FLOPs of all matrix products, convolutions and attention in it.

    Measured by FlopCounterMode (a multiply-add is two, causal attention counts as the whole square), with
    formulas added for the CPU's fused attention. Operators that torch has no formula for and cannot decompose
    count as nothing.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        fn()
    return counter.get_total_flops()
