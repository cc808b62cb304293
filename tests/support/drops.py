"""A method that drops given tokens and nothing else, and the comparison of a model patched with it to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import QWEN
from tests.support.mrope import places_behind
from tests.support.reference import Positions, Reference, Schedule, Trace
from vlmaccel.hooks import DecoderLayer, Method, Modality
from vlmaccel.reduction import Reduction

Plan = dict[int, Tensor]
STEPS = 8  # tokens that are generated after a prompt
GREEDY: dict[str, Any] = dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True)


@dataclass(frozen=True, eq=False)
class FixedDrop(Method):
    """Before each layer of `plan`, keep the tokens it says.

    plan: {layer: (B, S) bool over the whole sequence}. Tokens after its end stay; rows are repeated where generation
    repeats them for beams or several answers.
    """

    name: ClassVar[str] = "fixed-drop"
    plan: Plan
    positions: Positions = "keep"

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted(self.plan))

    def decoder_layer(self, at: DecoderLayer) -> Reduction:
        modality = at.tokens.modality
        batch, n = modality.shape
        index = torch.arange(n).expand(batch, n) if at.run.index is None else at.run.index
        logical = index + at.run.past
        plan = self.plan[at.layer]
        plan = plan.repeat_interleave(batch // plan.shape[0], 0)
        stays = plan.gather(1, logical.clamp(max=plan.shape[1] - 1)) | (logical >= plan.shape[1])
        return Reduction.select(stays & (modality != Modality.PAD))


@dataclass(frozen=True, eq=False)
class KeepAll(Method):
    """Keep everything at the given layers; `how`: say nothing, the identity, or a selection that selects all."""

    name: ClassVar[str] = "keep-all"
    at_layers: tuple[int, ...]
    how: str = "nothing"

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return self.at_layers

    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        batch, n = at.tokens.modality.shape
        if self.how == "nothing":
            return None
        if self.how == "identity":
            return Reduction.identity(batch, n)
        return Reduction.select(torch.ones(batch, n, dtype=torch.bool))


def policy(kind: str, positions: Positions) -> Positions:
    """The position policy, or "keep" for a kind in which three positions a token leave nothing to count."""
    return "keep" if kind in QWEN else positions


def make_plan(
    mask: Tensor, layers: tuple[int, ...], seed: int = 0, ragged: bool = True, spare: tuple[int, ...] = ()
) -> Plan:
    """Random sets that shrink from layer to layer and differ from sample to sample.

    mask: (B, S) attention mask. The last token always stays. ragged: samples also keep different numbers of tokens,
    otherwise all as many as the shortest can give. spare: samples that lose nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    alive = mask.bool()
    plan: Plan = {}
    for k in layers:
        chance = torch.rand(mask.shape, generator=generator).masked_fill(~alive, -1)
        chance[:, -1] = 2
        left = alive.sum(1)
        count = (left * (0.45 + 0.25 * torch.rand(len(mask), generator=generator))).long().clamp(min=1)
        if not ragged:
            count = count.min().expand(len(mask))
        rank = chance.argsort(1, descending=True).argsort(1)
        alive = rank < count[:, None]
        for b in spare:
            alive[b] = mask[b].bool()
        plan[k] = alive
    return plan


def schedule_of(plan: Plan, b: int, mask: Tensor) -> Schedule:
    """Sample b of a plan in the numbering that the reference uses: real tokens only, from 0."""
    start = int((mask[b] == 0).sum())
    return {k: (kept[b].nonzero().flatten() - start).tolist() for k, kept in plan.items()}


def reference_traces(
    model: nn.Module,
    batch: dict[str, Tensor],
    later: Tensor,
    plan: Plan,
    positions: Positions | dict[int, Positions],
) -> list[Trace]:
    """The reference's account of every sample of `batch` followed by the tokens `later` (B, T), which all stay."""
    reference = Reference(model)
    traces = []
    for b, embeds in enumerate(reference.embed(batch)):
        schedule = schedule_of(plan, b, batch["attention_mask"])
        sequence = reference.followed(embeds, later[b])
        traces.append(reference.run(sequence, schedule, positions, prompt=len(embeds)))
    return traces


def extend_mask(mask: Tensor, n: int) -> Tensor:
    """`mask` (B, S) with n more real tokens."""
    return torch.cat([mask, mask.new_ones(len(mask), n)], 1)


def go_on(model: Any, batch: dict[str, Tensor], new: Tensor, seen: int, cache: Any, **options: Any) -> Any:
    """A forward over the tokens `new` (B, n), where the cache holds a batch and `seen` tokens behind it."""
    n = new.shape[1]
    mask = extend_mask(batch["attention_mask"], seen + n)
    options |= places_behind(model, batch, seen, n)
    return model(new, attention_mask=mask, past_key_values=cache, use_cache=True, **options)


@torch.no_grad()
def decode(model: Any, batch: dict[str, Tensor], later: Tensor) -> tuple[Tensor, Tensor]:
    """Prefill, then one forward for each of the tokens `later` (B, T) over the cache, as a user's own loop does it.

    Returns prompt logits (B, S, V) and step logits (B, T, V).
    """
    out = model(**batch, use_cache=True)
    prompt_logits, steps = out.logits, []
    for t in range(later.shape[1]):
        out = go_on(model, batch, later[:, t : t + 1], t, out.past_key_values)
        steps.append(out.logits[:, -1])
    return prompt_logits, torch.stack(steps, 1)


def assert_like_reference(
    traces: list[Trace],
    mask: Tensor,
    prompt_logits: Tensor | None,
    step_logits: Tensor | None,
    tolerance: float = 2e-5,
) -> None:
    """Every kept prompt token and every step has the reference's logits. Step t is the one that read token t."""
    for b, trace in enumerate(traces):
        start, length = int((mask[b] == 0).sum()), mask.shape[1]
        prompt = trace.index < length - start
        if prompt_logits is not None:
            mine = prompt_logits[b, trace.index[prompt] + start]
            error = float((mine - trace.logits[prompt]).abs().max())
            assert error < tolerance, f"sample {b}, prompt: {error}"
        if step_logits is not None:
            error = float((step_logits[b] - trace.logits[~prompt]).abs().max())
            assert error < tolerance, f"sample {b}, steps: {error}"


def with_answer(batch: dict[str, Tensor], later: Tensor) -> dict[str, Tensor]:
    """The whole conversation as one prompt: a batch and the text tokens `later` (B, T) behind it."""
    talk = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], later], 1),
        "attention_mask": extend_mask(batch["attention_mask"], later.shape[1]),
    }
    if "mm_token_type_ids" in batch:
        kinds = batch["mm_token_type_ids"]
        talk["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(later.shape)], 1)
    return talk


def answer_tokens(batch: int) -> Tensor:
    """(B, STEPS) fixed text tokens, to be fed as if the model had said them."""
    return torch.randint(2, 110, (batch, STEPS), generator=torch.Generator().manual_seed(5))


def turns(things: Sequence[Any], *axes: Sequence[Any]) -> list[Any]:
    """Every thing with every combination of `axes`; one combination each, in turn, and the rest marked slow."""
    combinations = list(product(*axes))
    return [
        pytest.param(*(thing if isinstance(thing, tuple) else (thing,)), *c, marks=() if fast else pytest.mark.slow)
        for i, thing in enumerate(things)
        for j, c in enumerate(combinations)
        for fast in [j == i % len(combinations)]
    ]
