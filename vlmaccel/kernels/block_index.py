"""Lists of what each block of rows sees, for `block_prefill`: made from chosen keys and diagonals, and what they mean.

The lists are blocks (B, H, Q, L) and columns (B, H, Q, C), Q blocks of rows; see `block_prefill`. The rows are the last
`n_rows` of `n_keys` keys. The index building of Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context
LLMs via Dynamic Sparse Attention", NeurIPS 2024, arXiv 2407.02490, with diagonals in whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def vertical_slash_index(
    vertical: Tensor, slash: Tensor, n_rows: int, n_keys: int, block: int
) -> tuple[Tensor, Tensor]:
    """(blocks, columns): the key blocks that a chosen diagonal crosses within a block of rows, and the chosen keys beside them.

    vertical: (B, H, v) int, keys, in any order. slash: (B, H, s) int, diagonals by row minus key, less than n_keys; 0 is
    always among them, so that no row is empty. -1 stands for none. The last block of rows counts as a whole one.
    """
    earlier, key_blocks = n_keys - n_rows, _blocks(n_keys, block)
    first, last = _row_range(n_rows, n_keys, block, slash.device)
    # A diagonal that block 0 of the rows meets in key block b meets block i of them in b + i, so that one line of flags,
    # read from another place by every block of rows, is enough. Its place 0 is key block -len(first) of row block 0.
    slash = torch.cat([slash.long(), slash.new_zeros(*slash.shape[:2], 1, dtype=torch.long)], 2)
    met = (earlier - slash).div(block, rounding_mode="floor") + len(first)
    none = len(first) + key_blocks + 1  # where flags go that stand for nothing
    flags = slash.new_zeros(*slash.shape[:2], none + 1, dtype=torch.bool)
    for crossed in (met, met + ((earlier - slash) % block != 0)):
        flags.scatter_(2, crossed.masked_fill(slash < 0, none), True)
    hit = flags[..., 1 : len(first) + key_blocks].unfold(2, key_blocks, 1).flip(2)
    number = torch.arange(key_blocks, device=slash.device, dtype=torch.int32)
    column = vertical.int().sort(2).values[:, :, None]
    return _lists(hit, number.expand(*hit.shape[:2], 1, -1)), _lists(
        beside(hit, column, block) & (column <= last[:, None]), column
    )


def beside(hit: Tensor, columns: Tensor, block: int) -> Tensor:
    """(B, H, Q, C) bool, which of the ascending `columns` are keys (not -1), not there before and in no block that is listed.

    hit: (B, H, Q, n_keys / block) bool, the blocks that are listed. columns: (B, H, Q or 1, C) int.
    """
    again = pad(columns[..., 1:] == columns[..., :-1], (1, 0))[..., : columns.shape[3]]
    inside = columns.clamp(min=0).div(block, rounding_mode="floor").long().expand(-1, -1, hit.shape[2], -1)
    return (~hit).gather(3, inside) & (~again & (columns >= 0))


def dense_mask(blocks: Tensor, columns: Tensor, start: Tensor, n_rows: int, n_keys: int, block: int) -> Tensor:
    """(B, H, n_rows, n_keys) bool, which key each row sees: a pair at a time, for tests."""
    row, key = torch.arange(n_rows, device=blocks.device), torch.arange(n_keys, device=blocks.device)
    listed = blocks.new_zeros(*blocks.shape[:3], _blocks(n_keys, block) + 1, dtype=torch.bool)
    listed = listed.scatter(3, blocks.long() % listed.shape[3], True)[..., :-1]  # -1 is the last place, which goes
    single = columns.new_zeros(*columns.shape[:3], n_keys + 1, dtype=torch.bool)
    single = single.scatter(3, columns.long() % single.shape[3], True)[..., :-1]
    seen = (listed[..., key // block] | single)[:, :, row // block]
    causal = key <= row[:, None] + n_keys - n_rows
    return seen & causal & (key >= start[:, None, None, None])


def computed_share(blocks: Tensor, columns: Tensor, start: Tensor, n_rows: int, n_keys: int, block: int) -> Tensor:
    """(B, H) float32, the share of a head's causal pairs of row and key that its lists hold. start: (B,)."""
    first, last = (x[:, None] for x in _row_range(n_rows, n_keys, block, blocks.device))
    start = start[:, None, None, None]

    def pairs(key: Tensor, width: int) -> Tensor:
        """(B, H), sum over the lists of the pairs that rows first to last have with keys key to key + width - 1."""
        begin, end = (torch.maximum(x.long(), start) for x in (key, key + width))
        below = _triangle(last - begin + 1) - _triangle(first - begin)
        beyond = _triangle(last - end + 1) - _triangle(first - end)
        return ((below - beyond) * (key >= 0)).sum((2, 3))

    real = start.flatten().clamp(min=0)
    of = _triangle(n_keys - real) - _triangle(n_keys - n_rows - real)
    held = pairs(blocks * block, block) + pairs(columns, 1)
    return held.float() / of.clamp(min=1)[:, None]


def with_all(heads: Tensor, blocks: Tensor, columns: Tensor, n_keys: int, block: int) -> tuple[Tensor, Tensor]:
    """The lists, with all key blocks, and no columns, for some `heads` (B, H) bool."""
    everything = torch.arange(_blocks(n_keys, block), dtype=torch.int32, device=blocks.device)
    blocks = pad(blocks, (0, len(everything) - blocks.shape[3]), value=-1)
    heads = heads[..., None, None]
    return torch.where(heads, everything, blocks), columns.masked_fill(heads, -1)


def _blocks(n: int, block: int) -> int:
    return (n + block - 1) // block


def _row_range(n_rows: int, n_keys: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(Q,) int64 each, key numbers of the first and the last row of every block of rows."""
    first = torch.arange(n_keys - n_rows, n_keys, block, device=device)
    return first, (first + block - 1).clamp(max=n_keys - 1)


def _lists(chosen: Tensor, number: Tensor) -> Tensor:
    """(B, H, Q, most) int32: the `number` (B, H, 1, n) of what is `chosen` (B, H, Q, n) bool, with -1 behind."""
    count = chosen.flatten(0, 2).sum(1)
    row, place = chosen.flatten(0, 2).nonzero(as_tuple=True)
    most = int(count.max()) if count.numel() else 0
    lists = number.new_full((len(count), most), -1, dtype=torch.int32)
    behind = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    lists[row, behind] = number.flatten(0, 2)[row // chosen.shape[2], place]
    return lists.view(*chosen.shape[:3], most)


def _triangle(x: Tensor) -> Tensor:
    """1 + 2 + ... + x, 0 for what is below."""
    x = x.clamp(min=0)
    return x * (x + 1) // 2
