"""Cache layers that hold only the tokens that were kept, and still report the length of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from vlmaccel.reduction import Reduction


@dataclass(frozen=True, eq=False)
class Slots:
    """What the physical slots of a cache layer stand for. G is 1, or the number of KV heads if they keep different tokens.

    index: (B, G, m) int64, logical (whole-sequence) index of every slot, ascending.
    size: (B, G, m) int64, tokens a slot stands for, 0 for a filler that no query may see; None if all are 1.
    prop_attn: whether log(size) is added to the attention logits of a key (ToMe, arXiv 2210.09461, eq. for
        proportional attention).
    removed: (B, 1) int64, by how much the position of later tokens is lowered in this layer; None if it is not.
    calibrated: (B, G, m) bool, the keys whose logits are calibrated by distance (RESTORE, arXiv 2606.01711); None if
        none are.
    """

    index: Tensor
    size: Tensor | None = None
    prop_attn: bool = False
    removed: Tensor | None = None
    calibrated: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """The same slots with `change` applied along the batch dimension of every tensor."""
        size = None if self.size is None else change(self.size)
        removed = None if self.removed is None else change(self.removed)
        calibrated = None if self.calibrated is None else change(self.calibrated)
        return replace(self, index=change(self.index), size=size, removed=removed, calibrated=calibrated)

    def append(self, new: Slots) -> Slots:
        """These slots followed by the `new` ones, whose `removed` and `prop_attn` hold from now on."""
        size = None
        if self.size is not None or new.size is not None:
            size = _cat(self.sizes, new.sizes)
        removed = self.removed if new.removed is None else new.removed
        calibrated = None
        if self.calibrated is not None or new.calibrated is not None:
            calibrated = _cat(
                *(
                    torch.zeros_like(s.index, dtype=torch.bool) if s.calibrated is None else s.calibrated
                    for s in (self, new)
                )
            )
        return Slots(_cat(self.index, new.index), size, self.prop_attn or new.prop_attn, removed, calibrated)

    def take(self, keep: Tensor) -> Slots:
        """The slots at `keep` (B, G, k), one list for every KV head or one for all (G = 1)."""
        groups = max(self.index.shape[1], keep.shape[1])
        keep = keep.expand(-1, groups, -1)

        def pick(x: Tensor) -> Tensor:
            return x.expand(-1, groups, -1).gather(2, keep)

        size, calibrated = (None if x is None else pick(x) for x in (self.size, self.calibrated))
        return replace(self, index=pick(self.index), size=size, calibrated=calibrated)

    @property
    def sizes(self) -> Tensor:
        """`size`, with the ones written out."""
        return torch.ones_like(self.index) if self.size is None else self.size

    @property
    def nbytes(self) -> int:
        """Bytes that this bookkeeping holds."""
        return sum(x.nbytes for x in (self.index, self.size, self.removed, self.calibrated) if x is not None)


def _cat(a: Tensor, b: Tensor) -> Tensor:
    groups = max(a.shape[1], b.shape[1])
    return torch.cat([a.expand(-1, groups, -1), b.expand(-1, groups, -1)], 2)


def extend(slots: Slots | None, start: int, n: int, batch: int, device: torch.device) -> Slots:
    """`slots` followed by n kept tokens from logical index `start` on."""
    dense = Slots(torch.arange(start, start + n, device=device).expand(batch, 1, n))
    return dense if slots is None else slots.append(dense)


class PrunedLayer(DynamicLayer):
    """Keys and values of the kept tokens only; `get_seq_length` and `get_mask_sizes` stay those of the whole sequence."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0  # tokens seen, kept or not; `reset` of the base class zeroes it by this name
        self._slots: Slots | None = None
        self._expected: tuple[Slots, int] | None = None

    @property
    def slots(self) -> Slots | None:
        """What every physical slot stands for; None while the layer is empty."""
        if self.keys is None or self.keys.numel() == 0:
            return None
        batch, _, held, _ = self.keys.shape
        # tokens appended without `expect` are all kept: written out only when somebody asks, so that decoding
        # pays nothing for the bookkeeping
        tail = held - (0 if self._slots is None else self._slots.index.shape[2])
        if tail:
            self._slots = extend(self._slots, self.cumulative_length - tail, tail, batch, self.keys.device)
        return self._slots

    def expect(self, slots: Slots, length: int) -> None:
        """Announce the next `update`: the slots after it, and by how many logical tokens the sequence grows."""
        self._expected = (slots, length)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, H_kv, n, head_dim) keys and values; without a call of `expect` they are the next n tokens."""
        if self._expected is None:
            self.cumulative_length += key_states.shape[-2]
        else:
            self._slots, length = self._expected
            self._expected = None
            self.cumulative_length += length
        return super().update(key_states, value_states)

    @property
    def removed(self) -> Tensor | None:
        """(B, 1), by how much the position of a new token is lowered in this layer; None if it is not."""
        return None if self._slots is None else self._slots.removed

    @property
    def masked(self) -> bool:
        """Whether some slot needs a mask of its own: a filler, a size that counts in the attention, or a calibration."""
        return self._slots is not None and not (self._slots.size is None and self._slots.calibrated is None)

    def reduce(self, reduction: Reduction) -> None:
        """Evict or merge slots. `reduction` counts them as its tokens; its batch is B, or B * H_kv in that order where
        every KV head keeps its own."""
        slots = self.slots
        if slots is None:
            raise RuntimeError("there is nothing in this cache layer to reduce")
        batch, kv_heads, m, _ = self.keys.shape
        groups = reduction.keep.shape[0] // batch
        size = slots.sizes.expand(-1, groups, -1).reshape(-1, m)

        def shrink(x: Tensor) -> Tensor:
            x = x.reshape(batch * groups, kv_heads // groups, m, -1).transpose(1, 2)
            return reduction.apply(x, size).transpose(1, 2).reshape(batch, kv_heads, -1, x.shape[-1])

        self.keys, self.values = shrink(self.keys), shrink(self.values)
        kept, total = slots.take(reduction.keep.view(batch, groups, -1)), reduction.total(size)
        plain = bool((total == 1).all())
        self._slots = replace(kept, size=None if plain else total.view(batch, groups, -1))

    def get_seq_length(self) -> int:
        """Logical length: every token seen, kept or not."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the logical mask, which the decoder layer then reduces to its own slots."""
        return self.cumulative_length + query_length, 0

    def reset(self) -> None:
        super().reset()
        self._slots = self._expected = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, as assisted decoding does with rejected candidates."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, not {tokens_to_remove}")
        slots = self.slots
        if tokens_to_remove == 0 or slots is None:
            return
        length = self.cumulative_length + tokens_to_remove
        left = (slots.index < length).sum(-1)
        n = int(left.max())
        if int(left.min()) != n:
            raise ValueError("cannot crop into the pruned prompt: its samples kept different numbers of tokens")
        self._slots = slots.take(torch.arange(n, device=left.device).expand(left.shape[0], 1, n))
        self.keys, self.values = self.keys[..., :n, :], self.values[..., :n, :]
        self.cumulative_length = length

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.slots is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            self._slots = self.slots.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices, ...])

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values and what tells which tokens they are."""
        slots = self.slots
        return 0 if slots is None else self.keys.nbytes + self.values.nbytes + slots.nbytes


class PrunedSlidingLayer(PrunedLayer):
    """The same for a sliding-window layer: the mask hides what left the window, in logical positions."""

    is_sliding = True

    def __init__(self, sliding_window: int, record_past: bool = False) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.record_past = record_past

    def activate_past_recording(self) -> None:
        """Keep what leaves the window too, so that `crop` can go back (assisted decoding)."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append, return everything, and then forget the slots that no later token can see in any sample."""
        keys, values = super().update(key_states, value_states)
        if keys.shape[-2] >= self.sliding_window and not self.record_past and (slots := self.slots) is not None:
            gone = int((slots.index <= self.cumulative_length - self.sliding_window).sum(-1).min())
            left = torch.arange(gone, keys.shape[-2], device=keys.device)
            self.keys, self.values = keys[..., gone:, :], values[..., gone:, :]
            self._slots = slots.take(left.expand(keys.shape[0], 1, -1))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = max(self.cumulative_length - self.sliding_window + 1, 0)
        return self.cumulative_length - offset + query_length, offset

    def get_max_length(self) -> int:
        return self.sliding_window


def prunable(cache: Cache) -> bool:
    """Whether every layer can be pruned: plain dynamic and sliding-window ones can, static and quantised ones cannot."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer, PrunedSlidingLayer)
    lazy = cache.layer_class_to_replicate
    return (lazy is None or lazy in kinds) and all(type(layer) in kinds for layer in cache.layers)


def pruned_layer(cache: Cache, layer: int) -> PrunedLayer:
    """The pruned form of a `prunable` cache's layer, put in its place with what it holds."""
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    old: CacheLayerMixin = cache.layers[layer]
    if isinstance(old, PrunedLayer):
        return old
    sliding = isinstance(old, DynamicSlidingWindowLayer)
    new = PrunedSlidingLayer(old.sliding_window, old.record_past) if sliding else PrunedLayer()
    seen = old.get_seq_length()
    if seen > 0:
        batch, _, held, _ = old.keys.shape
        new.expect(extend(None, seen - held, held, batch, old.keys.device), seen)
        new.update(old.keys, old.values)
    cache.layers[layer] = new
    return new
