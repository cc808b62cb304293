"""Hessian-aware eviction: forget the entries whose removal together changes the observed outputs least.

No paper's method: the loss is half the squared change of the attention outputs of a few observed rows. With one switch
for every entry its gradient is zero while all are on and its Gauss-Newton Hessian is known in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmaccel.hooks import CacheEntries
from vlmaccel.methods.eviction import Eviction, Rows, check_count, check_finite, first_and_last, observed_rows
from vlmaccel.methods.selection import check_choice
from vlmaccel.methods.sensitivity import head_outputs, inner

Mode = Literal["greedy", "diagonal"]


@dataclass(frozen=True)
class HessianEviction(Eviction):
    """H_st = sum over observed rows i of <D_is, D_it> / ||y_i||^2, where D_it = sum over the query heads of a KV head of
    a_it (o_i - v_t) W_O, with a the attention, o the heads' outputs and y the layer's.

    "diagonal" keeps the largest H_tt. "greedy" removes what adds least to the change of the outputs with all that has gone
    before, which is exact: sum over heads of (sum of a_it (o_i - v_t) W_O) / (1 - sum of a_it), up to the projection. Acts
    layer by layer: the peak of the prefill falls too.
    mode: default "diagonal", which is better on the shipped model (greedy has less error on the rows that it observes). rows, window: see `Observed`; the last `window` tokens stay. For "greedy" only:
    dims: outputs are compared in so many directions, the largest principal ones of the heads' W_O; default 32.
    step: share of what may still go that goes in one round, default 0.05, one entry at least.
    preselect: before the first round the diagonal removes what is beyond this many budgets, default 4.
    budget, sinks, recent: see `Eviction`.
    """

    name = "hessian"

    rows: Rows = "last"
    window: int = 32
    mode: Mode = "diagonal"
    dims: int = 32
    step: float = 0.05
    preselect: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, get_args(Rows))
        check_choice("mode", self.mode, get_args(Mode))
        check_count("window", self.window, 1)
        check_count("dims", self.dims, 1)
        if not 0 < self.step <= 1:
            raise ValueError(f"step is a share, more than 0 and at most 1, not {self.step!r}")
        if not self.preselect >= 1:
            raise ValueError(f"preselect is a number of budgets, 1 or more, not {self.preselect!r}")

    def protected(self, at: CacheEntries) -> Tensor:
        return first_and_last(at, self.sinks, max(self.recent, self.window))

    def score(self, at: CacheEntries) -> Tensor:
        assert at.scores is not None
        rows, counts = observed_rows(at, self.rows, self.window)
        values = at.entries.dense()[1].float()
        attention = at.scores.rows(rows).unflatten(1, (values.shape[1], -1))
        weight = at.scores.output().to(values.device).float().unflatten(0, (values.shape[1], -1))
        outputs = head_outputs(attention, values)
        row = counts.to(values.device) / output_norm(outputs, weight).clamp(min=torch.finfo(torch.float).tiny)
        score = diagonal(attention, outputs, values, weight, row)
        if self.mode == "diagonal":
            return score
        check_finite(self, at, score)  # rounds are finite whatever the score is
        prompt, budget = at.prompt.expand_as(score), self.layer_budget(at)
        budget = (budget[:, None] if budget.ndim == 1 else budget).expand(score.shape[:2])
        free = prompt & ~self.protected(at)
        number = torch.minimum(prompt.sum(2) - budget, free.sum(2)).clamp(min=0)
        early = (prompt.sum(2) - (budget * self.preselect).long()).clamp(min=0).minimum(number)
        first = lowest(score, free, early)
        part = projection(weight, self.dims)
        outputs, values = outputs @ part, torch.einsum("bkmd,kgdp->bkgmp", values, part)
        return removal_round(attention, outputs, values, row, free, first, number, self.step)


def output_norm(outputs: Tensor, weight: Tensor) -> Tensor:
    """(B, Q) squared norm of what heads' outputs (B, H_kv, G, Q, d) make together, by the output projection weight
    (H_kv, G, d, D)."""
    return torch.einsum("bkgqd,kgdn->bqn", outputs, weight).square().sum(-1)


def diagonal(attention: Tensor, outputs: Tensor, values: Tensor, weight: Tensor, row: Tensor) -> Tensor:
    """(B, H_kv, m) diagonal of the Hessian.

    attention: (B, H_kv, G, Q, m). outputs: (B, H_kv, G, Q, d). values: (B, H_kv, m, d). weight: (H_kv, G, d, D).
    row: (B, Q), how much each row counts.
    """
    total = torch.zeros_like(attention[:, :, 0, 0])
    for g in range(attention.shape[2]):
        for h in range(g, attention.shape[2]):
            both = inner(outputs[:, :, g], outputs[:, :, h], values, weight[:, g] @ weight[:, h].mT)
            both = both * attention[:, :, g] * attention[:, :, h] * row[:, None, :, None]
            total += both.sum(2) * (1 if g == h else 2)
    return total.clamp(min=0)


def projection(weight: Tensor, dims: int) -> Tensor:
    """(H_kv, G, d, p) what keeps most of the products behind the output projection weight (H_kv, G, d, D) in p = `dims`
    numbers: all of them with G * d or more, then p is G * d."""
    together = weight.flatten(1, 2)
    value, vector = torch.linalg.eigh(together @ together.mT)
    part = vector[..., -dims:] * value[:, None, -dims:].clamp(min=0).sqrt()
    return part.unflatten(1, weight.shape[1:3])


def removal_round(
    attention: Tensor,
    outputs: Tensor,
    values: Tensor,
    row: Tensor,
    free: Tensor,
    first: Tensor,
    number: Tensor,
    step: float,
) -> Tensor:
    """(B, H_kv, m) the round in which greedy removal takes each entry, the later the better; those that stay are last.

    attention: (B, H_kv, G, Q, m). outputs: (B, H_kv, G, Q, p) and values (B, H_kv, G, m, p), projected. row: (B, Q), how
    much each row counts. free: (B, H_kv, m) bool, entries that may go. first: (B, H_kv, m) bool, those gone beforehand.
    number: (B, H_kv) int64, how many are to go in all. step: share of what may still go in a round.
    """
    gone, mass, change = first, *removed(attention, outputs, values, first)
    rounds = torch.zeros_like(attention[:, :, 0, 0])
    free, number = free & ~first, number - first.sum(2)
    while bool((number > 0).any()):
        rounds = rounds + ~gone
        take = (free.sum(2) * step).long().clamp(min=1).minimum(number)
        left = free.byte().argsort(dim=2, descending=True, stable=True)[..., : int(free.sum(2).max())]
        some = torch.take_along_dim(attention, left[:, :, None, None], 4)
        cost = damage(some, outputs, torch.take_along_dim(values, left[:, :, None, :, None], 3), mass, change, row)
        cost = torch.full_like(rounds, torch.inf).scatter(2, left, cost)
        chosen = lowest(cost, free, take)
        more = removed(attention, outputs, values, chosen)
        mass, change = mass + more[0], change + more[1]
        gone, free, number = gone | chosen, free & ~chosen, number - take
    return rounds + ~gone


def removed(attention: Tensor, outputs: Tensor, values: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, H_kv, G, Q) that the entries `which` (B, H_kv, m) bool have together, and sum of their a (o - v),
    (B, H_kv, G, Q, p)."""
    attention = attention * which[:, :, None, None]
    mass = attention.sum(-1)
    return mass, mass[..., None] * outputs - attention @ values


def damage(attention: Tensor, outputs: Tensor, values: Tensor, mass: Tensor, change: Tensor, row: Tensor) -> Tensor:
    """(B, H_kv, m) squared change of the outputs if each entry goes too, after `mass` and `change`, see `removed`."""
    groups, m, dims = attention.shape[2], attention.shape[4], values.shape[-1]
    cost = []
    block = max(64, m * groups // dims)  # so that no tensor is larger than the attention rows
    for some, v in zip(attention.split(block, 4), values.split(block, 3), strict=True):
        scale = 1 / (1 - mass[..., None] - some).clamp(min=1e-6)
        share = some * scale
        left = torch.cat([scale, share], 2).permute(0, 1, 3, 4, 2) @ torch.cat([change, outputs], 2).transpose(2, 3)
        right = share.permute(0, 1, 4, 3, 2) @ v.transpose(2, 3)
        error = (left - right.transpose(2, 3)).square().sum(-1)
        cost.append((error * row[:, None, :, None]).sum(2))
    return torch.cat(cost, 2)


def lowest(score: Tensor, among: Tensor, number: Tensor) -> Tensor:
    """(B, G, m) bool, the `number` (B, G) lowest-scored entries of those `among` (B, G, m) bool; ties go to the highest
    position, as those stay that come first."""
    order = score.masked_fill(~among, torch.inf).flip(2).argsort(dim=2, stable=True)
    place = torch.arange(score.shape[2], device=score.device).expand_as(order)
    return torch.zeros_like(among).scatter(2, order, place < number[..., None]).flip(2) & among
