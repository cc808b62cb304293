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
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def layer_flops(n: float, d: int, m: int, gated: bool = True) -> float:
    """FLOPs of one decoder layer over `n` tokens (a multiply-add is one; see the module's convention).

    n: tokens at the layer's input. d: hidden size. m: MLP width. gated: three MLP matrices instead of two.
    """
    return 4 * n * d**2 + 2 * n**2 * d + (3 if gated else 2) * n * d * m


def decoder_flops(tokens_per_layer: Sequence[float], d: int, m: int, gated: bool = True) -> float:
    """FLOPs of one sample's prefill: `layer_flops` summed over layers, each with its tokens at the input."""
    return sum(layer_flops(n, d, m, gated) for n in tokens_per_layer)


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


# torch up to 2.14 has no formula for the attention kernel that CPUs use, and would count none of its work
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
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
