"""MixedLayer: a cache layer whose entries are part in full precision, part in 2, 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.cache.key_bias import KeyBias
from vlmaccel.cache.pruned import PrunedLayer
from vlmaccel.cache.slots import Slots, extend, take
from vlmaccel.cache.store import Store
from vlmaccel.kernels.mixed_decode import CHUNK, mixed_decode
from vlmaccel.kernels.quantize_pack import scale_dtype
from vlmaccel.reduction import Reduction

FULL = 16


class MixedLayer(PrunedLayer):
    """Entries are stored one precision behind the other: first 2, then 4, then 8 bits, last full precision (`keys`,
    `values`), where new ones come in. Attention does not mind the order.

    group: entries that share the scale of a channel. residual: so many newest entries always stay in full precision.
    default: bits of entries that come in at decode steps. Which entries are in few bits depends on the sequence alone, not
    on how it came in: of each precision the oldest multiple of `group` behind the residual window. Codes never change.
    key_bias: what is taken off the keys before they are quantised and put back on when they are read, or None.
    positions: (P, B, N) int32 of all tokens seen, for that.
    asked: mean and variance of the last prompt's queries, (B, H_kv, head_dim) float32 each, by which keys in 2 bits are
        rounded from now on (see `quantize_keys`), or None.
    """

    def __init__(self, group: int, residual: int, default: int, key_bias: KeyBias | None = None) -> None:
        super().__init__()
        self.group, self.residual, self.default, self.key_bias = group, residual, default, key_bias
        self.positions: Tensor | None = None
        self.asked: tuple[Tensor, Tensor] | None = None
        self.stores: dict[int, Store] = {}
        self._attending = False
        # (B, G, e) int8, bits that entries in full precision are to have; 0: not decided
        self._target: Tensor | None = None
        self._due = 0  # length of the sequence at which something may be due

    @classmethod
    def of(cls, layer: PrunedLayer, padding: Tensor | None, **options) -> MixedLayer:
        """A layer that holds what `layer` holds, all in full precision so far. padding: (B, N) bool or None."""
        new, slots = cls(**options), layer.slots
        assert slots is not None
        if padding is not None:
            slots = replace(slots, size=slots.sizes.masked_fill(slots.padded(padding), 0)).compact
        new.notes, new.cumulative_length = layer.notes, layer.cumulative_length
        new.lazy_initialization(layer.keys, layer.values)
        new.keys, new.values, new._slots = layer.keys, layer.values, slots
        return new

    @property
    def _exact(self) -> int:
        return 0 if self.keys is None or self.keys.ndim < 4 else self.keys.shape[-2]

    @property
    def held(self) -> int:
        return self._exact + sum(store.slots.index.shape[2] for store in self.stores.values())

    @property
    def exact_slots(self) -> Slots:
        """What the entries in full precision stand for."""
        tail = self._exact - (0 if self._slots is None else self._slots.index.shape[2])
        if tail or self._slots is None:
            start, batch = self.cumulative_length - tail, self.keys.shape[0]
            self._slots = extend(self._slots, start, tail, batch, self.keys.device).compact
        return self._slots

    @property
    def slots(self) -> Slots | None:
        if not self.held:
            return None
        parts = [store.slots for store in self._in_order()] + [self.exact_slots]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.append(part)
        return whole

    def _in_order(self) -> list[Store]:
        return [self.stores[bits] for bits in sorted(self.stores)]

    @property
    def reduced(self) -> bool:
        return bool(self.stores) or super().reduced

    def expect(self, slots: Slots, length: int) -> None:
        exact = torch.arange(self.held - self._exact, slots.index.shape[2], device=slots.index.device)
        super().expect(slots.take(exact.expand(slots.index.shape[0], 1, -1)), length)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, H_kv, n, head_dim) keys and values; gives all entries in full precision, but only these new ones if
        `attend` follows."""
        self._count(key_states.shape[-2])
        self._append(key_states, value_states)
        if self._attending:
            return key_states, value_states
        return self.dense()

    def announce_attend(self, padding: Tensor | None) -> None:
        super().announce_attend(padding)
        self._attending = True

    def attend(self, query: Tensor, scale: float) -> Tensor:
        self._attending = False
        stores = self._in_order()
        packed = [x for store in stores for x in store.packed]
        bits = [store.bits for store in stores]
        return mixed_decode(query, self.keys, self.values, packed, bits, self._bias_of(query, scale), scale)

    def _bias_of(self, query: Tensor, scale: float) -> Tensor | None:
        """(B, G or H, m) float32 on the logits: what the slots ask for, and the bias of the keys in few bits."""
        bias = self._bias(self.slots)
        if self.key_bias is None or not self.stores:
            return bias
        kv_heads, heads = self.keys.shape[1], query.shape[1]
        parts = [self._key_bias_logits(query, store.slots).mul_(scale) for store in self._in_order()]
        added = torch.cat([*parts, query.new_zeros(query.shape[0], heads, self._exact, dtype=torch.float)], 2)
        if bias is not None:
            by_kv_head = added.unflatten(1, (kv_heads, -1))
            by_kv_head += bias[:, :, None]
        return added

    def _key_bias_logits(self, query: Tensor, slots: Slots) -> Tensor:
        """(B, H, n) float32, products of the query and the bias of the keys at slots, not scaled."""
        assert self.key_bias is not None and self.positions is not None
        groups, n = slots.index.shape[1:]
        if groups * n <= self.positions.shape[2]:
            return self.key_bias.logits(query, self._positions(slots))
        known = self.key_bias.logits(query, self.positions[:, :, None]).unflatten(1, (groups, -1))
        index = slots.index.long()[:, :, None].expand(-1, -1, known.shape[2], -1)
        return known.gather(3, index).flatten(1, 2)

    def dense(self) -> tuple[Tensor, Tensor]:
        """(B, H_kv, m, head_dim) keys and values of every entry, in the dtype of the model: a copy, but for an empty store."""
        parts = [(self.keys, self.values)]
        for store in reversed(self._in_order()):
            keys, values = store.dense(torch.float if self.key_bias else self.keys.dtype)
            if self.key_bias is not None:
                keys = (keys + self.key_bias.at(self._positions(store.slots))).to(self.keys.dtype)
                values = values.to(self.keys.dtype)
            parts.insert(0, (keys, values))
        if len(parts) == 1:
            return parts[0]
        keys, values = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        return keys, values

    @property
    def transient(self) -> int:
        """Bytes of what `attend` unpacks at a time, at most: a GPU's kernel does it in registers."""
        batch, kv_heads, _, dim = self.keys.shape
        most = max((store.slots.index.shape[2] for store in self.stores.values()), default=0)
        return min(CHUNK, batch * kv_heads * most * dim) * torch.float.itemsize

    def _positions(self, slots: Slots) -> Tensor:
        """(P, B, G, n) positions of slots."""
        assert self.positions is not None
        known = self.positions[:, :, None].expand(-1, -1, slots.index.shape[1], -1)
        return known.gather(3, slots.index.long().expand(known.shape[0], -1, -1, -1))

    def see_positions(self, positions: Tensor) -> None:
        """Note the positions (P, B, n) of the tokens that have come in since the last call."""
        positions = positions.int()
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], 2)

    def undecided(self) -> Tensor:
        """(B, G, e) bool, entries in full precision for which no bits have been named."""
        return (self.exact_slots.sizes > 0) & (self._targets() == 0)

    def name(self, bits: Tensor) -> None:
        """Say how many bits, 2, 4, 8 or 16, entries in full precision are to have: (B, G, e) int8, 0 leaves what was said."""
        old = self._targets()
        groups = max(old.shape[1], bits.shape[1])
        old, bits = (x.expand(-1, groups, -1) for x in (old, bits))
        self._target, self._due = torch.where(bits > 0, bits, old), 0

    def _targets(self) -> Tensor:
        """(B, G, e) int8, what has been named."""
        if self._target is None:
            return torch.zeros(self.keys.shape[0], 1, self._exact, dtype=torch.int8, device=self.keys.device)
        return pad(self._target, (0, self._exact - self._target.shape[2]))

    def settle(self, open_: int = 0) -> None:
        """Quantise what is due. open_: so many newest tokens may be taken back yet."""
        length = self.cumulative_length - open_
        if length < self._due:
            return
        slots = self.exact_slots
        target = self._targets()
        target = target.masked_fill(target == 0, self.default)
        groups = max(target.shape[1], slots.index.shape[1])
        real, target = (slots.sizes > 0).expand(-1, groups, -1), target.expand(-1, groups, -1)
        old = real & (real.flip(2).cumsum(2).flip(2) > self.residual + open_)
        left, wait = real, self.group
        self._part_notes()
        for bits in (2, 4, 8):
            due = old & (target == bits)
            count = due.sum(2)
            whole = count // self.group * self.group
            if bits == self.default or bool((target == bits).any()):
                wait = min(wait, int((self.group - count + whole).min()))
            if int(whole.max()):
                moved = due & (due.cumsum(2) <= whole[..., None])
                self._quantise(bits, moved, slots)
                left = left & ~moved
        self._due = length + wait
        if left is not real or int(left.sum(2).max()) < self._exact:
            self._keep_exact(left, slots)
        self._join_notes()

    def _quantise(self, bits: int, moved: Tensor, slots: Slots) -> None:
        """Put the entries `moved` (B, G, e) bool into the store of `bits` bits."""
        keep = (~moved).byte().argsort(dim=2, stable=True)[:, :, : int(moved.sum(2).max())]
        chosen = slots.take(keep)
        if not bool(moved.gather(2, keep).all()):
            chosen = replace(chosen, size=chosen.sizes * moved.gather(2, keep)).compact
        keys, values = (_take(x, keep) for x in (self.keys, self.values))
        if self.key_bias is not None:
            keys = keys.float() - self.key_bias.at(self._positions(chosen))
        # a filler must not widen the range of a group; groups are whole, so that it is alone with others
        dtype = scale_dtype(torch.cat([keys.flatten(), values.flatten().to(keys.dtype)]))
        new = Store.make(bits, self.group, keys, values, chosen, dtype, self.asked)
        new.notes = {name: take(x, keep) for name, x in self.notes.items()}
        if bits in self.stores:
            self.stores[bits].append(new)
        else:
            self.stores[bits] = new
            new.compact()

    def _keep_exact(self, left: Tensor, slots: Slots) -> None:
        """Keep the entries `left` (B, G, e) bool in full precision, the others no longer; fillers come first."""
        keep = left.byte().argsort(dim=2, stable=True)[:, :, left.shape[2] - int(left.sum(2).max()) :]
        real = left.gather(2, keep)
        kept = slots.take(keep)
        self._slots = kept if bool(real.all()) else replace(kept, size=kept.sizes * real).compact
        self._target = take(self._targets(), keep)
        self.keys, self.values, self._room = _take(self.keys, keep), _take(self.values, keep), None
        self.notes = {name: take(x, keep) for name, x in self.notes.items()}

    def _part_notes(self) -> None:
        """Give every store its part of the notes; `notes` are those of entries in full precision from here on."""
        whole, start, self.notes = {name: pad(x, (0, self.held - x.shape[2])) for name, x in self.notes.items()}, 0, {}
        for store in self._in_order():
            stop = start + store.slots.index.shape[2]
            store.notes, start = {name: x[..., start:stop] for name, x in whole.items()}, stop
        self.notes = {name: x[..., start:] for name, x in whole.items()}

    def _join_notes(self) -> None:
        """Put the notes of all parts together again."""
        for name, own in self.notes.items():
            parts = [*(store.notes[name] for store in self._in_order()), own]
            groups = max(part.shape[1] for part in parts)
            self.notes[name] = torch.cat([part.expand(-1, groups, -1) for part in parts], 2)
        for store in self.stores.values():
            store.notes = {}

    def reduce(self, reduction: Reduction, prop_attn: bool = False) -> None:
        """Evict entries. One in few bits is hidden; its memory is free when all of its group are gone."""
        batch, slots = self.keys.shape[0], self.slots
        assert slots is not None
        if reduction.keep.shape[0] == batch:
            reduction = reduction.repeat(slots.index.shape[1])
        size = slots.sizes.expand(-1, reduction.keep.shape[0] // batch, -1).flatten(0, 1)
        if reduction.merges or bool((reduction.total(size) > size.gather(1, reduction.keep)).any()):
            raise NotImplementedError(
                "entries in few bits cannot be merged; put the method that merges before the one that quantises"
            )
        self._part_notes()
        wanted = (reduction.group >= 0).unflatten(0, (batch, -1))
        start = 0
        for bits in sorted(self.stores):
            store = self.stores[bits]
            stop = start + store.slots.index.shape[2]
            here, start = wanted[:, :, start:stop], stop
            both = max(here.shape[1], store.slots.index.shape[1])
            size = store.slots.sizes.expand(-1, both, -1) * here
            every = torch.arange(size.shape[2], device=size.device).expand(batch, both, -1)
            wider = store.slots.take(every)
            store.slots = replace(wider, size=size).compact
            store.compact()
        self.stores = {bits: store for bits, store in self.stores.items() if store.slots.index.shape[2]}
        exact = self.exact_slots
        both = max(wanted.shape[1], exact.index.shape[1])
        self._keep_exact((wanted[:, :, start:] & (exact.sizes > 0)).expand(-1, both, -1), exact)
        self._join_notes()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, not {tokens_to_remove}")
        n = self._exact + tokens_to_remove
        length = self.cumulative_length + tokens_to_remove
        if tokens_to_remove == 0:
            return
        gone = self.exact_slots.index[:, :, max(n, 0) :]
        if n < 0 or bool((gone < length).any()):
            raise ValueError(
                f"cannot take back {-tokens_to_remove} tokens: some are in few bits already; use a larger residual window"
            )
        self._part_notes()
        self._keep_first(n, self.exact_slots)
        self._join_notes()
        self._target = None if self._target is None else self._target[..., :n]
        self.cumulative_length, self._due = length, 0
        self.positions = None if self.positions is None else self.positions[:, :, :length]

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.held:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        self._slots, self._room = self.exact_slots.map(change), None
        self.notes = {name: change(x) for name, x in self.notes.items()}
        self._target = None if self._target is None else change(self._target)
        self.padding = None if self.padding is None else change(self.padding)
        if self.positions is not None:
            self.positions = change(self.positions.transpose(0, 1)).transpose(0, 1)
        if self.asked is not None:
            self.asked = change(self.asked[0]), change(self.asked[1])
        for store in self.stores.values():
            store.map(change)

    def reset(self) -> None:
        super().reset()
        self.stores, self.positions, self.asked, self._target, self._due = {}, None, None, None, 0

    @property
    def nbytes(self) -> int:
        if not self.held:
            return 0
        entries = self.keys.nbytes + self.values.nbytes if self._room is None else self._room.nbytes
        known = sum(x.nbytes for x in (self.positions, self._target, *(self.asked or ())) if x is not None)
        rest = sum(x.nbytes for x in self.notes.values()) + sum(store.nbytes for store in self.stores.values())
        return entries + self.exact_slots.nbytes + known + rest


def _take(x: Tensor, keep: Tensor) -> Tensor:
    """Entries `keep` (B, G, k) of x (B, H_kv, m, head_dim)."""
    keep = keep.repeat_interleave(x.shape[1] // keep.shape[1], 1)
    return x.gather(2, keep[..., None].expand(-1, -1, -1, x.shape[3]))
