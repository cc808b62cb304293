"""What methods before the decoder are told of the vision tower, whatever way the pictures came."""

import copy
import gc
import math
import pickle

import pytest
import torch
import transformers as hf

import vlmaccel
from tests.support import models, tiled
from tests.support.memory import Largest
from tests.support.towers import Probe, expected, probed
from vlmaccel.adapters import patches as module
from vlmaccel.adapters.patches import find_rows, received
from vlmaccel.kernels.score_rows import score_rows
from vlmaccel.methods import SparseVLM, SparseVLMPlus, ToMe, VisionZip, VisPruner

KINDS = ("llava-clip-llama", "llava-siglip-llama", "llava-next", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")


def close(got, wanted):
    newline = wanted.isnan()
    assert torch.equal(got.isnan(), newline)
    assert torch.allclose(got[~newline].double(), wanted[~newline], atol=1e-5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_of_the_tower(kind, attn):
    model, batch = models.build(kind, attn), models.inputs(kind, 3, pad=True)
    wanted = expected(kind, model, batch)
    assert wanted[~wanted.isnan()].std() > 0.01
    close(probed(model, batch).attention_of_tokens(), wanted)
    close(probed(model, batch, use_cache=True).attention_of_tokens(), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_not_normalised_again(kind, monkeypatch):
    """The tower's own fused attention has told their log-sum-exp."""
    known = []
    monkeypatch.setattr(module, "score_rows", lambda *args: known.append(args[8]) or score_rows(*args))
    probed(models.build(kind), models.inputs(kind, 3, pad=True))
    assert known and all(lse is not None for lse in known)


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-next", "qwen2.5-vl"])
def test_beams_and_chunks_find_their_patches(kind):
    model, batch = models.build(kind), models.inputs(kind, 1)
    wanted = expected(kind, model, batch)
    close(probed(model, batch, num_beams=2).attention_of_tokens(), wanted.repeat(2))
    close(probed(model, batch, prefill_chunk_size=5).attention_of_tokens(), wanted)


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-siglip-llama"])
@torch.no_grad()
def test_patches_are_what_the_projector_projects(kind):
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    ((patches, image),) = probed(model, batch).seen
    features = model.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    row = patches.row[image >= 0]
    assert torch.equal(patches.project(patches.features[row]), torch.cat(list(features))) or torch.allclose(
        patches.project(patches.features[row]), torch.cat(list(features)), atol=1e-5
    )
    assert bool((patches.row[image < 0] == -1).all())
    tower = model.model.vision_tower
    hidden = tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    layer = model.config.vision_feature_layer
    block = tower.encoder.layers[layer]
    keys = block.self_attn.k_proj(block.layer_norm1(hidden[layer - 1])).unflatten(-1, (4, -1)).mean(2)
    keys = keys[:, 1:] if "clip" in kind else keys
    assert torch.allclose(patches.keys[row], keys.flatten(0, 1), atol=1e-5)


def test_a_video_has_its_frames_patches():
    kind = "qwen2.5-vl"
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True, video=True)
    ((patches, image),) = probed(model, batch).seen
    assert bool((patches.row[image >= 0] >= 0).all())
    assert len(patches.attention) == int((image >= 0).sum())


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-siglip-llama"])
@pytest.mark.parametrize("weighed", [True, False])
@torch.no_grad()
def test_patches_that_a_tower_merged_share_what_their_token_gets(kind, weighed):
    model, batch = models.build(kind), models.inputs(kind, 3)
    probe, tome = Probe(), ToMe(r=[2], prop_attn=weighed)
    with vlmaccel.patched(model, [tome, probe]):
        model(**batch)
        stages = vlmaccel.stats(model).tower.stages
    ((patches, image),) = probe.seen
    got = patches.attention[patches.row[image >= 0]]
    # the same tower, by hand: the second block sees merged tokens, with log(size) on the keys
    tower, merge = model.model.vision_tower, stages[0]
    with vlmaccel.patched(tower, tome):
        caught = {}
        block = tower.encoder.layers[1]
        handle = block.self_attn.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
        tower(batch["pixel_values"])
        handle.remove()
    attention, x = block.self_attn, caught["hidden_states"]
    q, k = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
    bias = merge.size.log()[:, None, None] * weighed
    weights = (q @ k.mT * attention.head_dim**-0.5 + bias).softmax(-1).mean(1)
    rows = weights[:, :1] if "clip" in kind else weights.gather(1, merge.group[..., None].expand(-1, -1, k.shape[2]))
    share = (rows.sum(1) / merge.size).gather(1, merge.group)
    assert torch.allclose(got, (share[:, 1:] if "clip" in kind else share).flatten(), atol=1e-5)


def test_nothing_is_kept_when_the_pictures_are_gone():
    kind = "llava-clip-llama"
    model, batch = models.build(kind), models.inputs(kind, 1)
    vlmaccel.patch(model, VisPruner(ratio=0.5))
    with torch.no_grad():
        model(**batch)
        gc.collect()
        assert not model._vlmaccel.patches._seen()
        encoded = model.model.get_image_features(batch["pixel_values"], return_dict=True)
        assert len(model._vlmaccel.patches._seen()) == 1
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        again = model(**text, mm_encoder_outputs={"image": encoded}).logits
        assert torch.equal(again, model(**batch).logits)


def test_copies_have_their_own():
    kind = "llava-clip-llama"
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    vlmaccel.patch(model, VisionZip(ratio=0.4))
    pickled = pickle.dumps(model)  # before transformers puts in hooks of its own, which cannot be
    with torch.no_grad():
        logits = model(**batch).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickled)):
            assert twin._vlmaccel.patches is not model._vlmaccel.patches
            assert torch.equal(twin(**batch).logits, logits)


@pytest.mark.parametrize("kind", ["llama", *tiled.TILED])
@torch.no_grad()
def test_models_that_cannot_tell_are_refused(kind):
    model, batch = models.build(kind), models.inputs(kind, 1)
    plain = model(**batch).logits
    with pytest.raises(NotImplementedError, match=r"attention of a vision tower.*LLaVA-NeXT.*Qwen2.5-VL"):
        vlmaccel.patch(model, "visionzip")
    assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_interpolated_features_are_refused():
    kind = "llava-onevision"
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)  # the tallest picture is interpolated
    plain = model(**batch).logits
    with vlmaccel.patched(model, VisPruner(ratio=0.5)):
        with pytest.raises(ValueError, match="are not what the projector made of patches"):
            model(**batch)
        model(**models.inputs(kind, 1))  # small ones are not
        assert vlmaccel.stats(model).stages
    with vlmaccel.patched(model, VisPruner(ratio=1.0)):
        assert torch.equal(model(**batch).logits, plain)
    assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_pictures_that_were_encoded_before_are_refused():
    kind = "llava-clip-llama"
    model, batch = models.build(kind), models.inputs(kind, 1)
    encoded = model.model.get_image_features(batch.pop("pixel_values"), return_dict=True)
    with vlmaccel.patched(model, VisionZip()), pytest.raises(ValueError, match="encoded before the model was patched"):
        model(**batch, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("kind", ["llava-clip-llama", "qwen2-vl"])
@torch.no_grad()
def test_pictures_that_are_nan_are_refused(kind):
    model, batch = models.build(kind), models.inputs(kind, 1)
    batch["pixel_values"][0, 0] = math.nan
    for method in (VisionZip(), VisPruner()):
        with vlmaccel.patched(model, method), pytest.raises(ValueError, match="bfloat16 or float32"):
            model(**batch)


def test_several_layers_of_features_are_refused():
    model = models.build("llava-clip-llama")
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(NotImplementedError, match="one vision_feature_layer"):
        vlmaccel.patch(model, "vispruner")


def test_equal_rows_are_found_by_their_bits():
    table = torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0], [math.nan, 0.0]])
    wanted = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [3.0, 2.0], [math.nan, 0.0]])
    assert find_rows(wanted, table).tolist() == [0, -1, -1, 3]
    assert find_rows(wanted.bfloat16(), table.bfloat16()).tolist() == [0, -1, -1, 3]
    assert find_rows(wanted, table[:0]).tolist() == [-1] * 4 and find_rows(wanted[:0], table).tolist() == []


def test_received_is_the_column_sum_of_the_whole_matrix():
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4)
    bias = torch.tensor([[0.0, 1, 0, 2, 0], [0, 0, -1, 0, 0]])
    whole = (query @ key.mT * 0.3 + bias[:, None, None]).softmax(-1)
    assert torch.allclose(received(query, key, 0.3, bias), whole.sum(2).mean(1), atol=1e-6)


@pytest.mark.parametrize("method", [VisionZip(ratio=0.1), SparseVLM(tokens=64), SparseVLMPlus(tokens=64)])
@pytest.mark.parametrize("tower", [hf.CLIPVisionConfig, hf.SiglipVisionConfig])
@torch.no_grad()
def test_no_attention_matrix_is_made(tower, method):
    vision = tower(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, image_size=128, patch_size=4
    )
    text = models.TEXT_CONFIGS["llama"]()
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=models.IMAGE,
        vision_feature_select_strategy="default" if tower is hf.CLIPVisionConfig else "full",
    )
    model, n = hf.LlavaForConditionalGeneration(config).eval(), 32 * 32
    batch = {"input_ids": torch.tensor([[5, *[models.IMAGE] * n, 7]]), "pixel_values": torch.randn(1, 3, 128, 128)}
    with vlmaccel.patched(model, method), Largest() as largest:
        model(**batch)
    assert 0 < largest.bytes < 4 * n * n
