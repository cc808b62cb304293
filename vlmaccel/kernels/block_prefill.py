"""Causal attention in which every block of rows sees listed blocks of keys and listed keys: sparse prefill.

Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", NeurIPS 2024,
arXiv 2407.02490. `vlmaccel.kernels.block_index` makes lists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from vlmaccel.kernels.block_index import dense_mask
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

On CPUs what blocks of rows see is copied together for scaled_dot_product_attention, a few blocks at a time; in bfloat16 on
CPUs with matrix tiles (AMX), where that is slow over short blocks of rows, for plain matrix products. At 8000 tokens and
blocks of 64 that costs, of what dense causal attention costs, 2.3 times the share of its pairs that is seen, and in bfloat16
with tiles, where dense attention is far faster, six to seven times. Lists that hold everything are computed as dense attention.
"""

GATHERED = 2**23  # bytes of keys and values copied together


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
    batch, heads, n, dim = query.shape
    out = query.new_empty(batch, n, heads, dim).transpose(1, 2)
    if not out.numel():
        return out
    if lists_all(blocks, n, key.shape[2], block):
        padding = torch.arange(key.shape[2], device=key.device) < start[:, None]
        bias = query.new_zeros(padding.shape, dtype=torch.float).masked_fill_(padding, -torch.inf)
        return key_bias_attention(query, key, value, bias if bool(padding.any()) else None, scale, True)
    kv_heads, m = key.shape[1:3]
    # Blocks of rows of all heads and samples are in one line, and so are keys and values.
    q, k, v = pad(query, (0, 0, 0, -n % block)).reshape(-1, block, dim), key.reshape(-1, dim), value.reshape(-1, dim)
    sample, head, number = torch.meshgrid(*(torch.arange(x, device=q.device) for x in blocks.shape[:3]), indexing="ij")
    first_key = ((sample * kv_heads + head // (heads // kv_heads)) * m).flatten()
    first_row, begin = (number * block + m - n).flatten(), start.clamp(min=0)[sample.flatten()]
    blocks, columns = blocks.flatten(0, 2), columns.flatten(0, 2)
    whole, single = (blocks >= 0).sum(1), (columns >= 0).sum(1)
    size, order = (whole * block + single).sort()
    place, mixed, room = torch.arange(block, device=q.device), torch.zeros_like(q), _Room(q)
    sizes, end = size.tolist(), len(order)
    while end and sizes[end - 1]:  # those with as many keys together, since they are padded to the most of them
        fit = GATHERED // (2 * sizes[end - 1] * dim * q.element_size())
        part = order[max(0, end - max(torch.get_num_threads(), fit)) : end]
        end -= len(part)
        listed = _aligned_right(blocks[part], whole[part]) * block
        key_at = torch.cat([_aligned_right(columns[part], single[part]), (listed[..., None] + place).flatten(1)], 1)
        key_at.masked_fill_(key_at < begin[part, None], -1)
        taken = (key_at.clamp(0, m - 1) + first_key[part, None]).flatten()
        near = [torch.index_select(x, 0, taken, out=room(name, len(taken), dim)) for name, x in (("k", k), ("v", v))]
        shape = (len(part), block, key_at.shape[1])
        mask = _mask(key_at, first_row[part, None], room("mask", shape[0] * shape[1], shape[2]).view(shape))
        near_k, near_v = (x.view(*key_at.shape, dim) for x in near)
        if products_are_faster(q.dtype, block):
            logits = torch.baddbmm(mask, q[part], near_k.mT, alpha=scale, out=mask)
            out_part = torch.bmm(torch.softmax(logits, -1, out=logits), near_v)
        else:
            rows, near_k, near_v = q[part][None], near_k[None], near_v[None]  # its fast form wants heads
            out_part = scaled_dot_product_attention(rows, near_k, near_v, attn_mask=mask[None], scale=scale)[0]
        lowest = key_at.masked_fill(key_at < 0, m).amin(1, keepdim=True)
        # not every backend gives 0 where nothing is seen
        mixed[part] = out_part.masked_fill((first_row[part, None] + place < lowest)[..., None], 0)
    return out.copy_(mixed.view(batch, heads, -1, dim)[:, :, :n])


def lists_all(blocks: Tensor, rows: int, keys: int, block: int) -> bool:
    """Whether the lists hold every key block that is not after their rows."""
    number = torch.arange(blocks.shape[2], device=blocks.device)
    last_row = (number * block + block).clamp(max=rows) - 1 + keys - rows
    seen = last_row // block + 1
    return bool(((blocks >= 0) & (blocks < seen[:, None])).sum(-1).ge(seen).all())


def products_are_faster(dtype: torch.dtype, rows: int) -> bool:
    """Whether this processor is faster with plain matrix products than with scaled_dot_product_attention of so many rows."""
    return dtype == torch.bfloat16 and rows < 128 and torch.cpu._is_amx_tile_supported()


def _aligned_right(lists: Tensor, count: Tensor) -> Tensor:
    """Lists (P, L) of `count` (P,) entries, cut to the longest and with -1 in front, int64: the last are near the rows."""
    longest = int(count.max())
    place = torch.arange(longest, device=lists.device) + count[:, None]
    return lists[:, :longest].long().gather(1, place % longest) if longest else lists[:, :0].long()


class _Room:
    """Memory that is used again: new memory costs more than what is copied into it."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.held = like, dict[str, Tensor]()

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        if name not in self.held or len(self.held[name]) < rows * width:
            self.held[name] = self.like.new_empty(rows * width)
        return self.held[name][: rows * width].view(rows, width)


def _mask(key_at: Tensor, first_row: Tensor, out: Tensor) -> Tensor:
    """out (P, R, K), filled: 0 where row r, key `first_row` (P, 1) + r, sees key `key_at` (P, K), up to its own that is not
    negative, else -inf."""
    out.copy_(torch.zeros_like(key_at, dtype=out.dtype).masked_fill_(key_at < 0, -torch.inf)[:, None])
    distance = key_at - first_row
    late = (distance > 0).any(0)  # keys that some rows see and some do not: the last ones
    if bool(late.any()):
        last = distance[:, int(late.byte().argmax()) :]
        last = last[:1] if bool((last == last[0]).all()) else last  # in most cases each block's own keys
        row = torch.arange(out.shape[1], device=out.device)[:, None]
        out[..., -last.shape[1] :].masked_fill_(last[:, None] > row, -torch.inf)
    return out


def _fake(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> Tensor:
    batch, heads, n, dim = query.shape
    return query.new_empty(batch, n, heads, dim).transpose(1, 2)


_LIB.impl("block_prefill", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("block_prefill", gpu_form("block_prefill", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::block_prefill", _fake, lib=_LIB)
