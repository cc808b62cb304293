"""ZipVL: prefill attention over the tokens that hold most of the attention, as many as each layer and prompt needs.

He et al., "ZipVL: Accelerating Vision-Language Models through Dynamic Token Sparsity", ICCV 2025, arXiv 2410.08584.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmaccel.cache import PrunedLayer
from vlmaccel.cache.mixed import MixedLayer
from vlmaccel.hooks import AttentionCall, CacheEntries, Method, TokenSet
from vlmaccel.kernels.score_rows import score_rows
from vlmaccel.methods.eviction import check_finite
from vlmaccel.methods.mixed_precision import MixedPrecisionKV
from vlmaccel.methods.selection import check_choice
from vlmaccel.reduction import Reduction

Rule = Literal["mass", "threshold"]
KV = Literal["evict", "mixed", "full"]
NOTE = "zipvl"


@dataclass(frozen=True)
class ZipVL(Method):
    """At each decoder layer, choose the tokens that matter by the attention of a few probe rows, compute attention of these
    tokens over these tokens only, and let the others pass it by (their attention output is 0). All tokens go through the MLP.
    For inference, in models with attn_implementation="sdpa".

    tau: rule "mass": the chosen tokens, best first, are the fewest that hold this share of all attention of the probe rows;
        default 0.975 (section 5; 0.96 there too). 1 computes all of it. Best by attention divided by the number of probe rows
        that can see the token, the mean over heads (section 4.1). The paper takes the count from the order of the undivided
        attention, by which the chosen tokens may hold less than tau.
        rule "threshold" (eq. 35-36 of the survey that this follows, S_t > tau): tokens with more than tau times the mean score.
    recent, random: probe rows, the last ones (one at least) and some of the others: a share of the tokens (float) or a number
        (int); default 5 % each, as ZipCache (arXiv 2405.14256). seed: of the random ones, which depend on the prompt's length
        and the layer alone.
    kv: what becomes of the KV cache. "evict" (default): the layer forgets tokens that it did not choose (version 2 of the
        paper). "mixed": chosen tokens are held in `high_bits`, 4, the others in `low_bits`, 2 (version 1), on the grid of
        `MixedPrecisionKV`; the first 4 and the last `residual` tokens stay in full precision, default 100 (section 5).
        "full": nothing.

    The last token of the prompt, and candidates of assisted decoding behind it, are always chosen. A layer with a sliding
    window shorter than the prompt computes everything.
    """

    name = "zipvl"

    tau: float = 0.975
    rule: Rule = "mass"
    recent: float | int = 0.05
    random: float | int = 0.05
    seed: int = 0
    kv: KV = "evict"
    high_bits: int = 4
    low_bits: int = 2
    residual: int = 100

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, get_args(Rule))
        check_choice("kv", self.kv, get_args(KV))
        most = 1 if self.rule == "mass" else float("inf")
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 <= self.tau <= most:
            what = "a share of the attention, from 0 to 1" if self.rule == "mass" else "0 or more"
            raise ValueError(f"tau is {what}, not {self.tau!r}")
        for name in ("recent", "random"):
            value = getattr(self, name)
            share = isinstance(value, float) and 0 <= value <= 1
            if not share and (isinstance(value, (bool, float)) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} is a share of the tokens (0.0 to 1.0) or a number of rows, not {value!r}")
        self._mixed()  # says what is wrong with the bits

    def _mixed(self) -> ByChoice:
        return ByChoice(high_bits=self.high_bits, low_bits=self.low_bits, residual=self.residual)

    def sparse_layers(self, depth: int) -> Sequence[int]:
        return range(depth)

    def cache_layers(self, depth: int) -> Sequence[int]:
        return () if self.kv == "full" else range(depth)

    def sparse_attention(self, at: AttentionCall) -> TokenSet | None:
        if self.rule == "mass" and self.tau == 1:
            return None
        prompt = at.real & ~candidates(at)
        rows = self._probe_rows(at, prompt)
        mass = received(at, rows)
        check_finite(self, at, mass)
        score = (mass / seen_by(rows, at.key.shape[2]).clamp(min=1)).masked_fill(~prompt, -1)
        if self.rule == "mass":
            chosen = holding(self.tau, mass, score)
        else:
            chosen = score > self.tau * score.clamp(min=0).sum(1, keepdim=True) / prompt.sum(1, keepdim=True).clamp(
                min=1
            )
        chosen = (chosen | last_of(prompt) | candidates(at)) & at.real
        at.run.memory[self, at.layer] = chosen
        return TokenSet(chosen)

    def _probe_rows(self, at: AttentionCall, prompt: Tensor) -> Tensor:
        """(B, Q) int64 key numbers of the probe rows, new tokens of the `prompt` (B, m) bool, ascending, -1 behind them."""
        n, m = at.query.shape[2], at.key.shape[2]
        probes = []
        for real in prompt[:, m - n :].cpu():
            rows = real.nonzero().flatten() + m - n
            last = max(1, _number(self.recent, len(rows)))
            before, recent = rows[:-last], rows[-last:]
            # the same rows for a prompt whatever its batch
            generator = torch.Generator().manual_seed(hash((self.seed, at.layer, len(rows))))
            some = torch.randperm(len(before), generator=generator)[: _number(self.random, len(rows))]
            probes.append(torch.cat([before[some.sort().values], recent]))
        together = torch.nn.utils.rnn.pad_sequence(probes, batch_first=True, padding_value=-1)
        return together.to(at.query.device)

    def observe(self, at: CacheEntries) -> None:
        chosen = at.run.memory.get((self, at.layer))
        if chosen is not None:
            at.entries.notes[NOTE] = chosen[:, None]
        if self.kv == "mixed":
            self._mixed().observe(at)

    def cache_layer(self, layer: PrunedLayer, at: CacheEntries) -> PrunedLayer:
        return self._mixed().cache_layer(layer, at) if self.kv == "mixed" else layer

    def cache(self, at: CacheEntries) -> Reduction | None:
        if self.kv == "mixed":
            return self._mixed().cache(at)
        chosen = None if at.decoding else at.entries.notes.pop(NOTE, None)
        if chosen is None:
            return None
        chosen = pad(chosen, (0, at.slots.index.shape[2] - chosen.shape[2]), value=True)
        wanted = chosen & (at.slots.sizes > 0)
        return None if bool(wanted.all()) else Reduction.select(wanted.flatten(0, 1))


@dataclass(frozen=True)
class ByChoice(MixedPrecisionKV):
    """Bits of a prompt's entries by whether ZipVL chose them."""

    keep: float | None = 1.0  # so that saliency is not looked for

    def cache(self, at: CacheEntries) -> Reduction | None:
        super().cache(at)
        at.entries.notes.pop(NOTE, None)
        return None

    def _salient(self, layer: MixedLayer, among: Tensor) -> Tensor:
        chosen = layer.notes.get(NOTE)
        if chosen is None:  # all of the attention was computed
            return torch.ones_like(among)
        chosen = pad(chosen, (0, layer.held - chosen.shape[2]), value=True)
        return chosen[..., layer.held - among.shape[2] :] & among


def received(at: AttentionCall, rows: Tensor) -> Tensor:
    """(B, m) float32, attention that the keys get from rows (B, Q) given as key numbers (-1: none), the mean over heads."""
    m = at.key.shape[2]
    first = m - at.query.shape[2]
    place = (rows - first).clamp(min=0)
    query = at.query.gather(2, place[:, None, :, None].expand(-1, at.query.shape[1], -1, at.query.shape[3]))
    hidden = torch.zeros(at.real.shape, device=at.real.device).masked_fill(~at.real, -torch.inf)[:, None]
    index = torch.arange(m, device=rows.device).expand(len(rows), 1, -1)
    return score_rows(query, at.key, rows, index, hidden, at.scale, 0, "sum").mean(1)


def seen_by(rows: Tensor, m: int) -> Tensor:
    """(B, m) int64, how many of the rows (B, Q), given as key numbers, can see each of m keys."""
    keys = torch.arange(m, device=rows.device).expand(len(rows), -1)
    ascending = rows.sort(1).values  # rows that do not count, -1, come first and see nothing
    return rows.shape[1] - torch.searchsorted(ascending, keys.contiguous())


def holding(share: float, mass: Tensor, score: Tensor) -> Tensor:
    """(B, m) bool, the fewest keys, the best `score` (B, m) first, that hold this share of the `mass` (B, m)."""
    order = score.argsort(dim=1, descending=True, stable=True)
    held = mass.double().gather(1, order)
    before = held.cumsum(1) - held
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, before < share * held.sum(1, keepdim=True))


def candidates(at: AttentionCall) -> Tensor:
    """(B, m) bool, the keys of candidates of assisted decoding behind the prompt."""
    n, m, run = at.query.shape[2], at.key.shape[2], at.run
    logical = torch.arange(n, device=at.real.device).expand(len(at.real), -1) if run.index is None else run.index
    return pad(logical > run.query.amax(1, keepdim=True).to(logical.device), (m - n, 0))


def last_of(which: Tensor) -> Tensor:
    """(B, m) bool, the last one that is true of `which` (B, m)."""
    return which & (which.flip(1).cumsum(1).flip(1) == 1)


def _number(what: float | int, tokens: int) -> int:
    return min(tokens, what) if isinstance(what, int) else int(tokens * what)
