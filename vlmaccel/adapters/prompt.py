"""Which tokens are padding, and where the prompt ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmaccel.run import Modality, TokenMap


def mark_padding(tokens: TokenMap, mask: Any) -> TokenMap:
    """The map with padding marked where the 2-D attention `mask` (B, past + N) is 0; other masks tell nothing of it."""
    n = tokens.modality.shape[1]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < n:
        return tokens
    padding = (mask[:, -n:] == 0).to(tokens.modality.device)
    return TokenMap(tokens.modality.masked_fill(padding, int(Modality.PAD)), tokens.image, tokens.grid)


def prompt_end(tokens: TokenMap, labels: Any, logits_to_keep: Any) -> Tensor:
    """(B, Q) int64, the rows whose attention ranks the tokens; -1 where a sample has fewer than Q.

    In generation, the last prompt token: the first row whose logits are asked for, so that candidates of assisted
    decoding behind it do not count. In training, every token just before an answer (label -100, then another), as
    PyramidDrop's code does (arXiv 2410.17247).
    """
    batch, n = tokens.modality.shape
    if isinstance(labels, Tensor) and labels.shape == (batch, n):
        starts = (labels[:, :-1] == -100) & (labels[:, 1:] != -100)
        count = int(starts.sum(1).max())
        if count and bool(starts.any(1).all()):
            index = (~starts).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
            return index.masked_fill(~starts.gather(1, index), -1)
    end = n - logits_to_keep if isinstance(logits_to_keep, int) and 0 < logits_to_keep <= n else n - 1
    real = (tokens.modality != Modality.PAD) & (torch.arange(n, device=tokens.modality.device) <= end)
    place = torch.arange(1, n + 1, device=tokens.modality.device) * real
    return (place.amax(1, keepdim=True) - 1).clamp(min=0)
