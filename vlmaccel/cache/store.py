"""Store: cache entries in a few bits, in groups of neighbouring tokens that never change once they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmaccel.cache.slots import Slots, take
from vlmaccel.kernels.quantize_keys import quantize_keys
from vlmaccel.kernels.quantize_pack import dequantize, quantize_pack


@dataclass(eq=False)
class Store:
    """N groups of `group` entries of each KV head in `bits` bits, by KIVI's grid (arXiv 2402.02750).

    keys: codes (B, H_kv, N, group, head_dim * bits / 8) uint8, scale and zero (B, H_kv, N, 1, head_dim): per channel.
    values: codes alike, scale and zero (B, H_kv, N, group, head_dim / channels): per token, `channels` share a scale.
    slots: (B, G, N * group). Samples (and heads) with fewer groups are filled up with groups of size 0 at the end.
    notes: (B, G, N * group) tensors by name, see `PrunedLayer`.
    """

    bits: int
    group: int
    keys: tuple[Tensor, Tensor, Tensor]
    values: tuple[Tensor, Tensor, Tensor]
    slots: Slots
    notes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        bits: int,
        group: int,
        keys: Tensor,
        values: Tensor,
        slots: Slots,
        dtype: torch.dtype,
        asked: tuple[Tensor, Tensor] | None = None,
    ) -> Store:
        """Quantise keys and values (B, H_kv, n, head_dim), n a multiple of `group`; dtype: of scales and zeros.

        asked: mean and variance of the queries, (B, H_kv, head_dim) each, for keys in 2 bits to be rounded by; others are
        rounded to the nearest code.
        """
        channels = channels_of(values.shape[-1], group)
        packed = (
            quantize_pack(keys.unflatten(2, (-1, group)), bits, group, -2, dtype)
            if asked is None or bits > 2
            else _by_group(quantize_keys(keys, *asked, bits, group, dtype), group)
        )
        return cls(
            bits, group, packed, quantize_pack(values.unflatten(2, (-1, group)), bits, channels, -1, dtype), slots
        )

    def append(self, new: Store) -> None:
        """Put `new` groups behind these, fillers last."""
        self.keys, self.values = (
            tuple(_cat(a, b) for a, b in zip(mine, others, strict=True))
            for mine, others in ((self.keys, new.keys), (self.values, new.values))
        )
        self.slots = self.slots.append(new.slots)
        self.notes = {name: torch.cat([x, new.notes[name]], 2) for name, x in self.notes.items()}
        self.compact()

    def compact(self) -> None:
        """Free the groups of which nothing is left; those that a sample has stay in their order."""
        if self.slots.size is None:
            return
        real = (self.slots.sizes > 0).unflatten(2, (-1, self.group)).any(-1)  # (B, G, N)
        most = int(real.sum(2).max())
        order = (~real).byte().argsort(dim=2, stable=True)[:, :, :most]
        if most == real.shape[2] and bool((order == torch.arange(most, device=order.device)).all()):
            return
        heads = order.repeat_interleave(self.keys[0].shape[1] // order.shape[1], 1)

        def of_groups(x: Tensor) -> Tensor:
            return x.gather(2, heads[..., None, None].expand(-1, -1, -1, *x.shape[3:]))

        self.keys, self.values = (tuple(of_groups(x) for x in part) for part in (self.keys, self.values))
        inside = torch.arange(self.group, device=order.device)
        entries = (order[..., None] * self.group + inside).flatten(2)
        self.slots = self.slots.take(entries)
        self.notes = {name: take(x, entries) for name, x in self.notes.items()}

    @property
    def packed(self) -> list[Tensor]:
        """The six tensors as `mixed_decode` takes them: (B, H_kv, N * group, ...) codes and so on, no copies."""
        return [x.flatten(2, 3) for x in (*self.keys, *self.values)]

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, H_kv, N * group, head_dim) keys and values."""
        return (
            dequantize(*self.keys, self.bits, -2, dtype).flatten(2, 3),
            dequantize(*self.values, self.bits, -1, dtype).flatten(2, 3),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` along the batch dimension of every tensor."""
        self.keys, self.values = (tuple(map(change, part)) for part in (self.keys, self.values))
        self.slots = self.slots.map(change)
        self.notes = {name: change(x) for name, x in self.notes.items()}

    @property
    def nbytes(self) -> int:
        """Codes, scales, zeros, and what tells which tokens they are."""
        return sum(x.nbytes for x in (*self.keys, *self.values)) + self.slots.nbytes


def _by_group(packed: tuple[Tensor, Tensor, Tensor], group: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_keys` gives as a store holds it."""
    codes, scale, zero = packed
    return codes.unflatten(2, (-1, group)), scale.unsqueeze(3), zero.unsqueeze(3)


def channels_of(dim: int, group: int) -> int:
    """How many neighbouring channels of a value share a scale: the largest divisor of `dim` up to `group`."""
    return max(n for n in range(1, min(dim, group) + 1) if dim % n == 0)


def _cat(a: Tensor, b: Tensor) -> Tensor:
    """Codes, scales or zeros one behind the other; in float32 if some are in float16, some in bfloat16: codes were made for
    what they are to the bit."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.cat([a.to(dtype), b.to(dtype)], 2)
