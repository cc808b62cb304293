"""Dropping tokens is safe: keeping all of them changes nothing, dropping some is what dropping them by hand gives."""

from __future__ import annotations

from itertools import product

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
    decode,
    make_plan,
    policy,
    reference_traces,
    turns,
)
from tests.support.models import DEPTH, KINDS, QWEN, VLMS, build, inputs
from tests.support.reference import Positions

SHAPES = {"one": (1, False), "three": (3, False), "three-padded": (3, True)}
LAYERS = (0, 1, 3, DEPTH - 1)
POLICIES: tuple[Positions, ...] = ("keep", "renumber")
ALL = tuple(range(DEPTH))
# the decoder of one is another's, with experts in the other
WAYS = [
    way
    for way in product(KINDS, ("sdpa", "eager"), SHAPES)
    if way[::2] not in (("qwen2.5-vl", "three"), ("qwen3-vl-moe", "three"))
]


@pytest.mark.parametrize(("kind", "attn", "shape", "how"), turns(WAYS, ("selection", "nothing", "identity")))
@torch.no_grad()
def test_keeping_everything_is_bit_identical(kind: str, attn: str, shape: str, how: str) -> None:
    model, batch = build(kind, attn), inputs(kind, *SHAPES[shape])
    later = answer_tokens(len(batch["input_ids"]))
    real = batch["attention_mask"].bool()
    prompt, steps = decode(model, batch, later)
    said = model.generate(**batch, **GREEDY)
    with vlmaccel.patched(model, KeepAll(ALL, how)):
        patched_prompt, patched_steps = decode(model, batch, later)
        patched_said = model.generate(**batch, **GREEDY)
    assert torch.equal(patched_prompt[real], prompt[real])
    assert torch.equal(patched_steps, steps)
    assert torch.equal(patched_said.sequences, said.sequences)
    assert all(map(torch.equal, patched_said.logits, said.logits))
    assert patched_said.past_key_values.get_seq_length() == said.past_key_values.get_seq_length()


def check_drop(
    kind: str,
    attn: str,
    shape: str,
    layers: tuple[int, ...],
    positions: Positions,
    ragged: bool,
    seed: int = 0,
) -> None:
    """A patched model against the reference: own loop over given tokens, then generate."""
    model, batch = build(kind, attn), inputs(kind, *SHAPES[shape])
    mask, positions = batch["attention_mask"], policy(kind, positions)
    plan = make_plan(mask, layers, seed, ragged)
    later = answer_tokens(len(mask))
    full_prompt, full_steps = decode(model, batch, later)
    with vlmaccel.patched(model, FixedDrop(plan, positions)):
        prompt, steps = decode(model, batch, later)
        said = model.generate(**batch, **GREEDY)
    traces = reference_traces(model, batch, later, plan, positions)
    assert_like_reference(traces, mask, prompt, steps)
    # not vacuous: the drop moves every sample's logits by far more than the tolerance
    assert (steps - full_steps).abs().amax((1, 2)).min() > 0.05
    assert (prompt - full_prompt)[:, -1].abs().amax(-1).min() > (0.01 if layers[0] < DEPTH - 1 else 0.001)

    new = said.sequences[:, mask.shape[1] :]
    logits = torch.stack(said.logits, 1)
    traces = reference_traces(model, batch, new[:, :-1], plan, positions)
    assert_like_reference(traces, mask, None, logits[:, 1:])
    last = torch.stack([t.logits[len(t.index) - STEPS] for t in traces])
    assert (logits[:, 0] - last).abs().max() < 2e-5
    suppressed = model.generation_config.suppress_tokens
    assert torch.equal(logits.index_fill(2, torch.tensor(suppressed), -torch.inf).argmax(-1), new)


# every kind x attention x shape; drop layer, position policy, raggedness and number of stages take turns over them
TURNS = [((0,), "keep"), ((1,), "renumber"), ((3,), "keep"), ((5,), "renumber"), ((1, 3, 4), "renumber")]
TURNS += [
    ((0,), "renumber"),
    ((1,), "keep"),
    ((3,), "renumber"),
    ((5,), "keep"),
    ((0, 2, 5), "keep"),
    ((2, 3), "renumber"),
]


@pytest.mark.parametrize(
    ("way", "turn"),
    [(way, TURNS[i % len(TURNS)]) for i, way in enumerate(WAYS)],
    ids=lambda x: "-".join(map(str, x)),
)
@torch.no_grad()
def test_dropping_equals_the_reference(way: tuple, turn: tuple) -> None:
    check_drop(*way, layers=turn[0], positions=turn[1], ragged=turn[0][0] != 3)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids="-".join)
@torch.no_grad()
def test_dropping_equals_the_reference_everywhere(way: tuple) -> None:
    for seed, (k, positions, ragged) in enumerate(product(LAYERS, POLICIES, (True, False))):
        check_drop(*way, layers=(k,), positions=positions, ragged=ragged, seed=seed)


@pytest.mark.parametrize(("kind", "pad"), turns(VLMS, (False, True)))
@torch.no_grad()
def test_a_sample_that_loses_nothing_is_unaffected(kind: str, pad: bool) -> None:
    """The text-only sample of a batch in which the others lose tokens, as methods on image tokens do it."""
    model, batch = build(kind), inputs(kind, 3, pad)
    plan = make_plan(batch["attention_mask"], (1, 3), spare=(1,))
    later = answer_tokens(3)
    full_prompt, full_steps = decode(model, batch, later)
    with vlmaccel.patched(model, FixedDrop(plan)):
        prompt, steps = decode(model, batch, later)
    real = batch["attention_mask"][1].bool()
    assert (prompt[1, real] - full_prompt[1, real]).abs().max() < 1e-5
    assert (steps[1] - full_steps[1]).abs().max() < 1e-5
    assert_like_reference(reference_traces(model, batch, later, plan, "keep"), batch["attention_mask"], prompt, steps)


@pytest.mark.parametrize(("kind", "attn"), turns(("llava-onevision", *QWEN), ("sdpa", "eager")))
@torch.no_grad()
def test_a_video_beside_pictures(kind: str, attn: str) -> None:
    model = build(kind, attn)
    batch = inputs(kind, 3, pad=True, video=True)
    mask = batch["attention_mask"]
    later = answer_tokens(3)
    full = decode(model, batch, later)
    with vlmaccel.patched(model, KeepAll(ALL, "selection")):
        same = decode(model, batch, later)
    assert torch.equal(same[1], full[1])
    plan = make_plan(mask, (1, 3))
    with vlmaccel.patched(model, FixedDrop(plan)):
        prompt, steps = decode(model, batch, later)
        said = model.generate(**batch, **GREEDY)
    assert_like_reference(reference_traces(model, batch, later, plan, "keep"), mask, prompt, steps)
    new = said.sequences[:, mask.shape[1] :]
    traces = reference_traces(model, batch, new[:, :-1], plan, "keep")
    assert_like_reference(traces, mask, None, torch.stack(said.logits, 1)[:, 1:])
