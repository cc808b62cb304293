"""What one decoder layer sees of the sequence: the logical rows, columns, rotary embedding and mask, made physical."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from vlmaccel.adapters.base import Parts
from vlmaccel.adapters.masks import calibrate, physical_mask
from vlmaccel.cache import PrunedLayer, Slots, extend
from vlmaccel.reduction import gather
from vlmaccel.run import Modality, Run


@dataclass(frozen=True, eq=False)
class View:
    """One layer's share of a forward pass.

    rows: (B, n) int64, which of the new tokens are left. columns: the slots of all keys, the new ones last.
    cos, sin: (B or 1, n, head_dim) of the rows. mask: over (n, m), or None.
    past_keys: keys of earlier tokens that the layer still holds, or None. window: its sliding window, or None.
    """

    rows: Tensor
    columns: Slots
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    past_keys: Tensor | None
    window: int | None


def layer_view(run: Run, parts: Parts, kwargs: dict[str, Any], held: Any, hidden: Tensor) -> View:
    """The view of a layer whose cache layer is `held` (or None) when it is called with `kwargs` on `hidden`.

    What layers share is worked out once per stage: `run.views` remembers it until the next reduction.
    """
    before = past_slots(run, held, hidden)
    window = getattr(held, "sliding_window", None)
    mask = kwargs.get("attention_mask")
    removed = None if before is None else before.removed
    shared = ("columns", None if before is None else id(before))
    if shared not in run.views:
        run.views[shared] = (before, _rows(run, hidden), _columns(run, before, hidden))
    _, rows, columns = run.views[shared]
    key = ("mask", id(mask), *shared, window)
    if key not in run.views:
        heads = parts.config.num_attention_heads
        made = mask
        if run.reduction is not None or (isinstance(held, PrunedLayer) and before is not None):
            flash = is_flash_attention_requested(config=parts.config)
            inserts = run.reduction is not None and run.reduction.inserts
            made = physical_mask(mask, rows, columns, run.past, run.length, heads, window, hidden.dtype, flash, inserts)
            if columns.calibrated is not None:
                made = calibrate(made, rows, columns, run.past, heads, hidden.dtype, _turned(run, parts, hidden))
        run.views[key] = (mask, made)
    cos, sin = _rotary(run, parts, kwargs, removed, rows, hidden)
    past_keys = None
    if before is not None and run.may_reduce:
        past_keys = held.dense()[0] if isinstance(held, PrunedLayer) else held.keys
    return View(rows, columns, cos, sin, run.views[key][1], past_keys, window)


def past_slots(run: Run, held: Any, hidden: Tensor) -> Slots | None:
    """The slots of what a cache layer holds already; None if that is nothing."""
    if isinstance(held, PrunedLayer):
        return held.slots
    if run.past == 0 or held is None or held.keys is None or held.keys.numel() == 0:
        return None
    n = held.keys.shape[-2]
    return extend(None, run.past - n, n, hidden.shape[0], hidden.device)


def _rows(run: Run, hidden: Tensor) -> Tensor:
    if run.index is not None:
        return run.index.to(hidden.device)
    return torch.arange(run.length, device=hidden.device).expand(hidden.shape[0], -1)


def _columns(run: Run, before: Slots | None, hidden: Tensor) -> Slots:
    size = None if run.mask_size is None else run.mask_size[:, None].to(hidden.device)
    removed = run.removed_in_all
    if removed is not None:
        removed = removed.to(hidden.device)
        if before is not None and before.removed is not None:
            removed = removed + before.removed
    calibrated = None if run.calibrated is None else run.calibrated[:, None].to(hidden.device)
    modality = run.remaining.modality[:, None].to(hidden.device) if run.keeps_modality else None
    if modality is not None and bool((modality == Modality.TEXT).all()):
        modality = None
    index = (_rows(run, hidden) + run.past)[:, None]
    new = Slots(index, size, run.prop_attn, removed, calibrated, modality)
    return new if before is None else before.append(new)


def _turned(run: Run, parts: Parts, hidden: Tensor) -> Tensor:
    """(past + length,) float32, mean cosine of the angles by which rotary positions turn keys over each distance."""
    distance = torch.arange(run.past + run.length, device=hidden.device)[None]
    if parts.axes > 1:
        distance = distance.expand(parts.axes, 1, -1)
    cos = parts.rotary(hidden.float(), position_ids=distance)[0][0]
    return cos.mean(-1) / cos[0].mean()


def _rotary(
    run: Run, parts: Parts, kwargs: dict[str, Any], removed: Tensor | None, rows: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rows: taken from the model's own, or made anew where positions are renumbered."""
    whole = kwargs["position_embeddings"]
    if run.removed is not None or removed is not None:
        return renumbered(run, parts, kwargs, removed, hidden)
    if run.reduction is None:
        return whole
    key = ("rotary", id(whole))
    if key not in run.views:
        run.views[key] = (whole, (gather(whole[0], rows), gather(whole[1], rows)))
    return run.views[key][-1]


def renumbered(
    run: Run, parts: Parts, kwargs: dict[str, Any], removed: Tensor | None, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin of the remaining new tokens, their positions lowered by what was dropped: in this forward before each
    of them, and in earlier ones (`removed`, (B, 1))."""
    position = kwargs.get("position_ids")
    if position is None:
        raise NotImplementedError(
            "this model does not tell its decoder layers the position ids, so they cannot be renumbered; "
            'use positions="keep"'
        )
    key = ("renumbered", id(position), id(removed))
    if key not in run.views:
        now = position if run.index is None else gather(position, run.index)
        for lower in (run.removed, removed):
            now = now if lower is None else now - lower.to(now.device)
        run.views[key] = (position, removed, parts.rotary(hidden, position_ids=now))
    return run.views[key][-1]


def apply_view(view: View, kwargs: dict[str, Any], reduced: bool) -> dict[str, Any]:
    """The layer's keyword arguments with the view in place of the whole sequence."""
    changed = {**kwargs, "attention_mask": view.mask, "position_embeddings": (view.cos, view.sin)}
    if reduced:
        # only flash attention reads them below this point, and takes gaps for the borders of packed sequences
        changed["position_ids"] = None
    return changed
