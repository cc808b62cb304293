"""Attention scores of a decoder layer for the methods that rank tokens by them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vlmaccel.adapters.masks import causal_mask, per_head
from vlmaccel.adapters.view import View
from vlmaccel.kernels.score_rows import score_rows
from vlmaccel.reduction import gather


class LayerScores:
    """Rows of the softmax attention of one layer, from its own projections, norms, rotary embedding and mask.

    attention: the layer's attention module. normed: (B, n, D), what it is given. view: what the layer sees.
    past: tokens before these. keys: (B, H_kv, m, head_dim) of all tokens where the cache has them already.
    """

    def __init__(self, attention: Any, normed: Tensor, view: View, past: int, keys: Tensor | None = None) -> None:
        self._attention, self._normed, self._view, self._past, self._keys = attention, normed, view, past, keys
        self._unrotated: Tensor | None = None

    @torch.no_grad()
    def rows(self, rows: Tensor) -> Tensor:
        """See `vlmaccel.hooks.Scores.rows`."""
        rows = rows.to(self._normed.device)
        if self._keys is None:
            new, past = self._rotated(self._attention.k_proj, "k_norm", None), self._view.past_keys
            self._keys = new if past is None else torch.cat([past, new], 2)
        query = self._rotated(self._attention.q_proj, "q_norm", rows)
        mask = self._mask_rows(rows, query.shape[1])
        return score_rows(query, self._keys, mask, self._attention.scaling)[..., -self._normed.shape[1] :]

    @torch.no_grad()
    def keys(self) -> Tensor:
        """See `vlmaccel.hooks.Scores.keys`."""
        if self._unrotated is None:
            self._unrotated = self._projected(self._attention.k_proj, "k_norm", self._normed)
        return self._unrotated

    def _projected(self, project: nn.Module, norm: str, x: Tensor) -> Tensor:
        """(B, H, n, head_dim) projected and normed states."""
        states = project(x).unflatten(-1, (-1, self._attention.head_dim))
        if hasattr(self._attention, norm):
            states = getattr(self._attention, norm)(states)
        return states.transpose(1, 2)

    def _rotated(self, project: nn.Module, norm: str, rows: Tensor | None) -> Tensor:
        """(B, H, n, head_dim) projected states of some rows, in the models' order: projection, norm, rotation."""
        x, cos, sin = (t if rows is None else gather(t, rows) for t in (self._normed, self._view.cos, self._view.sin))
        states = self._projected(project, norm, x)
        if not getattr(self._attention, "use_rope", True):  # some layers of SmolLM3 have no positions
            return states
        rotate = sys.modules[type(self._attention).__module__].apply_rotary_pos_emb
        return rotate(states, states[:, :1], cos, sin)[0]

    def _mask_rows(self, rows: Tensor, heads: int) -> Tensor:
        """(B, 1 or H, Q, m), true or additive where a row may attend."""
        view = self._view
        if view.mask is not None and view.mask.ndim == 4:
            return gather(view.mask, rows, 2)
        index = per_head(view.columns.index, heads)
        causal = causal_mask(gather(view.rows, rows), index, self._past, view.window)
        return causal if view.mask is None else causal & (view.mask > 0)[:, None, None, :]
