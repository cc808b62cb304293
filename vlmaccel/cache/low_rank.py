"""LowRankLayer: a cache layer whose keys, values or both are coordinates in a basis of fewer dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.cache.pruned import ROOM, PrunedLayer
from vlmaccel.cache.slots import Slots
from vlmaccel.reduction import Reduction

BLOCK = 16  # entries that leave the window of exact ones together
FLOOR = 1e-2  # of a metric's mean eigenvalue, added to all: directions that no observed row used still count a little


@dataclass(eq=False)
class Factor:
    """x ~ latent out^T with latent = x into, one basis for each sample and KV head.

    latent: (B, H_kv, n, r). into, out: (B, H_kv, head_dim, r), out^T into = 1; one orthonormal tensor unless the error is
    measured in a metric.
    """

    latent: Tensor
    into: Tensor
    out: Tensor

    @classmethod
    def fit(cls, x: Tensor, real: Tensor, rank: int, metric: Tensor | None = None) -> Factor:
        """The factor of this rank with the least error.

        x: (B, H_kv, n, head_dim). real: (B, 1 or H_kv, n) bool, entries whose error counts. metric: (B or 1, H_kv, d, d)
        symmetric; the error e of an entry is measured as e metric e^T, e e^T if it is None (Eckart-Young).
        """
        rows = x.float().masked_fill(~real[..., None], 0)
        gram = (rows.mT @ rows).double()
        if metric is None:
            into = out = torch.linalg.eigh(gram).eigenvectors[..., -rank:].to(x.dtype).contiguous()
        else:
            value, vector = torch.linalg.eigh(metric.double())
            value = value.clamp(min=0)
            mean = value.mean(-1, keepdim=True)
            # its size does not matter: brought to 1, where half precision is at home
            value = torch.where(mean > 0, value / mean, 1) + FLOOR
            half = (vector * value.sqrt()[..., None, :]) @ vector.mT
            back = (vector * value.rsqrt()[..., None, :]) @ vector.mT
            best = torch.linalg.eigh(half @ gram @ half).eigenvectors[..., -rank:]
            into, out = ((m @ best).to(x.dtype).contiguous() for m in (half, back))
        return cls(_product(x, into), into, out)

    def append(self, x: Tensor) -> None:
        """Add entries x (B, H_kv, n, head_dim) in the basis there is."""
        self.latent = torch.cat([self.latent, _product(x, self.into)], 2)

    def dense(self) -> Tensor:
        """(B, H_kv, n, head_dim)"""
        return self.latent @ self.out.mT

    def map(self, change: Callable[[Tensor], Tensor]) -> Factor:
        """The same with `change` applied along the batch."""
        into = change(self.into)
        return Factor(change(self.latent), into, into if self.out is self.into else change(self.out))

    @property
    def nbytes(self) -> int:
        return self.latent.nbytes + self.into.nbytes + (0 if self.out is self.into else self.out.nbytes)


class LowRankLayer(PrunedLayer):
    """Entries of the prompt as coordinates, newer ones in full: `keys` and `values` hold what is in full, all of it where
    there is no factor.

    Attention works in the coordinates: logits (q out_k) latent_k^T, output (a latent_v) out_v^T, one softmax with the entries
    in full. window: so many newest tokens of those after the prompt stay in full; older ones are put into coordinates,
    `BLOCK` at a time, in the basis there is.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.factors: dict[str, Factor] = {}
        self.gain = 1.0  # on the logits of keys in coordinates
        self._space: dict[str, Tensor] = {}  # what `keys` or `values` are the beginning of, to append without a copy
        self._hidden: tuple[Slots | None, Tensor | None] | None = None
        self._attending = False

    @classmethod
    def of(cls, layer: PrunedLayer, window: int) -> LowRankLayer:
        """A layer that holds what `layer` holds (which is used up), in full so far."""
        new = cls(window)
        new.__dict__.update(vars(layer))
        return new

    def fit(
        self,
        rank_keys: int | None,
        rank_values: int | None,
        real: Tensor,
        behind: int = 0,
        metrics: tuple[Tensor, Tensor] | None = None,
        gain: float = 1.0,
    ) -> None:
        """Put all entries into coordinates, in bases that fit them best.

        Entries that are in coordinates already count as what they have become. rank_keys, rank_values: None leaves them in full.
        real: (B, 1 or H_kv, m) bool, entries whose error counts. behind: so many last ones stay in full.
        metrics: of keys and values, see `Factor.fit`. gain: on the logits of keys in coordinates.
        """
        self.gain = 1.0
        whole = self.dense()
        n = self.held - behind
        self._forget()
        self.factors, self._room = {}, None
        key_metric, value_metric = (None, None) if metrics is None else metrics
        for name, x, rank, metric in (
            ("keys", whole[0], rank_keys, key_metric),
            ("values", whole[1], rank_values, value_metric),
        ):
            if rank is not None:
                self.factors[name] = Factor.fit(x[:, :, :n], real[..., :n], rank, metric)
                x = x[:, :, n:].clone()
            setattr(self, name, x.contiguous())
        self.gain = gain

    @property
    def _coded(self) -> int:
        """Entries that are in coordinates."""
        return max((factor.latent.shape[2] for factor in self.factors.values()), default=0)

    @property
    def held(self) -> int:
        if not self.factors:
            return super().held
        name, factor = next(iter(self.factors.items()))
        return factor.latent.shape[2] + getattr(self, name).shape[2]

    @property
    def reduced(self) -> bool:
        """Whether entries are fewer than tokens seen, or not in full."""
        return bool(self.factors) or super().reduced

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, H_kv, n, head_dim) keys and values; gives all entries, but only these new ones if `attend` follows."""
        attending, self._attending = self._attending, False
        self._count(key_states.shape[-2])
        whole = self._append(key_states, value_states)
        if attending:
            return key_states, value_states
        return self.dense() if self.factors else whole

    def announce_attend(self, padding: Tensor | None) -> None:
        super().announce_attend(padding)
        self._attending = True

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.factors:
            return super()._append(key_states, value_states)
        self._settle()
        self.keys, self.values = self._grown("keys", key_states), self._grown("values", value_states)
        return self.keys, self.values

    def _settle(self) -> None:
        """Put into coordinates what has left the window."""
        over = self.held - self._coded - self.window
        if over < BLOCK:
            return
        n = over // BLOCK * BLOCK
        for name, factor in self.factors.items():
            x = getattr(self, name)
            factor.append(x[:, :, :n])
            setattr(self, name, x[:, :, n:].clone())
            self._space.pop(name, None)

    def _grown(self, name: str, new: Tensor) -> Tensor:
        """`keys` or `values` with `new` behind them, written into the space there where it can be."""
        x, space = getattr(self, name), self._space.get(name)
        if torch.is_grad_enabled():
            self._space.pop(name, None)
            return torch.cat([x, new], 2)
        m = x.shape[2]
        end = m + new.shape[2]
        if space is None or not _begins(space, x) or end > space.shape[2]:
            more = new.shape[2] + max(ROOM, end // ROOM)
            space = torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], 2)
            self._space[name] = space
        space[:, :, m:end] = new
        return space[:, :, :end]

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Attention (B, H, 1, head_dim) of the newest token over all entries, right after its `update`."""
        if not self.factors:
            return super().attend(query, scale)
        grouped = query.reshape(query.shape[0], self.keys.shape[1], -1, query.shape[3])
        keys, values = self.factors.get("keys"), self.factors.get("values")
        # products with all of the space: kernels for half precision copy what is not contiguous
        logits = (grouped @ self._spacious("keys").mT)[..., : self.keys.shape[2]]
        if keys is not None:
            logits = torch.cat([(grouped @ keys.out) @ keys.latent.mT * self.gain, logits], 3)
        logits = logits.float() * scale
        bias = self._whole_bias()
        if bias is not None:
            logits = logits + bias[:, :, None]
        share = logits.softmax(-1).to(self.values.dtype)
        n = 0 if values is None else values.latent.shape[2]
        spacious = self._spacious("values")
        out = pad(share[..., n:], (0, n + spacious.shape[2] - share.shape[3])) @ spacious
        if values is not None:
            out = out + (share[..., :n] @ values.latent) @ values.out.mT
        return out.reshape(query.shape)

    def _spacious(self, name: str) -> Tensor:
        """`keys` or `values` with the space behind them."""
        return self._space.get(name, getattr(self, name))

    def _whole_bias(self) -> Tensor | None:
        """As in `PrunedLayer`, worked out once for the slots that are written out."""
        if self._hidden is None or self._hidden[0] is not self._slots:
            self._hidden = self._slots, self._bias(self._slots)
        known = self._hidden[1]
        return None if known is None else pad(known, (0, self.held - known.shape[2]))

    def dense(self) -> tuple[Tensor, Tensor]:
        """(B, H_kv, m, head_dim) keys and values of every entry: a copy of those that are in coordinates."""
        keys, values = self.keys, self.values
        if (factor := self.factors.get("keys")) is not None:
            keys = torch.cat([factor.dense() * self.gain, keys], 2)
        if (factor := self.factors.get("values")) is not None:
            values = torch.cat([factor.dense(), values], 2)
        return keys, values

    def reduce(self, reduction: Reduction, prop_attn: bool = False) -> None:
        """Evict entries, in coordinates or in full. See `PrunedLayer.reduce`."""
        slots = self.slots
        if not self.factors or slots is None:
            super().reduce(reduction, prop_attn)
            return
        if reduction.merges:
            raise NotImplementedError(
                "entries of reduced rank cannot be merged, only evicted: name the method that merges before the one that "
                "reduces the rank"
            )
        batch, kv_heads = self.keys.shape[:2]
        if reduction.keep.shape[0] == batch:
            reduction = reduction.repeat(slots.index.shape[1])
        groups = reduction.keep.shape[0] // batch
        coded = self._coded
        first, second = (Reduction.select(x) for x in (reduction.group >= 0).split([coded, self.held - coded], 1))
        whole = _joined(first, second, coded)

        def shrink(x: Tensor, by: Reduction) -> Tensor:
            return by.repeat(kv_heads // groups).apply(x.flatten(0, 1)).unflatten(0, (batch, kv_heads))

        for name in ("keys", "values"):
            x, factor = getattr(self, name), self.factors.get(name)
            if factor is not None:
                factor.latent = shrink(factor.latent, first)
            setattr(self, name, shrink(x, whole if factor is None else second))
        size = slots.sizes.expand(-1, groups, -1).flatten(0, 1)
        self._forget()
        self._reduce_slots(slots, whole, size, prop_attn)

    def _keep_first(self, n: int, slots: Slots) -> None:
        if n < self._coded:
            raise ValueError(
                f"cannot take tokens back: of the {slots.index.shape[2]} entries only the last "
                f"{slots.index.shape[2] - self._coded} are held in full, and they would have to leave {n}; "
                "use a larger window"
            )
        whole = {name: getattr(self, name)[:, :, : n - self._coded] for name in self.factors}
        super()._keep_first(n, slots)
        for name, x in whole.items():
            setattr(self, name, x)
        self._forget()

    def _forget(self) -> None:
        self._space, self._hidden = {}, None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map(change)
        self._forget()
        self.factors = {name: factor.map(change) for name, factor in self.factors.items()}

    def reset(self) -> None:
        super().reset()
        self._forget()
        self.factors, self.gain, self._attending = {}, 1.0, False

    @property
    def nbytes(self) -> int:
        """Bytes held: coordinates, bases, entries in full and space for more, notes, and what tells which tokens they are."""
        if not self.factors or not self.held:
            return super().nbytes
        slots, bias = self.slots, None if self._hidden is None else self._hidden[1]
        assert slots is not None
        full = sum(self._spacious(name).nbytes for name in ("keys", "values"))
        coded = sum(factor.nbytes for factor in self.factors.values())
        rest = slots.nbytes + sum(x.nbytes for x in self.notes.values())
        return full + coded + rest + (0 if bias is None else bias.nbytes)


def _product(x: Tensor, into: Tensor) -> Tensor:
    return (x.float() @ into.float()).to(x.dtype)


def _begins(space: Tensor, x: Tensor) -> bool:
    """Whether x is the beginning of `space`, and it may be written to."""
    mine = torch.is_inference_mode_enabled() or not space.is_inference()
    return mine and x.data_ptr() == space.data_ptr() and x.stride() == space.stride()


def _joined(first: Reduction, second: Reduction, n: int) -> Reduction:
    """The selection of `first` among the first n entries followed by that of `second` among the others."""
    behind = first.keep.shape[1]
    group = torch.where(second.group < 0, -1, second.group + behind)
    return Reduction(
        torch.cat([first.keep, second.keep + n], 1),
        torch.cat([first.group, group], 1),
        torch.cat([first.size, second.size], 1),
    )
