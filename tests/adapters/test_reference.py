"""The reference decoder agrees with the unpatched models, so that agreeing with it means something."""

import pytest
import torch

from tests.support.models import DEPTH, KINDS, QWEN, SLIDING, VLMS, WINDOW, build, inputs
from tests.support.mrope import places
from tests.support.reference import Reference


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_full_logits_equal_the_unpatched_model(kind: str) -> None:
    model = build(kind)
    reference = Reference(model)
    batch = inputs(kind, 3, pad=True)
    logits = model(**batch).logits
    for b, embeds in enumerate(reference.embed(batch)):
        trace = reference.run(embeds)
        real = batch["attention_mask"][b].bool()
        assert trace.index.tolist() == list(range(int(real.sum())))
        assert (trace.logits - logits[b, real]).abs().max() < 2e-5


@pytest.mark.parametrize("kind", ["llava-onevision", *QWEN])
@torch.no_grad()
def test_full_logits_with_a_video(kind: str) -> None:
    model = build(kind)
    reference = Reference(model)
    batch = inputs(kind, 3, pad=True, video=True)
    logits = model(**batch).logits
    for b, embeds in enumerate(reference.embed(batch)):
        real = batch["attention_mask"][b].bool()
        assert (reference.run(embeds).logits - logits[b, real]).abs().max() < 2e-5


@pytest.mark.parametrize("kind", QWEN)
@pytest.mark.parametrize("video", [False, True])
def test_positions_of_pictures_are_the_unpatched_models_own(kind: str, video: bool) -> None:
    model, batch = build(kind).model, inputs(kind, 3, pad=True, video=video)
    ids, kinds = batch["input_ids"], batch["mm_token_type_ids"]
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "mm_token_type_ids")}
    theirs, deltas = model.get_rope_index(ids, kinds, **rest)
    for b, ours in enumerate(places(model, batch)):
        real = batch["attention_mask"][b].bool()
        assert torch.equal(ours, theirs[:, b, real])
        assert ours.max() + 1 - real.sum() == deltas[b]
        assert b == 1 or (not torch.equal(ours[0], ours[1]) and not torch.equal(ours[1], ours[2]))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral-sliding", "qwen2-hybrid", "qwen2.5-vl", "qwen3-vl-moe"])
@torch.no_grad()
def test_attention_equals_the_unpatched_models_own(kind: str) -> None:
    model = build(kind, "eager")
    batch = inputs(kind)
    theirs = model(**batch, output_attentions=True).attentions
    reference = Reference(model)
    trace = reference.run(reference.embed(batch)[0])
    for k in range(DEPTH):
        ours = reference.attention(trace, k)
        assert (ours - theirs[k][0].mean(0)).abs().max() < 1e-5
        assert torch.equal(ours, reference.attention(trace, k, before_drop=False))


@pytest.mark.parametrize("kind", ["llama", "qwen2-hybrid", "llava-next"])
def test_dropping_nothing_or_everything_but_one_token(kind: str) -> None:
    reference = Reference(build(kind))
    embeds = reference.embed(inputs(kind))[0]
    n = len(embeds)
    full = reference.run(embeds).logits
    assert torch.equal(reference.run(embeds, {2: list(range(n))}, "renumber").logits, full)
    # dropping all but the first half at layer 0 is the same as never having had the rest
    half = reference.run(embeds, {0: list(range(n // 2))})
    assert (half.logits - full[: n // 2]).abs().max() < 1e-12
    # and dropping the first half with new numbers is the same as a prompt that starts there
    late = list(range(n // 2, n))
    assert (
        reference.run(embeds, {0: late}, "renumber").logits - reference.run(embeds[late]).logits
    ).abs().max() < 1e-12
    # rotary attention sees distances only
    assert (reference.run(embeds, {0: late}).logits - reference.run(embeds[late]).logits).abs().max() < 1e-9


def test_position_policies_differ_and_agree_where_they_must() -> None:
    reference = Reference(build("llama"))
    embeds = reference.embed(inputs("llama"))[0]
    n = len(embeds)
    kept = [0, 1, 5, 6, 11, 17, *range(20, n)]
    keep, renumber = (reference.run(embeds, {2: kept}, p, prompt=n - 4) for p in ("keep", "renumber"))
    assert (keep.logits[-1] - renumber.logits[-1]).abs().max() > 0.05
    assert keep.kept_positions[2].tolist() == keep.kept[2].tolist() == kept
    assert renumber.kept_positions[2].tolist() == list(range(len(kept)))
    assert renumber.positions[2].tolist() == list(range(n)) and renumber.positions[3].tolist() == list(range(len(kept)))


def test_the_inputs_are_what_they_say() -> None:
    for kind in VLMS:
        batch = inputs(kind, 3, pad=True)
        image = batch["input_ids"] == build(kind).config.image_token_id
        assert (image.sum(1) > 0).tolist() == [True, False, True]
        assert (batch["attention_mask"].sum(1).unique().numel()) == 3
    for kind in SLIDING:
        assert inputs(kind, 3, pad=True)["attention_mask"].sum(1).min() > WINDOW
