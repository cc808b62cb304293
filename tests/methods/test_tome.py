"""ToMe: schedules and targets, the published algorithm, and merged tokens that go on into a decoder."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import vlmaccel
from tests.support.models import IMAGE, build, inputs
from tests.support.vits import MAKERS, outputs, pictures
from vlmaccel.evals.published_tome import PublishedToMe
from vlmaccel.flops import BlockCost
from vlmaccel.hooks import Tower
from vlmaccel.methods import FastV, ToMe
from vlmaccel.methods.tome import spread, tokens_left

BASE = BlockCost(768, 4 * 768**2, 8 * 768**2)


def tower(depth=12, tokens=197, prefix=1, cost=BASE):
    return Tower(depth, tokens, prefix, cost)


# what the official code makes of r (specified with the method)
@pytest.mark.parametrize(
    ("r", "want"),
    [
        (8, [8] * 12),
        ((8, -1), [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
        ((8, -0.5), [12, 11, 10, 9, 9, 8, 7, 6, 6, 5, 4, 4]),
        ((16, -1), [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        ((13, -1), [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
        ([1, 2, 3], [1, 2, 3] + [0] * 9),
        ([5, 4], [5, 4] + [0] * 10),
        ([7], [7] + [0] * 11),
        (list(range(20)), list(range(12))),
    ],
    ids=str,
)
def test_published_schedules(r, want):
    assert list(ToMe(r=r).counts(tower())) == want


@pytest.mark.parametrize(
    ("tokens", "prefix", "depth", "r", "want"),
    [
        (197, 1, 12, 16, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
        (197, 1, 12, (16, -1), [165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10]),
        (197, 1, 12, 13, [41]),
        (197, 1, 12, 8, [101]),
        (197, 1, 24, 8, [21, 13, 7]),
        (197, 1, 24, 7, [29]),
        (577, 1, 24, 23, [25]),
        (577, 1, 24, 25, [52, 27, 14, 8]),
        (257, 1, 32, 7, [33]),
        (577, 1, 12, 45, [82, 42]),
        (1025, 1, 24, 40, [65]),
        (198, 2, 12, 13, [42]),
        (576, 0, 24, 23, [24]),
    ],
)
def test_published_token_counts(tokens, prefix, depth, r, want):
    where = tower(depth, tokens, prefix)
    assert tokens_left(ToMe(r=r).counts(where), where)[-len(want) :] == want


def test_a_schedule_is_named_or_a_number():
    assert ToMe(r=8, schedule="decreasing") == ToMe(r=(8, -1))
    assert ToMe(r=8, schedule="constant") == ToMe(r=8)
    assert ToMe(r=8, schedule="increasing") == ToMe(r=8, schedule=1)
    assert ToMe(r=8).counts(tower(depth=1)) == (8,)
    assert len({ToMe(r=[1, 2]), ToMe(r=[1, 2]), ToMe(r=(1, 1))}) == 2  # hashable, and not confused


@given(st.floats(0.05, 1), st.integers(4, 40), st.integers(10, 900), st.integers(0, 5), st.floats(-0.9, 0.9))
def test_keep_is_what_is_left(keep, depth, patches, prefix, inflect):
    where = tower(depth, patches + prefix, prefix)
    wanted = max(1, int(patches * keep + 1e-6))
    halves = tokens_left(spread(patches - wanted, inflect, depth), where)
    if halves[-1] - prefix > wanted:  # a block would have to merge more than half
        with pytest.raises(ValueError, match=f"to {wanted} .*the least is {halves[-1] - prefix}"):
            ToMe(keep=keep, schedule=inflect).counts(where)
        return
    counts = ToMe(keep=keep, schedule=inflect).counts(where)
    assert tokens_left(counts, where)[-1] - prefix == wanted
    assert sum(counts) == patches - wanted


@given(st.floats(1, 2.5), st.integers(4, 30), st.integers(60, 900), st.sampled_from([0.0, -1.0, 0.5]))
def test_speedup_is_met_by_the_fewest_merges(speedup, depth, patches, inflect):
    where = tower(depth, patches + 1)

    def ratio(counts):
        left = tokens_left(counts, where)
        return depth * BASE.flops(patches + 1, patches + 1) / sum(map(BASE.flops, left, left[1:]))

    if ratio(spread(patches, inflect, depth)) < speedup:
        with pytest.raises(ValueError, match="at most"):
            ToMe(speedup=speedup, schedule=inflect).counts(where)
        return
    counts = ToMe(speedup=speedup, schedule=inflect).counts(where)
    assert ratio(counts) >= speedup
    if sum(counts):
        assert ratio(spread(sum(counts) - 1, inflect, depth)) < speedup


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=2.5), "whole number"),
        (dict(r=True), "whole numbers"),
        (dict(r="8"), "list with one a block"),
        (dict(r=[1, 2.0]), "whole numbers"),
        (dict(r=(8, -3)), "from -1 to 1"),
        (dict(r=8, schedule="linear"), "constant, decreasing, increasing"),
        (dict(r=8, keep=0.5), "one of r, keep and speedup"),
        (dict(keep=0), "more than 0"),
        (dict(keep=1.5), "at most 1"),
        (dict(speedup=0.5), "1 or more"),
        (dict(speedup=float("nan")), "1 or more"),
        (dict(after="drop"), "'unmerge', 'carry'"),
        (dict(position="last"), "'median', 'first'"),
        (dict(positions="calibrate"), "positions"),
        (dict(match="values"), "'keys', 'random'"),
    ],
)
def test_wrong_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        ToMe(**options)


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [3, 7, 40])
@torch.no_grad()
def test_agrees_with_the_published_algorithm(r, prop_attn):
    """On the models that the official code was written for: a class token, one norm before each half."""
    torch.manual_seed(0)
    model: nn.Module = MAKERS["timm-class"]().double().eval()
    pixels = pictures(3).double()
    want = PublishedToMe(model, r, prop_attn)(pixels)
    with vlmaccel.patched(model, ToMe(r=r, prop_attn=prop_attn)):
        assert torch.allclose(model(pixels), want, atol=1e-6)
    assert not torch.allclose(model(pixels), want, atol=1e-4)


@torch.no_grad()
def test_random_matches_are_as_many_and_the_same_every_time():
    model, pixels = MAKERS["timm-class"]().eval(), pictures(3)
    with vlmaccel.patched(model, ToMe(r=9)):
        outputs(model, pixels)
        keys = vlmaccel.stats(model)
    found = []
    for seed in (0, 0, 1):
        with vlmaccel.patched(model, ToMe(r=9, match="random", seed=seed)):
            whole = outputs(model, pixels)
            found.append(vlmaccel.stats(model))
            assert torch.allclose(outputs(model, pixels[1:2]), whole[1:2], atol=1e-6)
    assert found[0].tokens == found[2].tokens == keys.tokens
    assert torch.equal(found[0].stages[0].group, found[1].stages[0].group)
    assert not torch.equal(found[0].stages[0].group, found[2].stages[0].group)
    assert not torch.equal(found[0].stages[0].group, keys.stages[0].group)


# ---- towers inside VLMs


def by_hand(model, batch, calibrated, position):
    """Logits behind one prompt whose equal picture tokens are one token each: the unpatched decoder over the shorter
    sequence, with the sizes in the mask. Returns them with how many tokens are left."""
    features = torch.cat(list(model.get_image_features(**pixels_of(batch)).pooler_output))
    embeds = model.get_input_embeddings()(batch["input_ids"])[0].clone()
    image = (batch["input_ids"][0] == IMAGE).nonzero().flatten()
    embeds[image] = features
    newline = getattr(model.model, "image_newline", torch.full((features.shape[1],), torch.inf))
    members = {}
    for place in image.tolist():
        row = embeds[place]
        members.setdefault(place if torch.equal(row, newline) else tuple(row.tolist()), []).append(place)
    stands = {group[len(group) // 2 if position == "median" else 0]: len(group) for group in members.values()}
    keep = torch.tensor([i for i in range(len(embeds)) if i in stands or i not in image])
    size = torch.tensor([stands.get(i, 1) for i in keep.tolist()]).double()
    bias = size.log().expand(len(keep), -1)
    if calibrated:
        config = model.config.text_config
        dim = config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
        distance = (keep[:, None] - keep).double()
        turned = 2 / dim * (distance[..., None] * theta).cos().sum(-1)
        bias = bias + (2 - turned).log() * torch.isin(keep, image)
    mask = bias.masked_fill(keep[:, None] < keep, -torch.inf)[None, None].float()
    hidden = model.model.language_model(
        inputs_embeds=embeds[keep][None], position_ids=keep[None], attention_mask=mask, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden)[0, -1], len(keep)


def pixels_of(batch):
    return {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}


def one_picture(kind):
    batch = inputs(kind, 3)
    last = {name: batch[name][-1:] for name in batch}
    return last


@pytest.mark.parametrize("position", ["median", "first"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-siglip-llama", "llava-next"])
@torch.no_grad()
def test_carried_tokens_go_into_the_decoder_with_their_sizes(kind, calibrated, position):
    model, batch = build(kind), one_picture(kind)
    carry = ToMe(r=2, after="carry", positions="calibrated" if calibrated else "keep", position=position)
    with vlmaccel.patched(model, ToMe(r=2)):
        want, left = by_hand(model, batch, calibrated, position)
        unmerged = model(**batch).logits[0, -1]
    with vlmaccel.patched(model, carry):
        got = model(**batch).logits[0, -1]
        stats = vlmaccel.stats(model)
        assert stats.stages[0].keep.shape[1] == left < batch["input_ids"].shape[1]
        assert stats.stages[0].size.sum() == batch["input_ids"].shape[1]
        assert stats.tower.tokens[0] > stats.tower.tokens[-1]
        written = model.generate(**batch, max_new_tokens=4, do_sample=False)
        beams = model.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=3)
        assert written.shape[1] == beams.shape[1] == batch["input_ids"].shape[1] + 4
    assert torch.allclose(got, want, atol=2e-5)
    assert (got - unmerged).abs().max() > 1e-3  # duplicates, each at its place, are not one token of their size


@torch.no_grad()
def test_carrying_a_batch_is_carrying_its_samples():
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    with vlmaccel.patched(model, [ToMe(r=2, after="carry"), FastV(layer=2, ratio=0.5)]):
        whole = model(**batch).logits[:, -1]
        pixels = batch["pixel_values"].split([3, 0, 1])
        for b in range(3):
            real = batch["attention_mask"][b].bool()
            one = {k: batch[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}
            one |= {"pixel_values": pixels[b]} if len(pixels[b]) else {}
            assert torch.allclose(model(**one).logits[0, -1], whole[b], atol=3e-5)


@torch.no_grad()
def test_unmerging_leaves_the_decoder_all_its_tokens():
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    with vlmaccel.patched(model, ToMe(r=2)):
        model(**batch)
        stats = vlmaccel.stats(model)
    assert stats.stages == ()
    assert stats.mean_visual_tokens == stats.nominal_visual_tokens
    assert stats.tower.tokens == [10, 8, 6, 6]  # the last block's output is not used
    with vlmaccel.patched(model, ToMe(keep=0.5)):
        model(**batch)
        assert vlmaccel.stats(model).tower.tokens[-1] == 1 + 9 // 2


def test_a_model_that_interpolates_cannot_carry():
    model = build("llava-onevision")
    with pytest.raises(NotImplementedError, match='use after="unmerge"'):
        vlmaccel.patch(model, ToMe(after="carry"))
    assert not hasattr(model, "_vlmaccel")
