"""SparseVLM and SparseVLM+: raters, counts, recycled tokens, and what rotary positions do."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmaccel
from tests.support import before_decoder as check
from tests.support import models
from tests.support.drops import answer_tokens, decode, with_answer
from vlmaccel.hooks import Method
from vlmaccel.methods import FastV, SparseVLM, SparseVLMPlus, Uniform, VisionZip
from vlmaccel.methods.sparsevlm import density_peaks, raters
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality, Stage

METHODS = {
    "sparsevlm": SparseVLM(ratios=(0.6, 0.4, 0.2)),
    "sparsevlm-late": SparseVLM(layers=(1, 4), ratios=(0.5, 0.3), positions="keep", prop_attn=True),
    "sparsevlm-plus": SparseVLMPlus(ratios=(0.6, 0.4, 0.2)),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
attns = pytest.mark.parametrize("attn", ["sdpa", "eager"])
kinds = pytest.mark.parametrize("kind", check.KINDS)


@pytest.mark.parametrize(
    ("method", "tokens", "sizes", "mean"),
    [
        (SparseVLM, 192, (309, 204, 113), 206.5),
        (SparseVLM, 128, (312, 117, 39), 145.4),
        (SparseVLM, 96, (249, 55, 27), 114.1),
        (SparseVLM, 64, (82, 32, 18), 82.3),
        (SparseVLMPlus, 192, (300, 200, 118), 206.8),
        (SparseVLMPlus, 128, (238, 108, 60), 144.1),
        (SparseVLMPlus, 96, (246, 54, 28), 113.9),
        (SparseVLMPlus, 64, (66, 34, 20), 81.8),
    ],
)
def test_counts_are_those_of_the_official_code(method, tokens, sizes, mean):
    method = method(tokens=tokens)
    stages = method.stages(32)
    assert list(stages) == [3, 7, 16] and list(method.attention_layers(32)) == [2, 6, 15]
    left, per_layer = 576, [576.0] * 3
    for (layer, ratio), wanted in zip(stages.items(), sizes, strict=True):
        kept = int(method.count(torch.tensor(576), ratio))
        recycled = method.recycled(left - kept)
        left = kept + (recycled // 10 + 1 if recycled else 0)
        assert left == wanted
        until = {3: 7, 7: 16, 16: 32}[layer]
        per_layer += [float(left)] * (until - layer)
    assert sum(per_layer) / 32 == pytest.approx(mean, abs=0.051)


def test_layers_of_other_depths():
    assert list(SparseVLM().stages(28)) == [2, 6, 14]
    assert list(SparseVLM().stages(6)) == [1, 2, 3]
    assert list(SparseVLM().stages(3)) == [1, 2]
    assert list(SparseVLM().stages(1)) == []
    assert list(SparseVLM(layers=[1, 3], ratios=[0.5, 0.2]).stages(6)) == [2, 4]


def test_raters_are_the_words_that_visual_tokens_take_to():
    visual, text = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0], [0.9, 9.0]])
    assert raters(visual, text).tolist() == [False, True, True]
    assert raters(visual, torch.ones(3, 2)).all()  # no word is above the mean
    assert raters(visual, text[:1]).all()


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 9))
def test_clusters_are_those_of_density_peaks(m, clusters, seed):
    """Against the definition, row by row."""
    x = torch.randn(m, 3, generator=torch.Generator().manual_seed(seed))
    clusters = min(clusters, m)
    distance = [[float((a - b).norm()) / math.sqrt(3) for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) for row in distance]
    rank = [(round(density[i], 6), -i) for i in range(m)]  # of two nearest neighbours alone both are as dense
    delta = [
        min((distance[i][j] for j in range(m) if rank[j] > rank[i]), default=max(map(max, distance))) for i in range(m)
    ]
    centres = sorted(range(m), key=lambda i: round(-density[i] * delta[i], 6))[:clusters]
    joined = density_peaks(x, clusters).tolist()
    assert set(joined) == set(centres)
    for i, centre in enumerate(joined):
        assert centre == i if i in centres else distance[i][centre] <= min(distance[i][c] for c in centres) + 1e-6


@pytest.mark.parametrize("x", [torch.ones(7, 3), torch.zeros(7, 3), torch.eye(7)[[0, 0, 0, 1, 1, 2, 2]]])
def test_clusters_of_equal_rows(x):
    joined = density_peaks(x, 3)
    assert len(joined.unique()) == 3
    assert torch.equal(joined[joined], joined)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("kind", ["llava-clip-llama", "qwen2-vl"])
@torch.no_grad()
def test_tokens_are_those_of_the_paper(kind, plus):
    """The first stage against whole attention matrices of the unpatched model, one picture after the other."""
    model, batch = models.build(kind, "eager"), models.inputs(kind, 3, pad=True)
    method = (SparseVLMPlus if plus else SparseVLM)(layers=(1,), ratios=(0.4,))
    caught = Inputs()
    check.run(model, batch, caught)
    _, stats = check.run(model, batch, [method, caught])
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    attention, modality = out.attentions[1], stats.token_map.modality
    embeds, hidden = out.hidden_states[0], out.hidden_states[2]
    for b, place in check.pictures(stats):
        words = [i for i in range(modality.shape[1]) if modality[b, i] == Modality.TEXT and i > int(place[-1])]
        likes = torch.stack([(embeds[b, p] @ embeds[b, words].T).softmax(0) for p in place]).mean(0)
        rows = [w for w, like in zip(words, likes, strict=True) if like > likes.mean()]
        rated = attention[b][:, rows][:, :, place].double()  # heads, raters, tokens
        if plus:
            turned = apart(model, batch, b, rows, place.tolist())
            rated = (rated / turned.clamp(min=0.05)).mean(1)
            best = rated.sum(1).argsort(descending=True)[: round(4 * 14 / 32)]
            score = rated[best].mean(0)
        else:
            score = rated.mean((0, 1))
        kept = round(len(place) * 0.4)
        order = score.argsort(descending=True).tolist()
        size = 0 if plus else int(0.3 * (len(place) - kept)) + 1
        left = set(order[:kept])
        recycled = order[kept : kept + size]
        group = stats.stages[0].group[b, place]
        assert set((group >= 0).nonzero().flatten().tolist()) == left | set(recycled)
        if recycled:
            centre = density_peaks(hidden[b, place[recycled]], size // 10 + 1).tolist()
            for i in set(centre):
                members = place[[r for r, c in zip(recycled, centre, strict=True) if c == i]]
                slot = int(stats.stages[0].group[b, members[0]])
                assert bool((stats.stages[0].group[b, members] == slot).all())
                assert int(stats.stages[0].keep[b, slot]) == int(place[recycled[i]])
                assert torch.allclose(caught.hidden[b, slot], hidden[b, members].mean(0), atol=1e-5)


def apart(model, batch, b, rows, columns):
    """(rows, columns) mean cosine of the angles between their rotary positions."""
    caught = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda m, a, k: caught.append(k["position_embeddings"]), with_kwargs=True
    )
    model(**batch)
    handle.remove()
    cos, sin = (x.expand(len(batch["input_ids"]), -1, -1)[b].double() for x in caught[0])
    return (cos[rows] @ cos[columns].T + sin[rows] @ sin[columns].T) / cos.shape[-1]


class Inputs(Method):
    """Keeps the input of decoder layer 2."""

    name = "inputs"

    def decoder_layers(self, depth):
        return (2,)

    def decoder_layer(self, at):
        self.hidden = at.hidden


@kinds
@attns
def test_everything_stays_at_full_budget(kind, attn):
    for method in (SparseVLM, SparseVLMPlus):
        check.check_identity(kind, attn, method(ratios=(1.0, 1.0, 1.0)))


@every_method
@kinds
@attns
def test_a_batch_is_its_samples_alone(kind, attn, method):
    check.check_batch_is_singles(kind, attn, method)


@every_method
def test_text_is_unaffected(method):
    check.check_text_is_unaffected(method)


@every_method
@pytest.mark.parametrize("kind", ["llava-clip-llama", "qwen2-vl"])
@torch.no_grad()
def test_decoding_over_the_cache_is_recomputing(kind, method):
    """Eight steps are one forward without a cache in which the prompt loses the same."""
    if kind in models.QWEN and method.positions is None:
        method = SparseVLM(ratios=method.ratios, positions="keep")
    model, batch, later = models.build(kind), models.inputs(kind, 3, pad=True), answer_tokens(3)
    with vlmaccel.patched(model, method):
        _, steps = decode(model, batch, later)
        model(**batch)
        stages = {stage.layer: stage for stage in vlmaccel.stats(model).stages}
    assert len(stages) == len(method.stages(models.DEPTH))
    replay = Replay(stages, method.positions, method.prop_attn)
    with vlmaccel.patched(model, replay):
        again = model(**with_answer(batch, later), use_cache=False).logits[:, -8:]
    assert torch.allclose(steps, again, atol=5e-5)


@dataclass(frozen=True, eq=False)
class Replay(Method):
    """Drops and merges what another method did in a prompt, in that prompt with an answer behind it."""

    name = "replay"
    plan: dict[int, Stage]
    positions: str | None = None
    prop_attn: bool = False

    def decoder_layers(self, depth):
        return tuple(self.plan)

    def decoder_layer(self, at):
        stage, n = self.plan[at.layer], at.hidden.shape[1]
        index = torch.arange(n).repeat(at.hidden.shape[0], 1) if at.run.index is None else at.run.index
        prompt = stage.group.shape[1]
        group = stage.group.gather(1, index.clamp(max=prompt - 1))
        joined = stage.keep.gather(1, group.clamp(min=0))
        slot = torch.searchsorted(index, joined).masked_fill(group < 0, -1)
        slot = torch.where(index < prompt, slot, torch.arange(n))
        return Reduction.merge_into(slot.masked_fill(at.tokens.modality == Modality.PAD, -1))  # fillers are no members

    def merged(self, at, reduction):
        return reduction.apply(at.hidden)


@every_method
@torch.no_grad()
def test_generate_keeps_the_same(method):
    check.check_generate_keeps_the_same(check.VLM, method)


@every_method
def test_half_precision_runs_and_keeps_the_counts(method):
    check.check_half_precision(method)


@kinds
@torch.no_grad()
def test_counts(kind):
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    for ratios in ((0.0, 0.0, 0.0), (0.9, 0.1, 0.0), (0.6, 0.4, 0.2)):
        for method in (SparseVLM(ratios=ratios), SparseVLMPlus(ratios=ratios)):
            _, stats = check.run(model, batch, method)
            for b, place in check.pictures(stats):
                left, group, done = len(place), place, {stage.layer: stage for stage in stats.stages}
                for layer, ratio in method.stages(models.DEPTH).items():
                    kept = 0 if ratio == 0 else max(1, round(len(place) * ratio))
                    if kept and left > kept:
                        recycled = min(method.recycled(left - kept), left - kept)
                        left = kept + (recycled // 10 + 1 if recycled else 0)
                    elif not kept:
                        left = 0
                    group = done[layer].group[b, place] if layer in done else group
                    assert len(group[group >= 0].unique()) == left


@every_method
@torch.no_grad()
def test_a_picture_with_no_words_behind_it(method):
    """The prompt's last token, or none of the text before, has to rate."""
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 1)
    n = models.picture_tokens(check.VLM, (24, 24))
    batch = {
        "input_ids": torch.tensor([[5, 6, *[models.IMAGE] * n]]),
        "pixel_values": batch["pixel_values"][:1],
    }
    logits, stats = check.run(model, batch, method)
    assert logits.isfinite().all() and stats.stages


@every_method
def test_a_second_turn_with_another_picture(method):
    check.check_second_turn(method)


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-next", "qwen3-vl"])
def test_chunks(kind):
    for name in ("sparsevlm", "sparsevlm-plus"):
        check.check_chunks(kind, METHODS[name], replace(METHODS[name], ratios=(1.0, 1.0, 1.0)))


@torch.no_grad()
def test_together_with_others():
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 3, pad=True)
    for other in (FastV(layer=2, ratio=0.5), Uniform(ratio=0.7), VisionZip(ratio=0.8)):
        logits, stats = check.run(model, batch, [other, METHODS["sparsevlm"]])
        assert logits.isfinite().all() and len(stats.stages) >= 3


@every_method
@torch.no_grad()
def test_hidden_states_that_are_nan_are_refused(method):
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 1)
    plain = model(**batch).logits
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    before = weight[0, 0].clone()
    weight[0, 0] = math.nan
    with vlmaccel.patched(model, method), pytest.raises(ValueError, match="NaN.*bfloat16 or float32"):
        model(**batch)
    weight[0, 0] = before
    assert torch.equal(model(**batch).logits, plain)


@every_method
@torch.no_grad()
def test_equal_and_zero_tokens(method):
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 3, pad=True)
    model.model.multi_modal_projector.linear_2.weight.zero_()
    model.model.multi_modal_projector.linear_2.bias.zero_()
    logits, stats = check.run(model, batch, method)
    assert logits.isfinite().all()
    assert all((stage.keep.diff() > 0).all() for stage in stats.stages)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"tokens": 100}, "tokens must be one of 192, 128, 96, 64, not 100"),
        ({"ratios": (0.5, 0.4)}, "3 stages need as many ratios, not 2"),
        ({"layers": (4, 2, 6)}, "layers of the stages must increase"),
        ({"ratios": (0.1, 0.4, 0.2)}, "cannot grow"),
        ({"ratios": (2, 1, 1)}, "a number from 0 to 1, not 2"),
        ({"layers": (-1, 2, 6)}, "number of a decoder layer"),
        ({"positions": "all"}, "positions must be one of"),
    ],
)
def test_bad_options_are_refused(options, allowed):
    with pytest.raises(ValueError, match=allowed):
        SparseVLM(**options)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="layers 0 to 5"):
        vlmaccel.patch(models.build(check.VLM), SparseVLM(layers=(5,), ratios=(0.5,)))
