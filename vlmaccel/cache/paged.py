"""PagedLayer: a cache layer that holds every entry and reads, at a decode step, the pages that matter to the query."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.cache.pruned import PrunedLayer
from vlmaccel.cache.slots import Slots
from vlmaccel.kernels.decode_attention import decode_attention
from vlmaccel.reduction import Reduction

Group = Literal["max", "union"]
FEWEST = 3  # pages that are read in any case


class PagedLayer(PrunedLayer):
    """Entries in pages of `page`, with the largest and the smallest value of every channel of a page's keys.

    Pages are counted from the first real entry of each sample (and KV head, where heads hold different entries), so that
    padding does not move them; fillers and padding lie before it and are read by nobody.
    budget: entries that a step reads, as a share of the real ones (float) or a number (int), rounded up to whole pages;
        at least `FEWEST` pages.
    group: how the query heads of a KV head agree. "max": pages are ranked by the highest bound of any of them. "union":
        each head names its own pages, and all read all of these, up to H / H_kv times the budget.
    exact: read the entries with the highest true logits, as many as a page table would; nothing is saved.
    """

    def __init__(self, page: int, budget: float | int, group: Group = "max", exact: bool = False) -> None:
        super().__init__()
        self.page, self.budget, self.group, self.exact = page, budget, group, exact
        self._ends: Tensor | None = None  # (B, H_kv, P, 2 * head_dim): largest, smallest; there may be space behind
        self._weight: Tensor | None = None  # (B, H_kv, p) float32, largest log size of each page where sizes count
        self._first: Tensor | None = None  # (B, G) int64, where the real entries begin; None if all are real
        self._lowest = 0  # the smallest of them
        self._stale = True
        self._announced = False

    @classmethod
    def of(
        cls,
        layer: PrunedLayer,
        padding: Tensor | None,
        *,
        page: int,
        budget: float | int,
        group: Group = "max",
        exact: bool = False,
    ) -> PagedLayer:
        """A layer that holds what `layer` holds (which is used up). padding: (B, N) bool of the whole sequence, or None."""
        new = cls(page, budget, group, exact)
        new.__dict__.update(vars(layer))
        new.build(padding)
        return new

    def build(self, padding: Tensor | None = None) -> None:
        """Make the pages anew. padding: (B, N) bool of the whole sequence, becomes fillers."""
        self._stale, self._ends, self._weight, self._first, self._lowest = False, None, None, None, 0
        slots = self.slots
        if slots is None:
            return
        if padding is not None:
            hidden = slots.padded(padding)
            if bool(hidden.any()):
                slots = replace(slots, size=slots.sizes.masked_fill(hidden, 0)).compact
                self._slots, self._room = slots, None
        filler = slots.sizes == 0
        if slots.size is not None and bool(filler.any()):
            if bool((filler[..., 1:] & ~filler[..., :-1]).any()):
                self._arrange((~filler).byte().argsort(dim=2, stable=True), slots)
            self._first = filler.sum(2)
            self._lowest = int(self._first.min())
        if not self.exact:
            self._measure()

    def _arrange(self, order: Tensor, slots: Slots) -> None:
        """Put the entries in the `order` (B, G, m)."""
        each = order.expand(-1, max(order.shape[1], self.keys.shape[1]), -1)
        self.keys, self.values = _rows(self.keys, each), _rows(self.values, each)
        self._slots, self._room = slots.take(order), None
        for name, x in self.notes.items():
            x = pad(x, (0, order.shape[2] - x.shape[2]))
            groups = max(x.shape[1], order.shape[1])
            self.notes[name] = x.expand(-1, groups, -1).gather(2, order.expand(-1, groups, -1))

    def _measure(self) -> None:
        """The ends of all pages."""
        pages = self._pages()
        token, there = self._tokens(torch.arange(pages, device=self.keys.device).expand(*self.keys.shape[:2], pages))
        keys = _rows(self.keys.detach(), token).unflatten(2, (pages, self.page))
        # a page that a sample will have one day has no key yet to widen; one of others holds its last key twice
        new, most = ~there[..., :: self.page, None], torch.finfo(keys.dtype).max
        self._ends = torch.cat([keys.amax(3).masked_fill(new, -most), keys.amin(3).masked_fill(new, most)], -1)
        slots = self.slots
        if slots is not None and slots.prop_attn:
            size = slots.sizes.clamp(min=1).expand(-1, self.keys.shape[1], -1).gather(2, token)
            self._weight = size.unflatten(2, (pages, self.page)).amax(3).float().log()

    def _pages(self) -> int:
        """Pages of the sample and head that has most."""
        return -(-(self.held - self._lowest) // self.page)

    def _tokens(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (B, H_kv, k * page) of `pages` (B, H_kv, k), and which of them there are."""
        token = pages[..., None] * self.page + torch.arange(self.page, device=pages.device)
        token = token if self._first is None else token + self._first[..., None, None]
        token = token.flatten(2)
        return token.clamp(max=self.held - 1), token < self.held

    @property
    def pages(self) -> tuple[Tensor, Tensor]:
        """Largest and smallest keys (B, H_kv, P, head_dim) of every page; of a page that a sample has not yet, nothing
        that could be read off."""
        self._current()
        assert self._ends is not None
        high, low = self._ends[:, :, : self._pages()].chunk(2, -1)
        return high, low

    def _current(self) -> None:
        if self._stale:
            self.build()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        announced, self._announced = self._announced, False
        if key_states.shape[-2] == 1 and not announced and self._skips:
            warnings.warn(
                "this decode step reads the whole KV cache: pages are chosen only in a model with "
                'attn_implementation="sdpa", an attention mask of (batch, length) and without gradients',
                stacklevel=2,
            )
        return super().update(key_states, value_states)

    def announce_attend(self, padding: Tensor | None) -> None:
        super().announce_attend(padding)
        self._announced = True

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        done = super()._append(key_states, value_states)
        if key_states.shape[-2] > 1 or self._ends is None:
            self._stale = self._stale or not self.exact
        elif not self._stale:
            self._note(key_states[:, :, 0].detach())
        return done

    @torch.no_grad()
    def _note(self, key: Tensor) -> None:
        """Widen the last page by the newest key (B, H_kv, head_dim)."""
        assert self._ends is not None
        if self._ends.is_inference() and not torch.is_inference_mode_enabled():
            self._ends = self._ends.clone()
        if self._pages() > (had := self._ends.shape[2]):
            space = key.new_full((*key.shape[:2], max(1, had // self.page), key.shape[2]), torch.finfo(key.dtype).max)
            self._ends = torch.cat([self._ends, torch.cat([-space, space], -1)], 2)
        dim, last = key.shape[2], self._last()
        if isinstance(last, int):
            end = self._ends[:, :, last]
            torch.maximum(end[..., :dim], key, out=end[..., :dim])
            torch.minimum(end[..., dim:], key, out=end[..., dim:])
        else:
            at = last[..., None, None].expand(*key.shape[:2], 1, 2 * dim)
            high, low = self._ends.gather(2, at)[:, :, 0].chunk(2, -1)
            end = torch.cat([torch.maximum(high, key), torch.minimum(low, key)], -1)
            self._ends.scatter_(2, at, end[:, :, None])

    def _last(self) -> int | Tensor:
        """The page of the newest entry: (B, G), or one for all."""
        newest = self.held - 1
        return (newest if self._first is None else newest - self._first) // self.page

    def _wanted(self, entries: int) -> int:
        """Pages that are read of so many entries."""
        share = entries * self.budget - 1e-6 if isinstance(self.budget, float) else self.budget
        return max(FEWEST, math.ceil(share / self.page))

    def _wanted_each(self) -> Tensor | None:
        """(B, G, 1), pages that are read of each sample; None if it is the same for all."""
        if self._first is None or isinstance(self.budget, int):
            return None
        share = (self.held - self._first).double() * self.budget - 1e-6
        return (share / self.page).ceil().clamp(min=FEWEST)[..., None]

    @property
    def _skips(self) -> bool:
        """Whether some entry need not be read."""
        if not self.held:
            return False
        self._current()
        most = self.held - self._lowest
        return self._wanted(most) * (self.page if self.exact else 1) < (most if self.exact else self._pages())

    @property
    def reduced(self) -> bool:
        """Whether entries are fewer than tokens seen, or not all are read."""
        return super().reduced or self._skips

    @property
    def transient(self) -> int:
        """Bytes of the pages that `attend` gathers; with group "union" those of one query head, of which it may read more."""
        if not self._skips:
            return 0
        per_entry = (self.keys.nbytes + self.values.nbytes) // self.held
        return self._wanted(self.held - self._lowest) * self.page * per_entry

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Attention (B, H, 1, head_dim) of the newest token over the entries chosen for it."""
        if not self._skips:
            return super().attend(query, scale)
        token, seen = self.choose(query, scale)
        bias = self._room.bias if self._room is not None else self._whole_bias()
        keys, values = (self.keys, self.values) if self._room is None else (self._room.keys, self._room.values)
        hidden = torch.zeros(token.shape, device=token.device).masked_fill(~seen, -torch.inf)
        if bias is not None:
            hidden = hidden + bias.expand(-1, token.shape[1], -1).gather(2, token)
        return decode_attention(query, _rows(keys, token), _rows(values, token), hidden, scale)

    def choose(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Slots (B, H_kv, k) int64 that a query (B, H, 1, head_dim) reads, and which of them count (B, H_kv, k) bool."""
        self._current()
        most, each = self._wanted(self.held - self._lowest), self._wanted_each()
        if self.exact:
            each = None if each is None else each * self.page
            return self._best(self._logits(query, scale), most * self.page, each)
        score = self.bounds(query, scale)
        number = torch.arange(score.shape[3], device=score.device)
        last = self._last()
        last = last if isinstance(last, int) else last[..., None, None]
        score = score.masked_fill(number > last, -torch.inf).masked_fill(number == last, torch.inf)
        pages, counts = self._best(score, most, each)
        token, seen = self._tokens(pages)
        return token, seen & counts.repeat_interleave(self.page, 2)

    def bounds(self, query: Tensor, scale: float) -> Tensor:
        """(B, H_kv, H / H_kv, P) float32, what no logit of a page exceeds: sum over channels of max(q high, q low)."""
        self._current()
        assert self._ends is not None
        ends = self._ends[:, :, : self._pages()]
        grouped = query.reshape(*ends.shape[:2], -1, query.shape[3])
        bound = (torch.cat([grouped.clamp(min=0), grouped.clamp(max=0)], -1) @ ends.mT).float() * scale
        if self._weight is None:
            return bound
        return bound + pad(self._weight, (0, bound.shape[3] - self._weight.shape[2]))[:, :, None]

    def _logits(self, query: Tensor, scale: float) -> Tensor:
        """(B, H_kv, H / H_kv, m) float32, with what sizes and fillers add."""
        grouped = query.reshape(query.shape[0], self.keys.shape[1], -1, query.shape[3])
        logits = (grouped @ self.keys.mT).float() * scale
        bias = self._whole_bias()
        return logits if bias is None else logits + bias[:, :, None]

    def _best(self, score: Tensor, most: int, each: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best of score (B, H_kv, H / H_kv, U) for every KV head: (B, H_kv, k) int64, and which of them count. Ties
        go to the first."""
        if self.group == "max":
            score = score.amax(2, keepdim=True)
        best = score.argsort(dim=3, descending=True, stable=True)[..., :most]
        counts = score.gather(3, best) > -torch.inf
        if each is not None:
            counts &= torch.arange(best.shape[3], device=best.device) < each[..., None]
        if self.group == "max":
            return best[:, :, 0], counts[:, :, 0]
        union = torch.zeros_like(score, dtype=torch.bool).scatter(3, best, counts).any(2)
        most = min(most * score.shape[2], score.shape[3])
        best = union.byte().argsort(dim=2, descending=True, stable=True)[..., :most]
        return best, union.gather(2, best)

    def _reduce_slots(self, slots: Slots, reduction: Reduction, size: Tensor, prop_attn: bool) -> None:
        super()._reduce_slots(slots, reduction, size, prop_attn)
        self._stale = True

    def _keep_first(self, n: int, slots: Slots) -> None:
        super()._keep_first(n, slots)
        self._stale = True

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map(change)
        self._ends, self._weight, self._first = (
            None if x is None else change(x) for x in (self._ends, self._weight, self._first)
        )
        self._lowest = 0 if self._first is None else int(self._first.min())

    def reset(self) -> None:
        super().reset()
        self._ends = self._weight = self._first = None
        self._stale, self._announced, self._lowest = True, False, 0

    @property
    def nbytes(self) -> int:
        """Bytes held, those of the page table included."""
        self._current()
        return super().nbytes + sum(x.nbytes for x in (self._ends, self._weight, self._first) if x is not None)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Entries `index` (B, H, k) of x (B, H, m, head_dim), whole rows at a time."""
    batch, heads, m, dim = x.shape
    start = m * torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    return x.reshape(-1, dim).index_select(0, (index + start).flatten()).view(*index.shape, dim)
