"""From the logical attention mask of the whole sequence to the slots that are really there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmaccel.cache import Slots

USE_SDPA = 'load the model with attn_implementation="sdpa" or "eager"'


def physical_mask(
    mask: Any,
    rows: Tensor,
    columns: Slots,
    past: int,
    length: int,
    heads: int,
    window: int | None,
    dtype: torch.dtype,
    flash: bool = False,
    inserts: bool = False,
) -> Tensor | None:
    """The mask of one decoder layer over its own slots.

    mask: what the model made for the whole sequence: None, (B, K) for flash attention, or (B, 1 or H, length, K) boolean
        or additive; its last column is the newest token.
    rows: (B, n) int64, which of the `length` new tokens are left. columns: every slot, the new ones last.
    past: tokens before the new ones. heads: query heads. window: sliding window of the layer, in tokens.
    flash: whether the attention is flash attention, whose masks are (B, K). inserts: whether new rows may have the same
        index; of these, a later one is not seen.
    Returns a mask of the same kind over (n, m); None where none is needed.
    Raises NotImplementedError for a mask of another kind (flex attention).
    """
    plain = columns.size is None and columns.calibrated is None
    if mask is None and plain and (window is None or past + length <= window):
        return None
    if flash:
        return flash_mask(mask, columns, past, length, window)
    if mask is None:
        mask = causal_mask(rows, per_head(columns.index, heads), past, window)
    elif not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"token reduction cannot use the {type(mask).__name__} mask of this attention implementation; " + USE_SDPA
        )
    else:
        before = past + length - mask.shape[-1]  # columns that the model left out because the window has passed them
        place = columns.index - before
        mask = _take(mask, rows, place.clamp(min=0), heads)
        if before > 0:
            mask = hide(mask, per_head(place >= 0, heads)[:, :, None])
    if inserts:
        n, m = mask.shape[2:]
        mask = hide(mask, torch.ones(n, m, dtype=torch.bool, device=mask.device).tril(m - n))
    if columns.size is None:
        return mask
    mask = hide(mask, per_head(columns.size > 0, heads)[:, :, None])
    return add_size(mask, per_head(columns.size, heads), dtype) if columns.prop_attn else mask


def flash_mask(mask: Tensor | None, columns: Slots, past: int, length: int, window: int | None) -> Tensor | None:
    """(B, m) 1 where a slot may be seen: the only mask that flash attention takes besides causality.

    Raises NotImplementedError for what it cannot express.
    """
    if window is not None and past + length > window:
        raise NotImplementedError("flash attention counts a sliding window in the tokens that are left; " + USE_SDPA)
    if columns.index.shape[1] > 1 or columns.prop_attn or columns.calibrated is not None:
        raise NotImplementedError("flash attention has no bias and no mask per head for its keys; " + USE_SDPA)
    index = columns.index[:, 0]
    seen = torch.ones_like(index) if mask is None else mask.gather(1, index.long().to(mask.device)).long()
    return seen if columns.size is None else seen * (columns.size[:, 0] > 0)


def causal_mask(rows: Tensor, index: Tensor, past: int, window: int | None) -> Tensor:
    """(B, H, n, m) bool: the new tokens `rows` (B, n) may see the slots `index` (B, H, m) that are not after them."""
    query = rows[:, None, :, None] + past
    seen = index[:, :, None] <= query
    return seen if window is None else seen & (index[:, :, None] > query - window)


def per_head(x: Tensor, heads: int) -> Tensor:
    """(B, G, m) per KV head to (B, H, m) per query head; one for all stays one for all."""
    return x if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], 1)


def hide(mask: Tensor, allowed: Tensor) -> Tensor:
    """The mask with everything that is not `allowed` hidden too."""
    allowed = allowed.to(mask.device)
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def add_size(mask: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask with log(size) (B, H, m) on every visible key: a key of size s weighs as s copies of it."""
    bias = size.clamp(min=1).log().to(dtype)[:, :, None]
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, lowest)
    return torch.where(mask > lowest / 2, mask + bias, mask)


def calibrate(
    mask: Tensor, rows: Tensor, columns: Slots, past: int, heads: int, dtype: torch.dtype, turned: Tensor
) -> Tensor:
    """Additive mask with log(2 - D(distance)) on every calibrated key (RESTORE, arXiv 2606.01711, c = 2); `add_size` has
    put log(size) there already.

    mask: (B, 1 or H, n, m), boolean or additive. rows: (B, n) int64, queries among the new tokens. turned: (past + length,) D.
    """
    assert columns.calibrated is not None
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    index = per_head(columns.index, heads)
    distance = (rows[:, None, :, None] + past - index[:, :, None]).clamp(min=0)
    bias = (2 - turned.to(mask.device)[distance]).log().to(mask.dtype)
    visible = per_head(columns.calibrated, heads)[:, :, None] & (mask > lowest / 2)
    return torch.where(visible, mask + bias, mask)


def _take(mask: Tensor, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
    """(B, 1 or H, n, m) entries of `mask` (B or 1, 1 or H, ...) at `rows` (B, n) and `columns` (B, G, m)."""
    rows, columns = rows.to(mask.device), per_head(columns, heads).to(mask.device)
    sample = torch.arange(rows.shape[0], device=mask.device)[:, None, None, None]
    head = torch.arange(mask.shape[1], device=mask.device)[None, :, None, None]
    return mask.expand(rows.shape[0], -1, -1, -1)[sample, head, rows[:, None, :, None], columns[:, :, None]]
