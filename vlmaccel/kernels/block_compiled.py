"""The form of `block_prefill` on CPUs for lists of blocks alone: torch's FlexAttention, compiled once for all lengths."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from vlmaccel.kernels.block_gather import gathered_prefill

# FLOPs of dense attention, for each thread, from which on a prompt through tens of layers pays for compiling
WORTH = 2 * 10**10
_failed: dict[torch.dtype, str] = {}


def pays_below(dtype: torch.dtype) -> float:
    """The share of all pairs at which `compiled_prefill` takes as long as dense attention."""
    return 0.3 if dtype == torch.float32 else 0.4


def worth_compiling(query: Tensor, key: Tensor) -> bool:
    """Whether this attention is so much work that compiling, 5 to 15 seconds a machine for each dtype and size of heads, and
    2 of every process then, is soon made up for; False where compiling failed for this dtype before."""
    heads, n, dim = query.shape[1:]
    pairs = n * key.shape[2] - n * (n - 1) // 2
    return query.dtype not in _failed and 4 * query.shape[0] * heads * dim * pairs >= WORTH * torch.get_num_threads()


def compiled_prefill(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, columns: Tensor, start: Tensor, block: int, scale: float
) -> Tensor:
    """`block_prefill` where there are no columns; as `gathered_prefill` where it cannot be compiled, of which it warns once."""
    heads, n, m = query.shape[1], query.shape[2], key.shape[2]
    lines = [_in_one_line(x, heads) for x in (query, key, value)]
    begin, lists = start.clamp(min=0).repeat_interleave(heads), blocks.flatten(0, 1)[:, None]
    whole, part = (_counted(lists, which, -(-m // block)) for which in _seen(lists, begin, n, m, block))
    try:
        with fx_config.patch(use_duck_shape=False):  # or it would compile anew where rows are not as many as keys
            out = _program()(*lines, *whole, *part, begin, torch.tensor(m - n), block, scale)
    except Exception as error:  # the compiler's errors have no common class
        reason = _failed[query.dtype] = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(
            "block-sparse attention is slower on this CPU than it could be, because torch.compile failed; it needs a C++ "
            f"compiler (g++ or clang++, or what the environment variable CXX names): {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return gathered_prefill(query, key, value, blocks, columns, start, block, scale)
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2).copy_(out.view(query.shape))


def _in_one_line(x: Tensor, heads: int) -> Tensor:
    """(B * heads, 1, n, head_dim), a copy: the program is the same for all numbers of samples and heads, and no view of anything,
    which would compile it anew."""
    line = x.new_empty(x.shape[0] * heads, 1, *x.shape[2:])
    line.view(*x.shape[:2], -1, *x.shape[2:]).copy_(x[:, :, None])
    return line


@cache
def _program() -> Callable[..., Tensor]:
    # fullgraph: without it, what cannot be compiled would run as attention with a whole map of pairs
    return torch.compile(_attend, dynamic=True, fullgraph=True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    whole_count: Tensor,
    whole: Tensor,
    part_count: Tensor,
    part: Tensor,
    start: Tensor,
    shift: Tensor,
    block: int,
    scale: float,
) -> Tensor:
    if not torch.compiler.is_compiling():  # it would see all pairs
        raise RuntimeError("torch.compile is switched off")

    def seen(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row + shift) & (column >= start[sample])

    mask = BlockMask.from_kv_blocks(
        part_count,
        part,
        whole_count,
        whole,
        BLOCK_SIZE=block,
        mask_mod=seen,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    return flex_attention(query, key, value, block_mask=mask, scale=scale)


COMPILED_ATTENTION = _attend.__code__


def _seen(blocks: Tensor, start: Tensor, n: int, m: int, block: int) -> tuple[Tensor, Tensor]:
    """Two of blocks' shape, bool: the key blocks that all rows of a block see whole, and the others that some see a part of."""
    first_row = (torch.arange(blocks.shape[2], device=blocks.device) * block)[:, None]
    last_row = (first_row + block).clamp(max=n) - 1
    first, last, begin = blocks * block, (blocks * block + block).clamp(max=m) - 1, start[:, None, None, None]
    seen = (blocks >= 0) & (first <= last_row + m - n) & (last >= begin)
    whole = (last <= first_row + m - n) & (first >= begin)
    return seen & whole, seen & ~whole


def _counted(blocks: Tensor, which: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(P, 1, Q) int32, how many of the lists `blocks` (P, 1, Q, L) are wanted; and (P, 1, Q, width) int32, those, in front of anything."""
    order = which.byte().argsort(dim=-1, descending=True, stable=True)
    wanted = blocks.clamp(min=0).gather(-1, order)[..., :width].int()
    return which.sum(-1, dtype=torch.int32), pad(wanted, (0, width - wanted.shape[-1])).contiguous()
