"""Quest in models: identity, batches, generation, the warning where it cannot act."""

import warnings

import pytest
import torch

import vlmaccel
from tests.support.drops import GREEDY, answer_tokens, decode
from tests.support.models import build, inputs
from vlmaccel.cache.paged import PagedLayer
from vlmaccel.methods.adakv import AdaKV
from vlmaccel.methods.quest import Quest

kinds = pytest.mark.parametrize("kind", ["llama", "qwen2", "llava-clip-llama"])
SMALL = dict(page=4, budget=12)


def alone(batch, b):
    real = batch["attention_mask"][b].bool()
    return {k: batch[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}


@kinds
@pytest.mark.parametrize("budget", [1.0, 1000])
def test_a_budget_for_everything_is_bit_identical(kind, budget):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    plain = decode(model, batch, answer_tokens(3))
    with vlmaccel.patched(model, Quest(budget=budget, page=4)):
        patched = decode(model, batch, answer_tokens(3))
    assert all(torch.equal(a, b) for a, b in zip(plain, patched, strict=True))


@kinds
@pytest.mark.parametrize("method", [Quest(**SMALL), Quest(budget=0.4, page=4, group="union", dense_layers=0)])
def test_prompts_are_exact_steps_are_not_and_all_is_held(kind, method):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    plain = decode(model, batch, answer_tokens(3))
    with vlmaccel.patched(model, method):
        patched = decode(model, batch, answer_tokens(3))
        cache = model(**batch).past_key_values
    real = batch["attention_mask"].bool()
    assert torch.equal(plain[0][real], patched[0][real])
    assert not torch.allclose(plain[1], patched[1], atol=1e-3)
    paged = [isinstance(layer, PagedLayer) for layer in cache.layers]
    assert paged == [i >= method.dense_layers for i in range(len(paged))]
    assert all(layer.keys.shape[2] == batch["input_ids"].shape[1] for layer in cache.layers)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("method", [Quest(**SMALL), Quest(budget=0.4, page=4), Quest(**SMALL, exact=True)])
def test_a_padded_batch_is_its_samples(kind, method):
    # `generate` counts positions from the first real token: the bounds of pages, unlike attention, are about these
    model, batch = build(kind), inputs(kind, 3, pad=True)
    with vlmaccel.patched(model, method):
        together = torch.stack(model.generate(**batch, **GREEDY).logits)
        for b in range(3):
            one = torch.stack(model.generate(**alone(batch, b), **GREEDY).logits)
            assert torch.allclose(together[:, b : b + 1], one, atol=1e-4)


def test_more_budget_is_nearer_and_exact_choice_nearest():
    model, batch = build("llama"), inputs("llama", 1)
    plain = decode(model, batch, answer_tokens(1))[1]

    def error(**options):
        with vlmaccel.patched(model, Quest(page=1, dense_layers=0, **options)):
            return float((decode(model, batch, answer_tokens(1))[1] - plain).norm())

    assert error(budget=32) < error(budget=16) < error(budget=4)
    assert error(budget=16, exact=True) < error(budget=4, exact=True)


@torch.no_grad()
def test_generation_with_beams_and_a_second_request():
    model, batch = build("llava-clip-llama"), inputs("llava-clip-llama", 2, pad=True)
    with vlmaccel.patched(model, Quest(**SMALL)):
        first = model.generate(**batch, **GREEDY)
        beams = model.generate(**batch, num_beams=3, max_new_tokens=6, do_sample=False)
        second = model.generate(**batch, **GREEDY)
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    assert beams.shape == (2, batch["input_ids"].shape[1] + 6)


@torch.no_grad()
def test_a_later_turn():
    model, batch = build("qwen2"), inputs("qwen2", 2, pad=True)
    more = torch.randint(2, 110, (2, 9), generator=torch.Generator().manual_seed(3))
    with vlmaccel.patched(model, Quest(**SMALL)):
        mask, cache = batch["attention_mask"], model(**batch).past_key_values
        for tokens in (more[:, :1], more, more[:, :1]):
            mask = torch.nn.functional.pad(mask, (0, tokens.shape[1]), value=1)
            out = model(tokens, attention_mask=mask, past_key_values=cache)
    layer = cache.layers[3]
    keys = layer.keys
    high = layer.pages[0]
    start = int(layer._first[1, 0])
    assert start == int((batch["attention_mask"][1] == 0).sum()) > 0
    assert torch.equal(high[1, :, 0], keys[1, :, start : start + 4].amax(1))
    assert torch.isfinite(out.logits).all()


@torch.no_grad()
def test_after_an_eviction_of_every_head_its_own():
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    evict = AdaKV(budget=20, window=4)
    with vlmaccel.patched(model, evict):
        plain = decode(model, batch, answer_tokens(3))[1]
    with vlmaccel.patched(model, [evict, Quest(budget=10**6, page=4)]):
        assert torch.allclose(decode(model, batch, answer_tokens(3))[1], plain, atol=1e-5)
    with vlmaccel.patched(model, [evict, Quest(**SMALL)]):
        assert not torch.allclose(decode(model, batch, answer_tokens(3))[1], plain, atol=1e-3)


@torch.no_grad()
def test_where_the_model_has_its_own_attention_everything_is_read_and_said():
    batch, answer = inputs("llama", 2, pad=True), answer_tokens(2)
    plain = decode(build("llama", "eager"), batch, answer)[1]
    with vlmaccel.patched(build("llama", "eager"), Quest(**SMALL)) as model, pytest.warns(UserWarning, match="sdpa"):
        assert torch.allclose(decode(model, batch, answer)[1], plain, atol=1e-5)
    with vlmaccel.patched(build("llama"), Quest(**SMALL)) as model, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        decode(model, batch, answer)


@torch.no_grad()
def test_candidates_of_assisted_decoding():
    model, batch = build("llama"), inputs("llama", 1)
    with vlmaccel.patched(model, Quest(budget=1000, page=4)):
        greedy = model.generate(**batch, **GREEDY).sequences
    with vlmaccel.patched(model, Quest(**SMALL)):
        looked_up = model.generate(**batch, prompt_lookup_num_tokens=3, **GREEDY).sequences
    assert looked_up.shape == greedy.shape


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(budget="64MiB"), "evicts nothing"),
        (dict(budget=0.0), "budget"),
        (dict(page=0), "page"),
        (dict(dense_layers=-1), "dense_layers"),
        (dict(group="mean"), "group"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        Quest(**options)
