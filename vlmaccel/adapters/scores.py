"""Attention scores of a decoder layer for the methods that rank tokens by them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmaccel.adapters.masks import causal_mask, per_head
from vlmaccel.adapters.view import View
from vlmaccel.adapters.watched_attention import WatchedAttention
from vlmaccel.cache import KeyBias, PrunedLayer
from vlmaccel.kernels.attention_rows import a_few_at_a_time, attention_rows
from vlmaccel.kernels.score_rows import score_rows
from vlmaccel.reduction import gather
from vlmaccel.run import Run


def projected(attention: Any, which: str, x: Tensor) -> Tensor:
    """(B, H, n, head_dim) queries ("q") or keys ("k") of x (B, n, D), projected and normed."""
    states = getattr(attention, f"{which}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    return (states if norm is None else norm(states)).transpose(1, 2)


def rotated(attention: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Projected states with their rotary positions, as the model puts them in."""
    if not getattr(attention, "use_rope", True):  # some layers of SmolLM3 have no positions
        return states
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(states, states[:, :1], cos, sin)[0]


class LayerScores:
    """Rows of the softmax attention of one layer, from its own projections, norms, rotary embedding and mask.

    attention: the layer's attention module. normed: (B, n, D), what it is given. view: what the layer sees.
    past: tokens before these. keys: (B, H_kv, m, head_dim) of all tokens where the cache has them already. watched: the layer's
    attention where it has run.
    """

    def __init__(
        self,
        attention: Any,
        normed: Tensor,
        view: View,
        past: int,
        keys: Tensor | None = None,
        watched: WatchedAttention | None = None,
    ) -> None:
        self._attention, self._normed, self._view, self._past, self._keys = attention, normed, view, past, keys
        self._query, self._lse = (None, None) if watched is None else (watched.query, watched.lse)
        self._unrotated: Tensor | None = None

    @torch.no_grad()
    def rows(self, rows: Tensor) -> Tensor:
        """See `vlmaccel.hooks.Scores.rows`."""
        rows = rows.to(self._normed.device)
        query = self._rotated("q", rows)
        mask = self._mask_rows(rows, query.shape[1])
        return attention_rows(query, self._all_keys(), mask, self._attention.scaling)[..., -self._normed.shape[1] :]

    @torch.no_grad()
    def received(self, counts: Tensor) -> Tensor:
        """See `vlmaccel.hooks.Scores.received`."""
        view, counts = self._view, counts.to(self._normed.device)
        n = counts.shape[1]
        if view.mask is None and view.columns.index.shape[2] == n:  # causal attention, and that alone
            row, scale = view.rows.masked_fill(~counts, -1), self._attention.scaling
            query = self._rotated("q", None) if self._query is None else self._query
            key, index = self._all_keys(), view.rows[:, None]
            return score_rows(query, key, row, index, None, scale, 0, "sum", self._lse).mean(1)
        total = torch.zeros(counts.shape, device=counts.device)
        for rows in a_few_at_a_time(torch.arange(n, device=counts.device).expand(len(counts), -1), n):
            total += (self.rows(rows).mean(1) * counts.gather(1, rows)[..., None]).sum(1)
        return total

    @torch.no_grad()
    def keys(self) -> Tensor:
        """See `vlmaccel.hooks.Scores.keys`."""
        if self._unrotated is None:
            self._unrotated = projected(self._attention, "k", self._normed)
        return self._unrotated

    @torch.no_grad()
    def turned(self, rows: Tensor) -> Tensor:
        """See `vlmaccel.hooks.Scores.turned`."""
        turns = torch.cat([self._view.cos, self._view.sin], -1).float()
        turns = turns / turns.norm(dim=-1, keepdim=True)
        return gather(turns, rows.to(turns.device)) @ turns.mT

    def _all_keys(self) -> Tensor:
        if self._keys is None:
            new, past = self._rotated("k", None), self._view.past_keys
            self._keys = new if past is None else torch.cat([past, new], 2)
        return self._keys

    def _rotated(self, which: str, rows: Tensor | None) -> Tensor:
        """(B, H, n, head_dim) projected states of some rows, in the models' order: projection, norm, rotation."""
        x, cos, sin = (t if rows is None else gather(t, rows) for t in (self._normed, self._view.cos, self._view.sin))
        states = projected(self._attention, which, x)
        return rotated(self._attention, states, cos, sin)

    def _mask_rows(self, rows: Tensor, heads: int) -> Tensor:
        """(B, 1 or H, Q, m), true or additive where a row may attend."""
        view = self._view
        if view.mask is not None and view.mask.ndim == 4:
            return gather(view.mask, rows, 2)
        index = per_head(view.columns.index, heads)
        causal = causal_mask(gather(view.rows, rows), index, self._past, view.window)
        earlier = index.shape[2] - view.rows.shape[1]
        place = torch.arange(index.shape[2], device=rows.device)
        causal &= place <= (rows + earlier)[:, None, :, None]  # of rows with one index, a later one is not seen
        return causal if view.mask is None else causal & (view.mask > 0)[:, None, None, :]


class CacheScores:
    """Rows of the softmax attention of one layer over its cache entries: `vlmaccel.hooks.EntryScores`.

    layer: the decoder layer. hidden: (B, n, D), its input. embedding: cos and sin of these rows. entries: gives its cache
    layer as it is at the moment, the new tokens in it. rotary: what makes cos and sin.
    """

    def __init__(
        self, layer: Any, run: Run, hidden: Tensor, embedding: Any, entries: Callable[[], PrunedLayer], rotary: Any
    ) -> None:
        self._layer, self._attention, self._rotary = layer, layer.self_attn, rotary
        self._run, self._hidden, self._embedding, self._entries = run, hidden, embedding, entries

    @torch.no_grad()
    def queries(self, rows: Tensor) -> Tensor:
        """See `vlmaccel.hooks.EntryScores.queries`."""
        rows = rows.to(self._hidden.device)
        hidden, cos, sin = (gather(x, rows) for x in (self._hidden, *self._embedding))
        return rotated(self._attention, projected(self._attention, "q", self._layer.input_layernorm(hidden)), cos, sin)

    @torch.no_grad()
    def rows(self, rows: Tensor) -> Tensor:
        """See `vlmaccel.hooks.EntryScores.rows`."""
        rows = rows.to(self._hidden.device)
        query, entries, run = self.queries(rows), self._entries(), self._run
        slots = entries.slots
        assert slots is not None
        heads = query.shape[1]
        mask = causal_mask(self._logical(rows), per_head(slots.index, heads), run.past, _window(entries))
        bias = slots.bias(run.padding)
        if bias is not None:
            mask = torch.where(mask, per_head(bias, heads)[:, :, None], -torch.inf)
        return attention_rows(query, entries.dense()[0], mask, self._attention.scaling)

    @torch.no_grad()
    def received(self, rows: Tensor, counts: Tensor, reduce: str) -> Tensor:
        """See `vlmaccel.hooks.EntryScores.received`."""
        rows = rows.to(self._hidden.device)
        query, entries, run = self.queries(rows), self._entries(), self._run
        slots = entries.slots
        assert slots is not None
        row = (self._logical(rows) + run.past).masked_fill(~counts.to(rows.device), -1)
        return score_rows(
            query,
            entries.dense()[0],
            row,
            slots.index,
            slots.bias(run.padding),
            self._attention.scaling,
            _window(entries) or 0,
            reduce,
        )

    def _logical(self, rows: Tensor) -> Tensor:
        """(B, Q) which of the new tokens rows are."""
        return rows if self._run.index is None else self._run.index.to(rows.device).gather(1, rows)

    @torch.no_grad()
    def output(self) -> Tensor:
        """See `vlmaccel.hooks.EntryScores.output`."""
        weight = self._attention.o_proj.weight
        return weight.mT.unflatten(0, (-1, self._attention.head_dim))

    def key_bias(self) -> KeyBias | None:
        """See `vlmaccel.hooks.EntryScores.key_bias`."""
        bias = getattr(self._attention.k_proj, "bias", None)
        if bias is None or hasattr(self._attention, "k_norm") or not getattr(self._attention, "use_rope", True):
            return None
        rotate = sys.modules[type(self._attention).__module__].apply_rotary_pos_emb
        return KeyBias(bias.unflatten(0, (-1, self._attention.head_dim)), self._rotary, rotate)


def _window(entries: PrunedLayer) -> int | None:
    return getattr(entries, "sliding_window", None)
