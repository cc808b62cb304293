"""Slots: what the physical entries of a cache layer stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

TEXT = 1  # `vlmaccel.run.Modality.TEXT`


@dataclass(frozen=True, eq=False)
class Slots:
    """What the physical slots of a cache layer stand for. G is 1, or the number of KV heads if they keep different tokens.

    index: (B, G, m) int, logical (whole-sequence) index of every slot, ascending unless entries of several precisions
        lie one behind the other.
    size: (B, G, m) int, tokens a slot stands for, 0 for a filler that no query may see; None if all are 1.
    prop_attn: whether log(size) is added to the attention logits of a key (ToMe, arXiv 2210.09461, eq. for
        proportional attention).
    removed: (B, 1) int64, by how much the position of later tokens is lowered in this layer; None if it is not.
    calibrated: (B, G, m) bool, the keys whose logits are calibrated by distance (RESTORE, arXiv 2606.01711); None if
        none are.
    modality: (B, G, m) int8, a `Modality` each; None if all are text.
    """

    index: Tensor
    size: Tensor | None = None
    prop_attn: bool = False
    removed: Tensor | None = None
    calibrated: Tensor | None = None
    modality: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """The same slots with `change` applied along the batch dimension of every tensor."""
        return replace(self, **{name: change(x) for name, x in self._tensors().items()})

    def append(self, new: Slots) -> Slots:
        """These slots followed by the `new` ones, whose `removed` and `prop_attn` hold from now on."""
        return Slots(
            _cat(self.index, new.index),
            self._joined(new, "size", 1),
            self.prop_attn or new.prop_attn,
            self.removed if new.removed is None else new.removed,
            self._joined(new, "calibrated", False),
            self._joined(new, "modality", TEXT),
        )

    def take(self, keep: Tensor) -> Slots:
        """The slots at `keep` (B, G, k) int64, one list for every KV head or one for all (G = 1)."""
        return replace(self, **{name: take(x, keep) for name, x in self._tensors().items() if name != "removed"})

    def padded(self, padding: Tensor) -> Tensor:
        """(B, G, m) bool, the slots that are padding; padding: (B, N) bool of the whole sequence."""
        padding = padding.to(self.index.device)[:, None].expand(-1, self.index.shape[1], -1)
        return padding.gather(2, self.index.long())

    def bias(self, padding: Tensor | None) -> Tensor | None:
        """(B, G, m) float32 on the logits of the slots: log of a size that counts, -inf for fillers and padding (B, N) bool;
        None where nothing is hidden or weighed."""
        if self.size is None and padding is None:
            return None
        sizes = self.sizes
        bias = sizes.clamp(min=1).float().log() if self.prop_attn else torch.zeros_like(sizes, dtype=torch.float)
        bias = bias.masked_fill(sizes == 0, -torch.inf)
        return bias if padding is None else bias.masked_fill(self.padded(padding), -torch.inf)

    @cached_property
    def compact(self) -> Slots:
        """The same in the integers that a cache holds them in, worked out once for all layers that hold these."""
        size = None if self.size is None else self.size.int()
        return replace(self, index=self.index.int(), size=size)

    @property
    def sizes(self) -> Tensor:
        """(B, G, m) int64, `size` with the ones written out."""
        return torch.ones_like(self.index, dtype=torch.long) if self.size is None else self.size.long()

    @property
    def nbytes(self) -> int:
        """Bytes that this bookkeeping holds."""
        return sum(x.nbytes for x in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, Tensor)}

    def _joined(self, new: Slots, name: str, default: int) -> Tensor | None:
        mine, others = getattr(self, name), getattr(new, name)
        if mine is None and others is None:
            return None
        known = mine if mine is not None else others
        mine, others = (
            torch.full_like(s.index, default, dtype=known.dtype) if x is None else x.to(known.dtype)
            for s, x in ((self, mine), (new, others))
        )
        return _cat(mine, others)


def take(x: Tensor, keep: Tensor) -> Tensor:
    """What is known of slots, x (B, G or 1, m), for those at `keep` (B, G or 1, k) int64."""
    groups = max(x.shape[1], keep.shape[1])
    return x.expand(-1, groups, -1).gather(2, keep.expand(-1, groups, -1))


def _cat(a: Tensor, b: Tensor) -> Tensor:
    groups = max(a.shape[1], b.shape[1])
    return torch.cat([a.expand(-1, groups, -1), b.to(a.dtype).expand(-1, groups, -1)], 2)


def extend(slots: Slots | None, start: int, n: int, batch: int, device: torch.device) -> Slots:
    """`slots` followed by n kept text tokens from logical index `start` on."""
    dense = Slots(torch.arange(start, start + n, device=device).expand(batch, 1, n))
    return dense if slots is None else slots.append(dense)
