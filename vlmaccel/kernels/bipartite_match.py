"""Bipartite soft matching: which tokens are most alike, and join.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmaccel.kernels.dispatch import gpu_form

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define("bipartite_match(Tensor metric, int r, int prefix) -> (Tensor keep, Tensor group)")

bipartite_match = torch.ops.vlmaccel.bipartite_match.default
"""bipartite_match(metric, r, prefix) -> (keep, group): merge the r most alike pairs of tokens.

Tokens at even places (A) look for their likest at odd places (B) by cosine, in float32; the r best matched join their
partner. Ties go to the lowest index, and a zero vector is like nothing (cosine 0).

metric: (B, N, d) float, what tokens are compared by. r: at most half of the tokens behind the prefix are merged,
whatever r says; 0 or less merges nothing. prefix: leading tokens that stay and take no part.
Returns keep: (B, n) int64, the token that each slot stands for, and group: (B, N) int64, the slot that each token joined.
Slots are the prefix, then the A tokens that are left, then all B tokens, so that the next matching pairs other tokens. The
A tokens keep their order where there is a prefix; without one they come by falling likeness, as in the official code.
"""


def merged(tokens: int, r: int, prefix: int) -> int:
    """How many of `tokens` tokens a call with this r merges away."""
    return max(0, min(r, (tokens - prefix) // 2))


def reference(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The same, token by token."""
    keeps, groups = [], []
    for x in metric.float():
        n, x = len(x), normalize(x, dim=-1, eps=1e-6)
        a, b = ([i for i in range(prefix, n) if i % 2 == odd] for odd in (0, 1))
        cosine = {i: [float(x[i] @ x[j]) for j in b] for i in a}
        order = sorted(a, key=lambda i: (-max(cosine[i]), i)) if b else a
        joins = {i: b[cosine[i].index(max(cosine[i]))] for i in order[: merged(n, r, prefix)]}
        left = [i for i in order if i not in joins]
        keep = [*range(prefix), *(sorted(left) if prefix or not joins else left), *b] if joins else [*range(n)]
        slot = {token: number for number, token in enumerate(keep)}
        keeps.append(torch.tensor(keep))
        groups.append(torch.tensor([slot[joins.get(i, i)] for i in range(n)]))
    return torch.stack(keeps), torch.stack(groups)


def match(
    metric: Tensor, r: int, prefix: int, likest: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What all forms share: `bipartite_match` with the search for pairs, which is nearly all of its work, left to `likest`.

    likest(metric, first_a, first_b): cosine (B, number of A) float32 and place among the B tokens, int64, of the likest B
    token of each A token. A tokens are every second one from first_a on, and so are B tokens from first_b on.
    """
    batch, n, _ = metric.shape
    index = torch.arange(n, device=metric.device)
    r = merged(n, r, prefix)
    if r == 0:
        return index.repeat(batch, 1), index.repeat(batch, 1)
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    best, partner = likest(metric, first_a, first_b)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    tokens = order * 2 + first_a
    source, left = tokens[:, :r], tokens[:, r:]
    left = left.sort().values if prefix else left
    keep = torch.cat([index[:prefix].expand(batch, -1), left, index[first_b::2].expand(batch, -1)], 1)
    group = metric.new_empty(batch, n, dtype=torch.long).scatter_(1, keep, index[: n - r].expand(batch, -1))
    joined = partner.gather(1, order[:, :r]) + (prefix + left.shape[1])
    return keep, group.scatter_(1, source, joined)


def _likest(metric: Tensor, first_a: int, first_b: int) -> tuple[Tensor, Tensor]:
    metric = metric.float()
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_(min=1e-6)
    # max gives the lowest index of equal values, as argmax does, and is several times as fast on CPUs
    return torch.bmm(unit[:, first_a::2], unit[:, first_b::2].mT).max(-1)


def _torch_form(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    return match(metric, r, prefix, _likest)


def _fake(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    batch, n, _ = metric.shape
    keep = metric.new_empty(batch, n - merged(n, r, prefix), dtype=torch.long)
    return keep, metric.new_empty(batch, n, dtype=torch.long)


_LIB.impl("bipartite_match", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("bipartite_match", gpu_form("bipartite_match", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::bipartite_match", _fake, lib=_LIB)
