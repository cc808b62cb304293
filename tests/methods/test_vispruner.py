"""VisPruner: patches that the tower looks at, and others unlike one another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

import vlmaccel
from tests.support import before_decoder as check
from tests.support import models
from tests.support.towers import expected
from vlmaccel.methods import ToMe, VisPruner, vispruner
from vlmaccel.methods.greedy import cosines
from vlmaccel.methods.vispruner import unlike

VISPRUNER = VisPruner(ratio=0.6)
attns = pytest.mark.parametrize("attn", ["sdpa", "eager"])
kinds = pytest.mark.parametrize("kind", check.KINDS)


def slowly_unlike(x, kept):
    """The rounds of the paper, by lists."""
    left = list(range(len(x)))
    while len(left) > kept:
        even, odd = left[::2], left[1::2]
        alike = {i: max(float(cosine_similarity(x[i], x[j], dim=0)) for j in odd) for i in even}
        even.sort(key=lambda i: -alike[i])
        left = even[min(8, len(left) - kept, len(even)) :] + odd
    return left


@given(st.integers(2, 50), st.integers(1, 30), st.integers(0, 9))
def test_rounds_drop_what_is_most_like_another(m, kept, seed):
    x = torch.randn(m, 5, generator=torch.Generator().manual_seed(seed)).double()
    kept = min(kept, m)
    got = unlike(x.float(), kept).tolist()
    assert len(set(got)) == kept
    assert got == slowly_unlike(x.float().double(), kept)


def unlike_by_whole_rows(x, kept):
    """The rounds with whole rows of the same cosines, so that ties are the same too."""
    cosine, left = cosines(x), torch.arange(len(x))
    while len(left) > kept > 0:
        even, odd = left[::2], left[1::2]
        order = cosine[even][:, odd].amax(1).argsort(descending=True, stable=True)
        left = torch.cat([even[order[min(8, len(left) - kept, len(even)) :]], odd])
    return left if kept else left[:0]


def features(kind, m, seed=0):
    """(m, 6) float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 6, generator=generator)
    if kind == "random":
        return x
    if kind == "duplicates":
        return x[torch.randint(max(1, m // 8), (m,), generator=generator)]
    if kind == "zeros":
        return x * (torch.rand(m, 1, generator=generator) < 0.5)
    return x[torch.randint(min(3, m), (m,), generator=generator)] + 0.1 * x


@pytest.mark.parametrize("kind", ["random", "duplicates", "zeros", "clusters"])
@pytest.mark.parametrize("nearest", [1, 4, 1000])
def test_looking_at_the_nearest_first_changes_nothing(kind, nearest, monkeypatch):
    monkeypatch.setattr(vispruner, "NEAREST", nearest)
    monkeypatch.setattr(vispruner, "MANY", nearest)
    for m in range(1, 41):
        for kept in {0, 1, m // 3, m // 2, m - 1, m}:
            x = features(kind, m, seed=m)
            assert unlike(x, kept).tolist() == unlike_by_whole_rows(x, kept).tolist(), (m, kept)


@pytest.mark.parametrize("kind", ["random", "duplicates", "zeros", "clusters"])
def test_rows_without_another_among_the_nearest_are_searched_whole(kind, monkeypatch):
    monkeypatch.setattr(vispruner, "NEAREST", 8)
    monkeypatch.setattr(vispruner, "MANY", 400)
    searched, highest = {True: 0, False: 0}, vispruner.highest

    def counted(cosine, rows, others, near=None):
        searched[near is None] += len(rows)
        return highest(cosine, rows, others, near)

    monkeypatch.setattr(vispruner, "highest", counted)
    x = features(kind, 401)
    assert unlike(x, 60).tolist() == unlike_by_whole_rows(x, 60).tolist()
    assert 0 < searched[True] < searched[False]  # some, not all


@pytest.mark.parametrize(("budget", "important"), [(8, 4), (10, 5), (30, 15), (1, 0), (2, 1), (64, 32)])
def test_odd_lists_and_small_budgets_are_filled(budget, important):
    """Where the original code fails: an odd number of other patches, and fewer than 8 of them to stay."""
    assert int(budget * VisPruner().important) == important
    x = torch.randn(576 - important, 4)
    assert len(unlike(x, budget - important)) == budget - important


@pytest.mark.parametrize("x", [torch.ones(9, 3), torch.zeros(9, 3)])
@pytest.mark.parametrize("kept", [0, 1, 4, 9])
def test_equal_and_zero_features(x, kept):
    assert len(set(unlike(x, kept).tolist())) == kept


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-siglip-llama"])
@torch.no_grad()
def test_patches_are_those_of_the_paper(kind):
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    hidden = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    features = hidden[model.config.vision_feature_layer]
    features = features[:, 1:] if "clip" in kind else features
    attention = expected(kind, model, batch).view(-1, 9)
    _, stats = check.run(model, batch, VISPRUNER)
    for number, (b, place) in enumerate(check.pictures(stats)):
        order = attention[number].argsort(descending=True).tolist()
        rest = order[2:]
        wanted = order[:2] + [rest[i] for i in slowly_unlike(features[number, rest].double(), 3)]
        left = (stats.stages[0].group[b, place] >= 0).nonzero().flatten().tolist()
        assert left == sorted(wanted)


@kinds
@attns
def test_everything_stays_at_full_budget(kind, attn):
    check.check_identity(kind, attn, VisPruner(ratio=1.0))


@kinds
@attns
def test_a_batch_is_its_samples_alone(kind, attn):
    check.check_batch_is_singles(kind, attn, VISPRUNER)


def test_text_is_unaffected():
    check.check_text_is_unaffected(VISPRUNER)


@kinds
def test_decoding_over_the_cache_is_recomputing(kind):
    check.check_decoding_is_recomputing(kind, VISPRUNER)


@kinds
def test_generate_keeps_the_same(kind):
    check.check_generate_keeps_the_same(kind, VISPRUNER)


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-next", "qwen3-vl"])
def test_chunks(kind):
    check.check_chunks(kind, VISPRUNER, VisPruner(ratio=1.0))


def test_a_second_turn_with_another_picture():
    check.check_second_turn(VISPRUNER)


def test_half_precision_runs_and_keeps_the_counts():
    check.check_half_precision(VISPRUNER)


@pytest.mark.parametrize("important", [0.0, 0.5, 1.0])
@kinds
@torch.no_grad()
def test_counts(kind, important):
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    for ratio in (0.0, 0.05, 0.4, 0.95):
        _, stats = check.run(model, batch, VisPruner(ratio=ratio, important=important))
        stage = stats.stages[0]
        assert (stage.keep.diff() > 0).all() and (stage.size <= 1).all()
        for b, place in check.pictures(stats):
            wanted = 0 if ratio == 0 else max(1, int(len(place) * ratio))
            assert int((stage.group[b, place] >= 0).sum()) == wanted


@torch.no_grad()
def test_newlines_go_first():
    kind = "llava-next"
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True)
    _, stats = check.run(model, batch, VISPRUNER)
    newline = (stats.token_map.image >= 0) & (stats.token_map.grid[..., 2] < 0)
    assert bool(newline.any()) and not bool((stats.stages[0].group[newline] >= 0).any())


@torch.no_grad()
def test_later_layers_and_merged_towers():
    model, batch = models.build(check.VLM), models.inputs(check.VLM, 3, pad=True)
    _, early = check.run(model, batch, VISPRUNER)
    _, late = check.run(model, batch, VisPruner(ratio=0.6, layer=3))
    assert late.stages[0].layer == 3
    assert check.kept(early) == check.kept(late)  # it does not look at the decoder
    logits, stats = check.run(model, batch, [ToMe(r=2), VISPRUNER])
    assert logits.isfinite().all() and check.kept(stats) != check.kept(early)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"ratio": -0.1}, "a number from 0 to 1, not -0.1"),
        ({"important": 1.5}, "a share of the kept tokens, a number from 0 to 1, not 1.5"),
        ({"target": "text"}, "ranks the tokens of pictures"),
    ],
)
def test_bad_options_are_refused(options, allowed):
    with pytest.raises(ValueError, match=allowed):
        VisPruner(**options)


def test_it_is_found_by_name():
    model = models.build(check.VLM)
    with vlmaccel.patched(model, "vispruner", ratio=0.5), torch.no_grad():
        model(**models.inputs(check.VLM, 1))
        assert vlmaccel.stats(model).visual_tokens[0] == 12
