"""Cross-modal sensitivity: keep the entries whose keys move the output most, also by way of the text that reads them.

No paper's method: gradients of the attention output in closed form, without a backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmaccel.hooks import CacheEntries, Modality
from vlmaccel.methods.budget import is_whole
from vlmaccel.methods.eviction import Observed, by_kv_head, check_count, observed_rows, pooled
from vlmaccel.methods.selection import check_choice
from vlmaccel.reduction import Reduction

Coupling = Literal["attention", "uniform"]
NOTE = "sensitivity"
BLOCK = 32  # rows of attention that exist at a time


@dataclass(frozen=True, eq=False)
class Reads:
    """What the text of a layer reads: (B, H_kv, T, m) squared gradients of T rows, the logical index (B, T) of these rows,
    and beta (B, 1 or H_kv, m) of every entry."""

    gradient: Tensor
    rows: Tensor
    beta: Tensor


@dataclass(frozen=True)
class Sensitivity(Observed):
    """S_t = D_t + beta_m c X_t, over the query heads h of a KV head, with a the attention, o the heads' outputs, ||.||_G the
    norm behind the output projection.

    Direct: D_t = sum over h and observed rows i of a_it^2 ||v_t - o_i||_G^2 ||q_i||^2 / d, the squared norm of d y / d k_t
    head by head. One hop: X_t = sum over text rows j behind t of (K_j + N_j) a_jt^2 ||v_t - o_j||_G^2 ||q_j||^2 / d: entry t
    changes what text j takes to the next layer, whose observed rows feel the key of j by K_j (its direct term) and the
    value of j by N_j = sum of a_ij^2 ||W_O||_F^2, summed over all heads of that layer. c makes the means of D and X
    equal in a sample's layer, as the norms that the hop leaves out are common to it. The last layer has D only.

    Needs the next layer, so the whole cache is there at the end of the prefill: the peak stays.
    beta: weight of the hop, default 0.25; 0 switches it off. coupling: "attention" (default): beta_m is `beta` times the share of
        the text rows' attention that goes to entries of modality m; "uniform": `beta` itself.
    readers: text rows of the hop, the last ones of the prompt, at most this many; default 256.
    pool: default 1, no pooling: the score is each entry's own. rows, window, pooling, group: see `Observed`. budget, sinks, recent: see `Eviction`.
    """

    name = "sensitivity"
    two_phase = True

    pool: int = 1
    beta: float = 0.25
    coupling: Coupling = "attention"
    readers: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("coupling", self.coupling, get_args(Coupling))
        check_count("readers", self.readers, 1)
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta is the weight of a sum's second part, 0 or more, not {self.beta!r}")

    def observe(self, at: CacheEntries) -> None:
        if is_whole(self.budget):
            return
        memory = at.run.memory.setdefault(self, {})
        gram = output_gram(at)
        attention, gradient = observed_gradients(at, gram, *observed_rows(at, self.rows, self.window))
        direct = by_kv_head(gradient.sum(3).flatten(1, 2), at, self.group)
        reads: Reads | None = memory.pop("reads", None)
        if reads is not None:
            value = attention.square() * gram.diagonal(dim1=2, dim2=3).sum(-1)[:, :, None, None]
            felt = of_rows(at, (gradient + value).sum((1, 2, 3)), reads.rows).to(reads.gradient.device)
            hop = (reads.gradient * felt[:, None, :, None]).sum(2)
            memory[at.layer - 1] = with_hop(memory[at.layer - 1], hop, reads.beta)
        if self.beta > 0 and at.layer + 1 < at.depth:
            memory["reads"] = self._reads(at, gram)
        memory[at.layer] = direct
        # other methods may evict before the next layer is known: number the entries
        at.entries.notes[NOTE] = torch.arange(direct.shape[2], device=direct.device).expand(len(direct), 1, -1)

    def _reads(self, at: CacheEntries, gram: Tensor) -> Reads:
        rows, counts = text_rows(at, self.readers)
        gradients, mass = [], torch.zeros_like(at.slots.index, dtype=torch.float)
        for some, real in zip(rows.split(BLOCK, 1), counts.split(BLOCK, 1), strict=True):
            attention, gradient = observed_gradients(at, gram, some, real)
            gradients.append(gradient.sum(2))
            mass = mass + attention.sum((2, 3))
        logical = (rows if at.run.index is None else at.run.index.gather(1, rows)).to(mass.device)
        itself = at.slots.index[:, :, None] == logical[:, None, :, None] + at.run.past
        beta = torch.full_like(at.slots.index, self.beta, dtype=torch.float)
        if self.coupling == "attention":
            beta = beta * coupling(mass, at.modality)
        return Reads(torch.cat(gradients, 2).masked_fill(itself, 0), logical, beta)

    def score(self, at: CacheEntries) -> Tensor:
        score: Tensor = at.run.memory[self][at.layer]
        number = at.entries.notes[NOTE].expand(-1, score.shape[1], -1)
        return pooled(score.gather(2, number), at.prompt, at.slots.index, self.pool, self.pooling)

    def cache(self, at: CacheEntries) -> Reduction | None:
        reduction = super().cache(at)
        if not at.decoding:
            at.entries.notes.pop(NOTE, None)
            at.run.memory.get(self, {}).pop(at.layer, None)
        return reduction


def output_gram(at: CacheEntries) -> Tensor:
    """(H_kv, G, head_dim, head_dim) float32 W_O W_O^T of every query head."""
    assert at.scores is not None
    weight = at.scores.output().float()
    return (weight @ weight.mT).unflatten(0, (at.entries.keys.shape[1], -1))


def observed_gradients(at: CacheEntries, gram: Tensor, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of some rows and their `key_gradient`, (B, H_kv, G, Q, m) both, zero where a row does not count (B, Q)."""
    assert at.scores is not None
    kv_heads = at.entries.keys.shape[1]
    attention = at.scores.rows(rows) * counts.to(gram.device)[:, None, :, None]
    attention, queries = (x.float().unflatten(1, (kv_heads, -1)) for x in (attention, at.scores.queries(rows)))
    return attention, key_gradient(attention, queries, at.entries.dense()[1].float(), gram)


def key_gradient(attention: Tensor, queries: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    """(B, H_kv, G, Q, m) squared norm of the derivative of each head's output by each key, behind the output projection.

    attention: (B, H_kv, G, Q, m). queries: (B, H_kv, G, Q, d). values: (B, H_kv, m, d). gram: (H_kv, G, d, d).
    """
    outputs = head_outputs(attention, values)
    scale = queries.square().sum(-1, keepdim=True) / queries.shape[-1]
    distance = [inner(o, o, values, gram[:, g]) for g, o in enumerate(outputs.unbind(2))]
    return attention.square() * scale * torch.stack(distance, 2).clamp(min=0)


def head_outputs(attention: Tensor, values: Tensor) -> Tensor:
    """(B, H_kv, G, Q, d) what attention (B, H_kv, G, Q, m) takes from values (B, H_kv, m, d)."""
    return (attention.flatten(2, 3) @ values).unflatten(2, attention.shape[2:4])


def inner(left: Tensor, right: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    """(..., Q, m) products (l_i - v_t) gram (r_i - v_t)^T, without a tensor of their size times d.

    left, right: (..., Q, d). values: (..., m, d). gram: (..., d, d).
    """
    rows = ((left @ gram) * right).sum(-1)[..., None]
    columns = ((values @ gram) * values).sum(-1)[..., None, :]
    return rows - (left @ gram + right @ gram.mT) @ values.mT + columns


def with_hop(direct: Tensor, hop: Tensor, beta: Tensor) -> Tensor:
    """Direct and one-hop terms (B, H_kv, m) added, the hop with the mean of the direct term in each sample times beta
    (B, 1 or H_kv, m)."""
    total = hop.sum((1, 2), keepdim=True).clamp(min=torch.finfo(hop.dtype).tiny)
    return direct + beta * (hop / total) * direct.sum((1, 2), keepdim=True)


def coupling(mass: Tensor, modality: Tensor) -> Tensor:
    """(B, G, m) share of all attention `mass` (B, H_kv, m) that goes to entries of an entry's `modality` (B, G, m)."""
    total = mass.sum((1, 2), keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    share = torch.zeros_like(modality, dtype=mass.dtype)
    for m in (Modality.TEXT, Modality.IMAGE, Modality.VIDEO):
        here = modality == m
        share = share + here * (mass * here).sum((1, 2), keepdim=True) / total
    return share


def text_rows(at: CacheEntries, most: int) -> tuple[Tensor, Tensor]:
    """The last `most` text rows of the prompt among the remaining new tokens, as `observed_rows` gives rows."""
    run = at.run
    modality = run.remaining.modality
    place = torch.arange(modality.shape[1], device=modality.device).expand(modality.shape)
    logical = place if run.index is None else run.index
    text = (modality == Modality.TEXT) & (logical <= run.query.amax(1, keepdim=True))
    counts = text & (text.flip(1).cumsum(1).flip(1) <= most)
    rows = torch.where(counts, place, -1).topk(max(1, int(counts.sum(1).max())), dim=1).values.sort(1).values
    return rows.clamp(min=0), rows >= 0


def of_rows(at: CacheEntries, entries: Tensor, rows: Tensor) -> Tensor:
    """What `entries` (B, m) of this layer have for the new tokens with logical index `rows` (B, T) in this forward; 0 for a
    token that is not there any more."""
    run, rows = at.run, rows.to(entries.device)
    n = run.remaining.modality.shape[1]
    new = min(n, entries.shape[1])  # a sliding window may have passed some
    index = torch.arange(n, device=rows.device).expand(len(rows), -1) if run.index is None else run.index
    everything = entries.new_zeros(len(entries), run.length)
    return everything.scatter(1, index[:, -new:].to(rows.device), entries[:, -new:]).gather(1, rows)
