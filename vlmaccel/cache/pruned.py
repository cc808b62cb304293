"""Cache layers that hold only the tokens that were kept, and still report the length of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from vlmaccel.cache.slots import Slots, extend, take
from vlmaccel.kernels.decode_attention import decode_attention
from vlmaccel.reduction import Reduction

ROOM = 16  # decode steps between two copies of a short cache; a long one is copied when it has grown by 1/16


@dataclass(eq=False)
class Room:
    """Keys and values with space behind them, so that a decode step writes one token instead of copying all.

    keys, values: (B, H_kv, space, head_dim). bias: (B, G, space) float32 on the logits: -inf where nothing is yet, what
    the slots ask for elsewhere.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor

    def holds(self, keys: Tensor) -> bool:
        """Whether `keys` are the first in it, there is space behind them, and it may be written to."""
        here = keys.data_ptr() == self.keys.data_ptr() and keys.stride() == self.keys.stride()
        mine = torch.is_inference_mode_enabled() or not self.keys.is_inference()
        return here and mine and keys.shape[2] < self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.bias.nbytes


class PrunedLayer(DynamicLayer):
    """Keys and values of the kept tokens only; `get_seq_length` and `get_mask_sizes` stay those of the whole sequence.

    notes: (B, G, m) tensors by name, what methods remember of every entry; they follow when entries are evicted. padding:
        (B, N) bool, the padding of the whole sequence, None if it has none; for `attend`.
    """

    keys: Tensor
    values: Tensor
    can_attend = True  # whether `attend` may be used in place of the model's own attention

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0  # tokens seen, kept or not; `reset` of the base class zeroes it by this name
        self.notes: dict[str, Tensor] = {}
        self.padding: Tensor | None = None
        self._slots: Slots | None = None
        self._expected: tuple[Slots, int] | None = None
        self._room: Room | None = None

    @property
    def held(self) -> int:
        """Entries of each KV head, fillers included."""
        return 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    @property
    def slots(self) -> Slots | None:
        """What every physical slot stands for; None while the layer is empty."""
        if not self.held:
            return None
        # tokens appended without `expect` are all kept: written out only when somebody asks, so that decoding
        # pays nothing for the bookkeeping
        tail = self.held - (0 if self._slots is None else self._slots.index.shape[2])
        if tail:
            start, batch = self.cumulative_length - tail, self.keys.shape[0]
            self._slots = extend(self._slots, start, tail, batch, self.keys.device).compact
        return self._slots

    def expect(self, slots: Slots, length: int) -> None:
        """Announce the next `update`: the slots after it, and by how many logical tokens the sequence grows."""
        self._expected = (slots.compact, length)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, H_kv, n, head_dim) keys and values; without a call of `expect` they are the next n tokens."""
        self._count(key_states.shape[-2])
        return self._append(key_states, value_states)

    def _count(self, n: int) -> None:
        if self._expected is None:
            self.cumulative_length += n
        else:
            self._slots, length = self._expected
            self._expected = None
            self.cumulative_length += length

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        n, m = key_states.shape[-2], 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]
        if n > 1 or m == 0 or torch.is_grad_enabled():
            self._room = None
            return super().update(key_states, value_states)
        if self._room is None or not self._room.holds(self.keys):
            self._room = self._make_room(m)
        room = self._room
        room.keys[:, :, m], room.values[:, :, m] = key_states[:, :, 0], value_states[:, :, 0]
        room.bias[:, :, m] = 0
        self.keys, self.values = room.keys[:, :, : m + 1], room.values[:, :, : m + 1]
        return self.keys, self.values

    def _make_room(self, m: int) -> Room:
        batch, kv_heads = self.keys.shape[:2]
        space = m + max(ROOM, m // ROOM)
        keys, values = (
            torch.cat([x, x.new_zeros(batch, kv_heads, space - m, x.shape[-1])], 2) for x in (self.keys, self.values)
        )
        known = self._bias(self._slots)
        groups = 1 if known is None else known.shape[1]
        bias = torch.full((batch, groups, space), -torch.inf, device=keys.device)
        bias[:, :, :m] = 0
        if known is not None:
            bias[:, :, : known.shape[2]] = known
        return Room(keys, values, bias)

    def _bias(self, slots: Slots | None) -> Tensor | None:
        """(B, G, k) float32 on the logits of the entries that slots are of, None where nothing is hidden or weighed."""
        return None if slots is None else slots.bias(self.padding)

    def announce_attend(self, padding: Tensor | None) -> None:
        """`attend` will follow the next `update`. padding: (B, N) bool, of the whole sequence, or None."""
        self.padding = padding

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Attention (B, H, 1, head_dim) of the newest token over all entries, right after its `update`."""
        room = self._room
        if room is None:
            return decode_attention(query, self.keys, self.values, self._whole_bias(), scale)
        return decode_attention(query, room.keys, room.values, room.bias, scale)

    def _whole_bias(self) -> Tensor | None:
        known = self._bias(self._slots)
        return None if known is None else torch.nn.functional.pad(known, (0, self.held - known.shape[2]))

    def dense(self) -> tuple[Tensor, Tensor]:
        """(B, H_kv, m, head_dim) keys and values of every slot, in full precision."""
        return self.keys, self.values

    @property
    def reduced(self) -> bool:
        """Whether entries are fewer than tokens seen."""
        return self.held < self.cumulative_length

    @property
    def removed(self) -> Tensor | None:
        """(B, 1), by how much the position of a new token is lowered in this layer; None if it is not."""
        return None if self._slots is None else self._slots.removed

    @property
    def calibrated(self) -> bool:
        """Whether logits of some slots depend on their distance."""
        return self._slots is not None and self._slots.calibrated is not None

    @property
    def masked(self) -> bool:
        """Whether some slot needs a mask of its own: a filler, a size that counts in the attention, or a calibration."""
        return self._slots is not None and not (self._slots.size is None and self._slots.calibrated is None)

    def rewrite(self, keys: Tensor, values: Tensor) -> None:
        """Put other keys and values (B, H_kv, m, head_dim) in place of those held, for the same slots."""
        self.keys, self.values, self._room = keys, values, None

    def reduce(self, reduction: Reduction, prop_attn: bool = False) -> None:
        """Evict or merge slots. `reduction` counts them as its tokens; its batch is B, or B * H_kv in that order where
        every KV head keeps its own. prop_attn: log(size) of merged slots counts in the attention from now on."""
        slots = self.slots
        if slots is None:
            raise RuntimeError("there is nothing in this cache layer to reduce")
        batch, kv_heads, m, _ = self.keys.shape
        if reduction.keep.shape[0] == batch:
            reduction = reduction.repeat(slots.index.shape[1])
        groups = reduction.keep.shape[0] // batch
        size = slots.sizes.expand(-1, groups, -1).reshape(-1, m)
        each = reduction.repeat(kv_heads // groups)
        weight = size.repeat_interleave(kv_heads // groups, 0) if reduction.merges else None

        def shrink(x: Tensor) -> Tensor:
            return each.apply(x.flatten(0, 1), weight).unflatten(0, (batch, kv_heads))

        self.keys, self.values = shrink(self.keys), shrink(self.values)
        self._reduce_slots(slots, reduction, size, prop_attn)

    def _reduce_slots(self, slots: Slots, reduction: Reduction, size: Tensor, prop_attn: bool) -> None:
        """Let slots and notes follow a reduction; size: (B * G, m), of the slots before."""
        batch, groups = slots.index.shape[0], reduction.keep.shape[0] // slots.index.shape[0]
        keep = reduction.keep.view(batch, groups, -1)
        total = reduction.total(size).view(batch, groups, -1)
        kept = replace(slots.take(keep), size=None if bool((total == 1).all()) else total)
        self._slots = replace(kept, prop_attn=slots.prop_attn or prop_attn).compact
        for name, x in self.notes.items():
            x = torch.nn.functional.pad(x, (0, slots.index.shape[2] - x.shape[2]))  # nothing is noted of newer entries
            self.notes[name] = take(x, keep)
        self._room = None

    def get_seq_length(self) -> int:
        """Logical length: every token seen, kept or not."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the logical mask, which the decoder layer then reduces to its own slots."""
        return self.cumulative_length + query_length, 0

    def reset(self) -> None:
        super().reset()
        self._slots = self._expected = self._room = self.padding = None
        self.notes = {}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, as assisted decoding does with rejected candidates."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, not {tokens_to_remove}")
        slots = self.slots
        if tokens_to_remove == 0 or slots is None:
            return
        length = self.cumulative_length + tokens_to_remove
        left = slots.index < length
        n = int(left.sum(-1).max())
        if int(left.sum(-1).min()) == n:
            self._keep_first(n, slots)
        else:  # back into a prompt of which samples or heads kept different numbers of tokens
            self.reduce(Reduction.select((left & (slots.sizes > 0)).flatten(0, 1)))
        self.cumulative_length = length

    def _keep_first(self, n: int, slots: Slots) -> None:
        first = torch.arange(n, device=slots.index.device).expand(slots.index.shape[0], 1, n)
        self._slots, self._room = slots.take(first), None
        self.keys, self.values = self.keys[..., :n, :], self.values[..., :n, :]
        self.notes = {name: x[..., :n] for name, x in self.notes.items()}

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        slots = self.slots
        if slots is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            self._slots, self._room = slots.map(change), None
            self.notes = {name: change(x) for name, x in self.notes.items()}
            self.padding = None if self.padding is None else change(self.padding)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices, ...])

    @property
    def transient(self) -> int:
        """Bytes of the copy of entries that `attend` makes at every decode step, beside what is held: none here."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, space for more, notes, and what tells which tokens they are."""
        slots = self.slots
        if slots is None:
            return 0
        entries = self.keys.nbytes + self.values.nbytes if self._room is None else self._room.nbytes
        return entries + slots.nbytes + sum(x.nbytes for x in self.notes.values())


class PrunedSlidingLayer(PrunedLayer):
    """The same for a sliding-window layer: the mask hides what left the window, in logical positions."""

    is_sliding = True
    can_attend = False  # what has left the window of one sample only is hidden by the mask

    def __init__(self, sliding_window: int, record_past: bool = False) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.record_past = record_past
        self.waits = False

    def activate_past_recording(self) -> None:
        """Keep what leaves the window too, so that `crop` can go back (assisted decoding)."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append, return everything, and then forget the slots that no later token can see in any sample, at once or, if the
        layer `waits`, when `trim` is called."""
        keys, values = super().update(key_states, value_states)
        if not self.waits:
            self.trim()
        return keys, values

    def trim(self) -> None:
        """Forget the entries that no later token can see in any sample."""
        keys, values = self.keys, self.values
        if keys.shape[-2] >= self.sliding_window and not self.record_past and (slots := self.slots) is not None:
            gone = int((slots.index <= self.cumulative_length - self.sliding_window).sum(-1).min())
            left = torch.arange(gone, keys.shape[-2], device=keys.device)
            self.keys, self.values, self._room = keys[..., gone:, :], values[..., gone:, :], None
            self._slots = slots.take(left.expand(keys.shape[0], 1, -1))
            self.notes = {name: x[..., gone:] for name, x in self.notes.items()}

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = max(self.cumulative_length - self.sliding_window + 1, 0)
        return self.cumulative_length - offset + query_length, offset

    def get_max_length(self) -> int:
        return self.sliding_window


def prunable(cache: Cache) -> bool:
    """Whether every layer can be pruned: plain dynamic and sliding-window ones can; static, quantised and offloaded ones
    cannot."""
    plain, lazy = (DynamicLayer, DynamicSlidingWindowLayer), cache.layer_class_to_replicate
    if getattr(cache, "offloading", False) or (lazy is not None and lazy not in plain):
        return False
    return all(type(layer) in plain or isinstance(layer, PrunedLayer) for layer in cache.layers)


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
