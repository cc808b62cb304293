"""Every way to generate with dropped tokens gives what dropping them by hand gives."""

from __future__ import annotations

import pytest
import torch

import vlmaccel
from tests.support.drops import (
    GREEDY,
    STEPS,
    FixedDrop,
    KeepAll,
    answer_tokens,
    assert_like_reference,
    go_on,
    make_plan,
    policy,
    reference_traces,
    turns,
    with_answer,
)
from tests.support.models import DEPTH, build, inputs
from tests.support.models import KINDS as ALL_KINDS
from tests.support.reference import Positions

KINDS = tuple(kind for kind in ALL_KINDS if kind != "qwen2.5-vl")  # which decodes as Qwen2-VL does
POLICIES: tuple[Positions, ...] = ("keep", "renumber")
ALL = tuple(range(DEPTH))


@pytest.mark.parametrize(("kind", "positions"), turns(KINDS, POLICIES))
@torch.no_grad()
def test_beam_search(kind: str, positions: Positions) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask, positions = batch["attention_mask"], policy(kind, positions)
    beams = dict(max_new_tokens=STEPS, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
    full = model.generate(**batch, **beams)
    with vlmaccel.patched(model, KeepAll(ALL, "selection")):
        same = model.generate(**batch, **beams)
    assert torch.equal(same.sequences, full.sequences)
    assert torch.equal(same.sequences_scores, full.sequences_scores)

    plan = make_plan(mask, (1, 3))
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        cached = model.generate(**batch, **beams)
        again = model.generate(**batch, **beams, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    assert not torch.equal(cached.sequences, full.sequences)
    # the score of a beam is the mean log-probability of its tokens: the reference gives the same for the same tokens
    new = cached.sequences[:, mask.shape[1] :]
    for b, trace in enumerate(reference_traces(model, batch, new, plan, positions)):
        log_probability = trace.logits[-STEPS - 1 : -1].log_softmax(-1)
        score = log_probability.gather(1, new[b, :, None]).mean()
        assert abs(score - cached.sequences_scores[b]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sampling_several_answers(kind: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask = batch["attention_mask"]
    sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "top_k": 0}

    def sample(**options):
        torch.manual_seed(3)
        return model.generate(**batch, **sampling, **options)

    full = sample()
    with vlmaccel.patched(model, KeepAll(ALL, "selection")):
        same = sample()
    assert torch.equal(same.sequences, full.sequences)
    assert all(map(torch.equal, same.logits, full.logits))

    plan = make_plan(mask, (0, 4), seed=2)
    with vlmaccel.patched(model, FixedDrop(plan)):
        cached, again = sample(), sample(use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    new, logits = cached.sequences[:, mask.shape[1] :], torch.stack(cached.logits, 1)
    for answer in (0, 1):
        traces = reference_traces(model, batch, new[answer::2, :-1], plan, "keep")
        assert_like_reference(traces, mask, None, logits[answer::2, 1:])


@pytest.mark.parametrize(("kind", "positions"), turns(KINDS, POLICIES))
@torch.no_grad()
def test_without_a_cache(kind: str, positions: Positions) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask, positions = batch["attention_mask"], policy(kind, positions)
    plan = make_plan(mask, (0, 3), seed=4)
    with vlmaccel.patched(model, KeepAll(ALL, "selection")):
        same = model.generate(**batch, **GREEDY, use_cache=False)
    full = model.generate(**batch, **GREEDY, use_cache=False)
    assert torch.equal(same.sequences, full.sequences)
    assert all(map(torch.equal, same.logits, full.logits))
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        prompt = model(**batch, use_cache=False).logits
        said = model.generate(**batch, **GREEDY, use_cache=False)
    new = said.sequences[:, mask.shape[1] :]
    traces = reference_traces(model, batch, new[:, :-1], plan, positions)
    assert_like_reference(traces, mask, prompt, torch.stack(said.logits, 1)[:, 1:])


def second_turn(batch: dict[str, torch.Tensor], said: torch.Tensor) -> dict[str, torch.Tensor]:
    """The whole conversation so far, the answer `said` (B, T) and a new question of 9 tokens in every sample."""
    question = torch.randint(2, 110, (len(said), 9), generator=torch.Generator().manual_seed(8))
    return with_answer(batch, torch.cat([said, question], 1))


@pytest.mark.parametrize(("kind", "positions", "pad"), turns(KINDS, POLICIES, (False, True)))
@torch.no_grad()
def test_a_second_turn_over_the_cache(kind: str, positions: Positions, pad: bool) -> None:
    """The first prompt loses tokens, then so does the second; what was said between them stays."""
    model, batch = build(kind), inputs(kind, 3, pad)
    said = answer_tokens(3)
    talk = second_turn(batch, said)
    mask, length, positions = talk["attention_mask"], batch["input_ids"].shape[1], policy(kind, positions)
    plan = make_plan(mask, (1, 3), seed=6)
    for kept in plan.values():
        kept[:, length - 1 : length + STEPS] = True  # a prompt's last token and answers always stay
    later = answer_tokens(3).flip(1)
    new = talk["input_ids"][:, length + STEPS :]

    def turns():
        out = model(**batch, use_cache=True)
        for t in range(STEPS):
            out = go_on(model, batch, said[:, t : t + 1], t, out.past_key_values)
        out = go_on(model, batch, new, STEPS, out.past_key_values)
        prompt, steps = out.logits, []
        for t in range(STEPS):
            out = go_on(model, talk, later[:, t : t + 1], t, out.past_key_values)
            steps.append(out.logits[:, -1])
        return prompt, torch.stack(steps, 1)

    full = turns()
    with vlmaccel.patched(model, KeepAll(ALL, "selection")):
        same = turns()
    assert torch.equal(same[0], full[0]) and torch.equal(same[1], full[1])
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        prompt, steps = turns()
    traces = reference_traces(model, talk, later, plan, positions)
    assert_like_reference(traces, mask, None, steps)
    for b, trace in enumerate(traces):
        start = int((mask[b] == 0).sum())
        first = length + STEPS - start
        rows = trace.index[(trace.index >= first) & (trace.index < mask.shape[1] - start)]
        where = torch.isin(trace.index, rows)
        assert (prompt[b, rows - first] - trace.logits[where]).abs().max() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generate_continues_a_cache(kind: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    length, positions = batch["input_ids"].shape[1], policy(kind, "renumber")
    plan = make_plan(batch["attention_mask"], (0, 2), seed=7)
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        first = model.generate(**batch, **GREEDY)
        talk = second_turn(batch, first.sequences[:, length:])
        text = {k: talk[k] for k in ("input_ids", "attention_mask")}
        second = model.generate(**text, **GREEDY, past_key_values=first.past_key_values)
    mask = talk["attention_mask"]
    plan = {k: torch.cat([kept, kept.new_ones(3, STEPS + 9)], 1) for k, kept in plan.items()}  # all of it stays
    new = second.sequences[:, mask.shape[1] :]
    traces = reference_traces(model, talk, new[:, :-1], plan, positions)
    assert_like_reference(traces, mask, None, torch.stack(second.logits, 1)[:, 1:])


@pytest.mark.parametrize(("kind", "positions"), turns(KINDS, POLICIES))
@torch.no_grad()
def test_assisted_decoding(kind: str, positions: Positions) -> None:
    """Prompt lookup proposes several tokens at once and takes the wrong ones back: the answer is the greedy one."""
    model, batch = build(kind), inputs(kind)
    plan, positions = make_plan(batch["attention_mask"], (1, 3)), policy(kind, positions)
    options = {**GREEDY, "max_new_tokens": 12}
    full = model.generate(**batch, **options, prompt_lookup_num_tokens=3)
    with vlmaccel.patched(model, KeepAll(ALL, "selection")):
        same = model.generate(**batch, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(same.sequences, full.sequences)
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        greedy = model.generate(**batch, **options)
        assisted = model.generate(**batch, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted.sequences, greedy.sequences)
    error = (torch.stack(assisted.logits) - torch.stack(greedy.logits)).abs().max()
    assert error < 2e-5


@pytest.mark.parametrize(("kind", "positions", "chunk"), turns(KINDS, POLICIES, (11, 26)))
@torch.no_grad()
def test_prefill_in_chunks(kind: str, positions: Positions, chunk: int) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask, positions = batch["attention_mask"], policy(kind, positions)
    options = {**GREEDY, "prefill_chunk_size": chunk}
    full = model.generate(**batch, **options)
    with vlmaccel.patched(model, KeepAll(ALL, "selection")):
        same = model.generate(**batch, **options)
    assert torch.equal(same.sequences, full.sequences)
    assert all(map(torch.equal, same.logits, full.logits))
    plan = make_plan(mask, (0, 3), seed=9)
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        said = model.generate(**batch, **options)
    new = said.sequences[:, mask.shape[1] :]
    traces = reference_traces(model, batch, new[:, :-1], plan, positions)
    assert_like_reference(traces, mask, None, torch.stack(said.logits, 1)[:, 1:])
