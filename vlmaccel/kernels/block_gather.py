"""The form of `block_prefill` on CPUs that takes any lists: what blocks of rows see is copied together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

GATHERED = 2**23  # bytes of keys and values copied together


def gathered_prefill(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> Tensor:
    """`block_prefill`, a few blocks of rows at a time."""
    batch, heads, n, dim = query.shape
    out = query.new_empty(batch, n, heads, dim).transpose(1, 2)
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


def pays_below(dtype: torch.dtype) -> float:
    """The share of all pairs at which `gathered_prefill` takes as long as dense attention."""
    return 0.1 if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else 0.25


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
