"""Causal attention in which every block of rows sees listed blocks of keys and listed keys: sparse prefill.

Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", NeurIPS 2024,
arXiv 2407.02490. `vlmaccel.kernels.block_index` makes lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmaccel.kernels import block_compiled, block_gather
from vlmaccel.kernels.block_compiled import compiled_prefill, worth_compiling
from vlmaccel.kernels.block_gather import gathered_prefill
from vlmaccel.kernels.block_index import computed_share, dense_mask, with_all
from vlmaccel.kernels.dispatch import gpu_form
from vlmaccel.kernels.key_bias_attention import key_bias_attention

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define(
    "block_prefill(Tensor query, Tensor key, Tensor value, Tensor blocks, Tensor columns, Tensor start, int block, "
    "float scale) -> Tensor"
)

block_prefill = torch.ops.vlmaccel.block_prefill.default
"""block_prefill(query, key, value, blocks, columns, start, block, scale) -> (B, H, N, head_dim).

query: (B, H, N, head_dim). key, value: (B, H_kv, M, head_dim), H a multiple of H_kv; row i is key i + M - N, the keys
before belong to earlier turns. block: rows of a block of rows (counted from row 0) and keys of a key block (counted from
key 0): 16, 32, 64 or 128 on GPUs. blocks: (B, H, N / block, L) int32, the key blocks that the rows of a block see, as far as
they are not after the row; ascending, with -1 behind them. columns: (B, H, N / block, C) int32, single keys besides, none
twice and none in a listed block (it would count twice); ascending, with -1 behind them. L and C may be 0. start: (B,) int64,
first key that is no padding of a sample padded on the left; keys before it are hidden. scale: of the logits.
Rows that see nothing are 0. The result is laid out as (B, N, H, head_dim), which the output projection reads. For
inference: it has no gradient.

On CPUs heads whose lists hold everything are computed as dense attention; heads without columns, where there is much to
compute, by FlexAttention, compiled once for all lengths; for the others, what blocks of rows see is copied together for
scaled_dot_product_attention, a few blocks at a time. docs/kernels.md has what each costs.
"""

SHORT = 1024  # keys: attention over fewer takes no time to speak of, and lists are followed as they are


def reference(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> Tensor:
    """The same with a mask, in float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    seen = dense_mask(blocks, columns, start, query.shape[2], key.shape[2], block)
    logits = (query.double() @ key.mT * scale).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1).nan_to_num() @ value).to(query.dtype)


def _torch_form(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> Tensor:
    out = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
    if not out.numel():
        return out
    everything = lists_all(blocks, query.shape[2], key.shape[2], block)
    only_blocks = _compiled(query, key, columns) & ~everything
    rest = ~everything & ~only_blocks
    ways = ((everything, _dense), (only_blocks, compiled_prefill), (rest, gathered_prefill))
    groups = query.shape[1] // key.shape[1]
    for heads, way in ways:
        if bool(heads.all()):
            return way(query, key, value, blocks, columns, start, block, scale)
        if bool(heads.any()):
            sample, head = heads.nonzero(as_tuple=True)
            q, b, c = (x[sample, head][:, None] for x in (query, blocks, columns))
            k, v = (x[sample, head // groups][:, None] for x in (key, value))
            out[sample, head] = way(q, k, v, b, c, start[sample], block, scale)[:, 0]
    return out


def _compiled(query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """(B, H) bool, heads that `compiled_prefill` takes."""
    without = (columns < 0).flatten(2).all(2)
    return without if query.device.type == "cpu" and worth_compiling(query, key) else without & False


def _dense(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> Tensor:
    padding = torch.arange(key.shape[2], device=key.device) < start[:, None]
    bias = query.new_zeros(padding.shape, dtype=torch.float).masked_fill_(padding, -torch.inf)
    return key_bias_attention(query, key, value, bias if bool(padding.any()) else None, scale, True)


def lists_all(blocks: Tensor, rows: int, keys: int, block: int) -> Tensor:
    """(B, H) bool, whether the lists of a head hold every key block that is not after their rows."""
    number = torch.arange(blocks.shape[2], device=blocks.device)
    last_row = (number * block + block).clamp(max=rows) - 1 + keys - rows
    seen = last_row // block + 1
    return ((blocks >= 0) & (blocks < seen[:, None])).sum(-1).ge(seen).all(2)


def where_it_pays(
    query: Tensor, key: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """The lists, and everything for those heads whose lists hold so much that dense attention is faster on this processor."""
    if query.device.type != "cpu" or key.shape[2] < SHORT:
        return blocks, columns
    limits = (form.pays_below(query.dtype) for form in (block_compiled, block_gather))
    limit = torch.where(_compiled(query, key, columns), *limits)
    dense = computed_share(blocks, columns, start, query.shape[2], key.shape[2], block) > limit
    return with_all(dense, blocks, columns, key.shape[2], block) if bool(dense.any()) else (blocks, columns)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> Tensor:
    batch, heads, n, dim = query.shape
    return query.new_empty(batch, n, heads, dim).transpose(1, 2)


_LIB.impl("block_prefill", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("block_prefill", gpu_form("block_prefill", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::block_prefill", _fake, lib=_LIB)
