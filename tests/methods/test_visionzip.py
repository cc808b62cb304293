"""VisionZip: dominant patches, contextual ones, and what they are made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import vlmaccel
from tests.support import before_decoder as check
from tests.support import models
from tests.support.towers import expected
from vlmaccel.hooks import Method
from vlmaccel.methods import PyramidDrop, ToMe, Uniform, VisionZip
from vlmaccel.methods.visionzip import join_targets

VISIONZIP = VisionZip(ratio=0.6, contextual=0.4)  # 5 of 9 patches, 2 of them contextual
attns = pytest.mark.parametrize("attn", ["sdpa", "eager"])
kinds = pytest.mark.parametrize("kind", check.KINDS)


@pytest.mark.parametrize(("budget", "dominant", "contextual"), [(64, 54, 10), (128, 108, 20), (192, 162, 30)])
def test_the_published_budgets(budget, dominant, contextual):
    method = VisionZip(ratio=budget / 576)
    assert int(method.count(torch.tensor([576]), method.ratio)) == budget
    assert method.split(budget) == contextual and budget - contextual == dominant
    assert int(VisionZip().count(torch.tensor([576]), VisionZip().ratio)) == 64


def test_small_budgets():
    assert [VisionZip().split(kept) for kept in (0, 1, 2, 3, 12, 13)] == [0, 0, 1, 1, 1, 2]
    assert [VisionZip(contextual=0).split(kept) for kept in (0, 1, 64)] == [0, 0, 0]
    assert VisionZip(contextual=1).split(5) == 4
    assert VisionZip(ratio=0.01).count(torch.tensor([0, 5, 576]), 0.01).tolist() == [1, 1, 5]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_targets_are_evenly_spread_and_the_likest_is_joined(rest, number, seed):
    keys = torch.randn(rest, 4, generator=torch.Generator().manual_seed(seed))
    joined = join_targets(keys, number).tolist()
    step = max(1, rest // number)
    targets = [i * step for i in range(number) if i * step < rest][:number]
    assert sorted(set(joined)) == sorted(set(targets)) == sorted({joined[t] for t in targets})
    for i, target in enumerate(joined):
        cosines = [float(normalize(keys[i], dim=0) @ normalize(keys[t], dim=0)) for t in targets]
        assert target == i or (i not in targets and cosines[targets.index(target)] >= max(cosines) - 1e-6)


def test_equal_and_zero_keys_join_the_first_target():
    for keys in (torch.ones(6, 3), torch.zeros(6, 3)):
        assert join_targets(keys, 2).tolist() == [0, 0, 0, 3, 0, 0]


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-siglip-llama"])
@torch.no_grad()
def test_tokens_are_those_of_the_paper(kind):
    """Against the algorithm written out for one picture after the other, from whole attention matrices."""
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    layer = model.config.vision_feature_layer
    hidden = tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    block = tower.encoder.layers[layer]
    keys = block.self_attn.k_proj(block.layer_norm1(hidden[layer - 1])).unflatten(-1, (4, -1)).mean(2)
    start = 1 if "clip" in kind else 0
    attention = expected(kind, model, batch).view(-1, 9)
    caught = Embeddings()
    _, stats = check.run(model, batch, [VISIONZIP, caught])
    for number, (b, place) in enumerate(check.pictures(stats)):
        key, feature = keys[number, start:], hidden[layer][number, start:]
        dominant = sorted(attention[number].argsort(descending=True)[:3].tolist())
        rest = [i for i in range(9) if i not in dominant]
        targets = [rest[0], rest[3]]  # 6 // 2 apart
        joined = {target: [] for target in targets}
        for i in rest:
            if i not in targets:
                cosines = [float(normalize(key[i], dim=0) @ normalize(key[t], dim=0)) for t in targets]
                joined[targets[cosines.index(max(cosines))]].append(i)
        wanted = {i: feature[i] for i in dominant}
        for target, others in joined.items():
            wanted[target] = feature[target] + (sum(feature[i] for i in others) / len(others) if others else 0)
        slots = stats.stages[0].group[b, place[sorted(wanted)]]
        assert torch.equal(stats.stages[0].keep[b, slots], place[sorted(wanted)])
        assert torch.allclose(
            caught.hidden[b, slots], projector(torch.stack([wanted[i] for i in sorted(wanted)])), atol=1e-5
        )
        assert stats.stages[0].size[b, slots].tolist() == [1 + len(joined.get(i, ())) for i in sorted(wanted)]


class Embeddings(Method):
    """Keeps the input of decoder layer 0."""

    name = "embeddings"

    def decoder_layers(self, depth):
        return (0,)

    def decoder_layer(self, at):
        self.hidden = at.hidden


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@torch.no_grad()
def test_qwen_averages_tokens(kind):
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    whole, caught = Embeddings(), Embeddings()
    check.run(model, batch, whole)
    _, stats = check.run(model, batch, [VISIONZIP, caught])
    attention, stage, seen, merged = expected(kind, model, batch), stats.stages[0], 0, 0
    for b, place in check.pictures(stats):
        n = len(place)
        budget = int(n * 0.6 + 1e-6)
        scores, seen = attention[seen : seen + n], seen + n
        dominant = set(scores.argsort(descending=True)[: budget - VISIONZIP.split(budget)].tolist())
        group = stage.group[b, place]
        assert bool((group >= 0).all()) == (VISIONZIP.split(budget) > 0)  # what is not dominant is merged, or dropped
        slots = group[group >= 0].unique().tolist()
        assert len(slots) == budget
        for slot in slots:
            target = int(stage.keep[b, slot])
            others = [int(p) for p in place[group == slot] if p != target]
            value = whole.hidden[b, target]
            if others:
                value, merged = value + whole.hidden[b, others].mean(0), merged + 1
                assert int((place == target).nonzero()) not in dominant
            assert torch.allclose(caught.hidden[b, slot], value, atol=1e-5)
    assert merged


@kinds
@attns
def test_everything_stays_at_full_budget(kind, attn):
    check.check_identity(kind, attn, VisionZip(ratio=1.0))


@kinds
@attns
def test_a_batch_is_its_samples_alone(kind, attn):
    check.check_batch_is_singles(kind, attn, VISIONZIP)


@pytest.mark.parametrize("method", [VISIONZIP, VisionZip(ratio=0.4, positions="keep", prop_attn=True)])
def test_text_is_unaffected(method):
    check.check_text_is_unaffected(method)


@kinds
def test_decoding_over_the_cache_is_recomputing(kind):
    check.check_decoding_is_recomputing(kind, VISIONZIP)


@kinds
def test_generate_keeps_the_same(kind):
    check.check_generate_keeps_the_same(kind, VISIONZIP)


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-next", "qwen3-vl"])
def test_chunks(kind):
    check.check_chunks(kind, VISIONZIP, VisionZip(ratio=1.0))


def test_a_second_turn_with_another_picture():
    check.check_second_turn(VISIONZIP)


def test_half_precision_runs_and_keeps_the_counts():
    check.check_half_precision(VISIONZIP)


@kinds
@torch.no_grad()
def test_counts(kind):
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    for ratio in (0.0, 0.05, 0.3, 0.9):
        _, stats = check.run(model, batch, VisionZip(ratio=ratio))
        stage = stats.stages[0]
        assert (stage.keep.diff() > 0).all()
        for b, place in check.pictures(stats):
            group = stage.group[b, place]
            wanted = 0 if ratio == 0 else max(1, int(len(place) * ratio + 1e-6))
            assert len(group[group >= 0].unique()) == wanted


@settings(max_examples=10)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["llava-next", "qwen2.5-vl"]))
def test_any_budget_is_kept_to(ratio, contextual, kind):
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    method = VisionZip(ratio=ratio, contextual=contextual)
    logits, stats = check.run(model, batch, method)
    assert logits.isfinite().all()
    for b, place in check.pictures(stats):
        group = stats.stages[0].group[b, place] if stats.stages else place
        assert len(group[group >= 0].unique()) == int(method.count(torch.tensor(len(place)), ratio))


@torch.no_grad()
def test_newlines_go_first():
    kind = "llava-next"
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    _, stats = check.run(model, batch, VISIONZIP)
    grid, stage = stats.token_map.grid, stats.stages[0]
    newline = (stats.token_map.image >= 0) & (grid[..., 2] < 0)
    assert bool(newline.any()) and not bool((stage.group[newline] >= 0).any())


@torch.no_grad()
def test_together_with_others():
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 3, pad=True)
    for others in ([ToMe(r=1)], [ToMe(r=1, after="carry")], [Uniform(ratio=0.8)]):
        logits, stats = check.run(model, batch, [*others, VISIONZIP, PyramidDrop(layers=(3,), ratio=0.3)])
        assert logits.isfinite().all()
        for b, place in check.pictures(stats):
            last = stats.stages[-1].group[b, place]
            assert len(last[last >= 0].unique()) == 2


@torch.no_grad()
def test_the_same_picture_twice_and_a_flat_one():
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 1)
    batch["pixel_values"][1] = batch["pixel_values"][0]
    batch["pixel_values"][2] = 0
    _, stats = check.run(model, batch, VISIONZIP)
    groups = [stats.stages[0].group[b, place] for b, place in check.pictures(stats)]
    assert (groups[0] - groups[0].min()).tolist() == (groups[1] - groups[1].min()).tolist()
    assert len(groups[2].unique()) == 5


def test_gradients_reach_the_projector():
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 3, pad=True)
    ids = batch["input_ids"]
    labels = ids.masked_fill((ids == models.IMAGE) | (batch["attention_mask"] == 0), -100)
    with vlmaccel.patched(model, VISIONZIP):
        model(**batch, labels=labels).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"ratio": 2}, "a number from 0 to 1, not 2"),
        ({"contextual": -1}, "a share of the kept tokens, a number from 0 to 1, not -1"),
        ({"contextual": "some"}, "a number from 0 to 1, not 'some'"),
        ({"positions": "all"}, "positions must be one of"),
    ],
)
def test_bad_options_are_refused(options, allowed):
    with pytest.raises(ValueError, match=allowed):
        VisionZip(**options)


def test_text_models_are_refused():
    with pytest.raises(NotImplementedError, match="attention of a vision tower"):
        vlmaccel.patch(models.build("llama"), VisionZip())


def test_only_merged_slots_are_projected():
    """What is kept alone has its projected features to the bit."""
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 1)
    whole, caught = Embeddings(), Embeddings()
    check.run(model, batch, whole)
    _, stats = check.run(model, batch, [VISIONZIP, caught])
    stage = stats.stages[0]
    lone = stage.size[0] == 1
    assert torch.equal(caught.hidden[0, lone], whole.hidden[0, stage.keep[0, lone]])
