"""Low-rank keys and values in models: full rank, ranks and bases, batches, generation, later turns, other methods."""

import pytest
import torch
from torch.nn.functional import pad

import vlmaccel
from tests.support.drops import GREEDY, answer_tokens, decode
from tests.support.models import build, inputs
from vlmaccel.cache.low_rank import LowRankLayer
from vlmaccel.methods.adakv import AdaKV
from vlmaccel.methods.low_rank import LowRankKV

kinds = pytest.mark.parametrize("kind", ["llama", "qwen2", "llava-clip-llama"])
METHODS = {
    "values": LowRankKV(),
    "both": LowRankKV(rank_keys=6, rank_values=4, window=2),
    "query": LowRankKV(rank_keys=0.5, basis="query", rows="post-vision", window=0),
    "sqrt_r": LowRankKV(rank_keys=4, rank_values=None, scale="sqrt_r"),
}
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def alone(batch, b):
    real = batch["attention_mask"][b].bool()
    return {k: batch[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}


@kinds
@pytest.mark.parametrize("basis", ["svd", "query"])
def test_full_rank_is_the_model(kind, basis):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    plain = decode(model, batch, answer_tokens(3))
    with vlmaccel.patched(model, LowRankKV(rank_keys=1.0, rank_values=8, basis=basis, window=0)):
        patched = decode(model, batch, answer_tokens(3))
        held = model(**batch).past_key_values.layers
    real = batch["attention_mask"].bool()
    assert torch.equal(plain[0][real], patched[0][real])
    assert torch.allclose(plain[1], patched[1], atol=1e-5 if basis == "svd" else 1e-4)
    assert all(isinstance(layer, LowRankLayer) and layer.keys.shape[2] == 0 for layer in held)


@torch.no_grad()
def test_no_rank_is_no_method():
    model, batch = build("llama"), inputs("llama", 1)
    plain = decode(model, batch, answer_tokens(1))
    with vlmaccel.patched(model, LowRankKV(rank_values=None)):
        assert all(torch.equal(a, b) for a, b in zip(plain, decode(model, batch, answer_tokens(1)), strict=True))


@every
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_padded_batch_is_its_samples(kind, method):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    with vlmaccel.patched(model, method):
        together = decode(model, batch, answer_tokens(3))[1]
        for b in range(3):
            one = decode(model, alone(batch, b), answer_tokens(3)[b : b + 1])[1]
            assert torch.allclose(together[b : b + 1], one, atol=2e-4)


@every
def test_eager_attention_reads_the_same(method):
    batch, answer = inputs("llama", 3, pad=True), answer_tokens(3)
    plain = decode(build("llama"), batch, answer)[1]
    steps = []
    for attn in ("sdpa", "eager"):
        with vlmaccel.patched(build("llama", attn), method) as model:
            steps.append(decode(model, batch, answer)[1])
    assert torch.allclose(*steps, atol=1e-4)
    assert not torch.allclose(steps[0], plain, atol=1e-2)


def test_more_dimensions_are_nearer():
    model, batch = build("llava-clip-llama"), inputs("llava-clip-llama", 3)
    plain = decode(model, batch, answer_tokens(3))[1]

    def error(**options):
        with vlmaccel.patched(model, LowRankKV(**options)):
            return float((decode(model, batch, answer_tokens(3))[1] - plain).norm())

    assert error(rank_values=7) < error(rank_values=4) < error(rank_values=1)
    assert error(rank_keys=7, rank_values=None) < error(rank_keys=2, rank_values=None)


@torch.no_grad()
def test_the_observed_logits_are_nearest_in_the_basis_of_their_queries():
    model, batch = build("llama"), inputs("llama", 1)
    exact = model(**batch).past_key_values.layers[2].keys
    seen = {}

    class Watching(LowRankKV):
        def observe(self, at):
            super().observe(at)
            seen[at.layer] = at.scores.queries(torch.arange(at.entries.held)[None])

    errors = {}
    for basis in ("svd", "query"):
        with vlmaccel.patched(model, Watching(rank_keys=3, rank_values=None, basis=basis)):
            keys = model(**batch).past_key_values.layers[2].dense()[0]
        wrong = (keys - exact).repeat_interleave(2, 1)
        errors[basis] = float((seen[2] @ wrong.mT).square().sum())
    assert errors["query"] < errors["svd"]


@torch.no_grad()
def test_memory_is_what_the_statistics_say():
    model, batch = build("llama"), inputs("llama", 1)
    n = batch["input_ids"].shape[1]
    with vlmaccel.patched(model, LowRankKV(rank_keys=3, rank_values=2)):
        cache = model(**batch).past_key_values
        stats = vlmaccel.stats(model)
    each = 4 * 2 * (3 + 2) * (n + 8)
    assert [layer.nbytes - layer.slots.nbytes for layer in cache.layers] == [each] * len(cache.layers)
    assert stats.kv_bytes == sum(layer.nbytes for layer in cache.layers)


@every
@torch.no_grad()
def test_generation_with_beams_and_a_second_request(method):
    model, batch = build("llava-clip-llama"), inputs("llava-clip-llama", 2, pad=True)
    with vlmaccel.patched(model, method):
        first = model.generate(**batch, **GREEDY)
        beams = model.generate(**batch, num_beams=3, max_new_tokens=6, do_sample=False)
        second = model.generate(**batch, **GREEDY)
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    assert beams.shape == (2, batch["input_ids"].shape[1] + 6)


@torch.no_grad()
def test_beams_at_full_rank_are_the_models():
    model, batch = build("llama"), inputs("llama", 2, pad=True)
    options = dict(num_beams=3, max_new_tokens=24, do_sample=False)
    plain = model.generate(**batch, **options)
    with vlmaccel.patched(model, LowRankKV(rank_keys=8, rank_values=8, window=2)):
        assert torch.equal(model.generate(**batch, **options), plain)


@torch.no_grad()
def test_candidates_of_assisted_decoding():
    model, batch = build("llama"), inputs("llama", 1)
    greedy = model.generate(**batch, **GREEDY).sequences
    with vlmaccel.patched(model, LowRankKV(rank_keys=8, rank_values=8, window=4)):
        assert torch.equal(model.generate(**batch, prompt_lookup_num_tokens=3, **GREEDY).sequences, greedy)


@torch.no_grad()
@pytest.mark.parametrize("basis", ["svd", "query"])
def test_a_later_turn_is_fitted_too(basis):
    model, batch = build("qwen2"), inputs("qwen2", 2, pad=True)
    more = torch.randint(2, 110, (2, 9), generator=torch.Generator().manual_seed(3))

    def talk():
        mask, cache, logits = batch["attention_mask"], model(**batch).past_key_values, []
        for tokens in (more[:, :1], more, more[:, :1]):
            mask = pad(mask, (0, tokens.shape[1]), value=1)
            logits.append(model(tokens, attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(logits, 1), cache

    plain, _ = talk()
    with vlmaccel.patched(model, LowRankKV(rank_keys=8, rank_values=8, basis=basis)):
        assert torch.allclose(talk()[0], plain, atol=1e-4)
    with vlmaccel.patched(model, LowRankKV(rank_keys=6, rank_values=6, basis=basis)):
        logits, cache = talk()
    assert not torch.allclose(logits, plain, atol=1e-2)
    assert cache.layers[0].values.shape[2] == 1
    assert cache.layers[0].factors["values"].latent.shape[2] == batch["input_ids"].shape[1] + 10


@pytest.mark.parametrize("basis", ["svd", "query"])
@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_with_an_eviction_of_every_head_its_own(first, basis):
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    evict = AdaKV(budget=15, window=4)
    with vlmaccel.patched(model, evict):
        plain = decode(model, batch, answer_tokens(3))[1]

    def both(rank):
        method = LowRankKV(rank_keys=rank, rank_values=rank, basis=basis, window=0)
        with vlmaccel.patched(model, [evict, method] if first else [method, evict]):
            return decode(model, batch, answer_tokens(3))[1]

    assert torch.allclose(both(8), plain, atol=1e-4)
    assert not torch.allclose(both(4), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(rank_values=0), "rank_values"),
        (dict(rank_keys=1.5), "rank_keys"),
        (dict(rank_keys=True), "rank_keys"),
        (dict(basis="pca"), "basis"),
        (dict(scale="sqrt_r"), "give rank_keys"),
        (dict(window=-1), "window"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        LowRankKV(**options)


@torch.no_grad()
def test_a_rank_above_the_head_dimension():
    model, batch = build("llama"), inputs("llama", 1)
    with (
        vlmaccel.patched(model, LowRankKV(rank_values=9)),
        pytest.raises(ValueError, match="head_dim of this model, 8"),
    ):
        model(**batch)
