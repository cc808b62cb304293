"""LOOK-M: what merging does to keys and values, and that a merged key with its log count weighs as its members."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

import vlmaccel
from tests.support.drops import answer_tokens, decode
from tests.support.models import build, inputs
from vlmaccel.cache import PrunedLayer
from vlmaccel.methods import LookM, MixedPrecisionKV
from vlmaccel.methods.look_m import merged, nearest
from vlmaccel.reduction import Reduction


def chosen(*kept, n=6):
    wanted = torch.zeros(1, n, dtype=torch.bool)
    wanted[0, list(kept)] = True
    return Reduction.select(wanted)


def by_hand(x, keys, kept, how):
    """Merged values of the kept entries, entry by entry."""
    out = {c: [] for c in kept}
    for e in range(len(keys)):
        if e in kept:
            continue
        likeness = {c: cosine_similarity(keys[e], keys[c], dim=0) for c in kept}
        c = max(kept, key=lambda c: likeness[c])
        out[c].append((e, likeness[c]))
    result = []
    for c in kept:
        total = x[c].clone()
        for e, cosine in out[c]:
            total += {"averaged": x[e], "pivotal": (x[e] + x[c]) / 2, "weighted": cosine * x[e]}[how]
        result.append(total / (len(out[c]) + 1))
    return torch.stack(result)


@pytest.mark.parametrize("how", ["averaged", "pivotal", "weighted"])
def test_merging_is_the_papers(how):
    keys, values = torch.randn(2, 6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    selected = chosen(1, 3, 4)
    target, likeness = nearest(keys[None], selected, torch.ones(1, 6, dtype=torch.bool))
    for x in (keys, values):
        got = merged(x[None], selected, target, likeness, how)[0, [1, 3, 4]]
        assert torch.allclose(got, by_hand(x, keys, [1, 3, 4], how), atol=1e-6)


def test_what_is_not_real_is_not_merged():
    keys = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    real = torch.tensor([[False, True, True, True, True, True]])
    target, _ = nearest(keys, chosen(1, 3), real)
    assert target[0, 0] == -1 and (target[0, [2, 4, 5]] >= 0).all() and (target[0, [1, 3]] == -1).all()


def test_equal_tokens_merged_with_their_count_are_exact():
    """Three copies of an entry, two of them evicted: with the log count attention is what it was."""
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, 1, 1, 5, 8, generator=generator)
    keys[:, :, 2:4], values[:, :, 2:4] = keys[:, :, 1:2], values[:, :, 1:2]
    query = torch.randn(1, 1, 1, 8, generator=generator)
    layer = PrunedLayer()
    layer.update(keys, values)
    full = layer.attend(query, 0.3)
    selected = chosen(0, 1, 4, n=5)
    target, _ = nearest(keys[0], selected, torch.ones(1, 5, dtype=torch.bool))
    group = torch.where(selected.group >= 0, selected.group, target)
    layer.reduce(Reduction(selected.keep, group, selected.size), prop_attn=True)
    assert layer.slots.sizes.tolist() == [[[1, 3, 1]]]
    assert torch.allclose(layer.attend(query, 0.3), full, atol=1e-6)


@pytest.mark.parametrize("merge", ["averaged", "pivotal", "weighted", "none"])
@torch.no_grad()
def test_text_goes_last(merge):
    """Within the budget: pictures are evicted before any text that is as little attended to."""
    model, batch = build("llava-clip-llama"), inputs("llava-clip-llama", 1)
    with vlmaccel.patched(model, LookM(budget=0.6, merge=merge)):
        out = model(**batch, use_cache=True)
    with vlmaccel.patched(model, LookM(budget=0.6, merge=merge, text_prior=False)):
        plain = model(**batch, use_cache=True)
    text = batch["input_ids"][0] != model.config.image_token_id

    def kept_text(cache):
        return sum(int(text[head.long()].sum()) for layer in cache.layers for head in layer.slots.index[0])

    assert kept_text(out.past_key_values) > kept_text(plain.past_key_values)
    assert {layer.slots.index.shape[2] for layer in out.past_key_values.layers} == {int(len(text) * 0.6)}


@torch.no_grad()
def test_the_count_changes_decoding_and_merging_comes_before_quantising():
    model, batch, later = build("llama"), inputs("llama", 2, True), answer_tokens(2)
    steps = []
    for counted in (False, True):
        with vlmaccel.patched(model, LookM(budget=0.4, prop_attn=counted)):
            steps.append(decode(model, batch, later)[1])
    assert (steps[0] - steps[1]).abs().max() > 1e-3
    quantised = MixedPrecisionKV(low_bits=8, group=4, residual=4, window=4)
    with vlmaccel.patched(model, [LookM(budget=0.4), quantised]):
        assert decode(model, batch, later)[1].isfinite().all()
    with vlmaccel.patched(model, [quantised, LookM(budget=0.4)]), pytest.raises(NotImplementedError, match="before"):
        decode(model, batch, later)
