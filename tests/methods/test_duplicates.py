"""Duplicates: tokens that are equal to the bit become one."""

import pytest
import torch

import vlmaccel
from tests.support import before_decoder as check
from tests.support import models
from vlmaccel.methods import Duplicates, ToMe
from vlmaccel.run import Modality

MERGED = [ToMe(r=2), Duplicates()]  # a tower that makes equal tokens
attns = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def still_video(kind):
    """Inputs whose video (sample 2) stands still from its first patch in time on."""
    batch = models.inputs(kind, 3, pad=True, video=True)
    frames, height, width = batch["video_grid_thw"][0].tolist()
    pixels = batch["pixel_values_videos"]
    first = pixels[: height * width]
    batch["pixel_values_videos"] = torch.cat([first.repeat(frames, 1), pixels[frames * height * width :]])
    return batch, frames


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@torch.no_grad()
def test_frames_that_stand_still_become_one(kind):
    model, (batch, frames) = models.build(kind), still_video(kind)
    _, stats = check.run(model, batch, Duplicates())
    (stage,), tokens = stats.stages, stats.token_map
    video = tokens.modality == Modality.VIDEO
    size = stage.size[video.gather(1, stage.keep) & (stage.size > 0)]
    assert frames > 1 and bool((size == frames).all())
    assert int(size.sum()) == int(video.sum())
    picture = tokens.modality == Modality.IMAGE
    assert bool((stage.group[picture] >= 0).all())
    for b in range(3):
        for slot in stage.group[b, video[b]].unique().tolist():
            members = tokens.grid[b, video[b]][stage.group[b, video[b]] == slot]
            assert len(members[:, 1:].unique(dim=0)) == 1  # the same place in every frame


@pytest.mark.parametrize("kind", check.KINDS)
@attns
def test_nothing_changes_where_nothing_is_equal(kind, attn):
    check.check_identity(kind, attn, Duplicates())


def test_it_is_what_tome_carries():
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 3, pad=True)
    logits, stats = check.run(model, batch, MERGED)
    carried, same = check.run(model, batch, ToMe(r=2, after="carry", prop_attn=True))
    assert torch.equal(logits, carried)
    assert check.kept(stats) == check.kept(same)


@torch.no_grad()
def test_one_layer_sees_copies_at_one_place():
    """In a decoder of one layer, the end of the prompt is as if every copy were there, at the place of the one that
    stands for it."""
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 1)
    text = model.model.language_model
    text.layers, text.config.num_hidden_layers = text.layers[:1], 1
    logits, stats = check.run(model, batch, MERGED)
    (stage,) = stats.stages
    assert int(stage.size.max()) > 1
    place = stage.keep.gather(1, stage.group)
    with vlmaccel.patched(model, ToMe(r=2)):
        copies = model(**batch, position_ids=place).logits
        plain = model(**batch).logits
    assert torch.allclose(logits[0, -1], copies[0, -1], atol=1e-5)
    assert not torch.allclose(plain[0, -1], copies[0, -1], atol=1e-3)  # but copies stand at different places


@attns
@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-siglip-llama", "llava-next"])
def test_a_batch_is_its_samples_alone(kind, attn):
    check.check_batch_is_singles(kind, attn, MERGED)


def test_text_is_unaffected():
    check.check_text_is_unaffected(MERGED)


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-next"])
def test_decoding_over_the_cache_is_recomputing(kind):
    check.check_decoding_is_recomputing(kind, MERGED)


def test_half_precision_runs():
    model, batch = models.build(check.VLM).to(torch.bfloat16), models.inputs(check.VLM, 3, pad=True)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    logits, stats = check.run(model, batch, MERGED)
    assert logits.isfinite().all() and len(stats.stages) == 1


@torch.no_grad()
def test_all_tokens_equal():
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 3, pad=True)
    model.model.multi_modal_projector.linear_2.weight.zero_()
    logits, stats = check.run(model, batch, Duplicates(position="first"))
    assert logits.isfinite().all()
    for b, place in check.pictures(stats):
        slots = stats.stages[0].group[b, place].unique()
        assert len(slots) == 1 and int(stats.stages[0].keep[b, slots]) == int(place[0])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"position": "last"}, "position must be one of 'median', 'first'"),
        ({"positions": "all"}, "positions must be one of"),
    ],
)
def test_bad_options_are_refused(options, allowed):
    with pytest.raises(ValueError, match=allowed):
        Duplicates(**options)
