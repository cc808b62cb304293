"""Mixed precision in models: exact where nothing is in few bits, which entries are, batches, generation, other methods."""

import copy
from itertools import pairwise

import pytest
import torch

import vlmaccel
from tests.support.drops import GREEDY, STEPS, KeepAll, answer_tokens, extend_mask, go_on
from tests.support.memory import held_bytes
from tests.support.models import DEPTH, build, inputs
from vlmaccel.cache import PrunedSlidingLayer
from vlmaccel.cache.mixed import MixedLayer
from vlmaccel.methods.adakv import AdaKV
from vlmaccel.methods.h2o import H2O
from vlmaccel.methods.mixed_precision import MixedPrecisionKV
from vlmaccel.methods.pyramiddrop import PyramidDrop
from vlmaccel.methods.snapkv import SnapKV
from vlmaccel.methods.streaming_llm import StreamingLLM
from vlmaccel.methods.vl_cache import VLCache

KINDS = ("llama", "qwen2", "llava-clip-llama", "qwen2-vl", "mistral-sliding")
kinds = pytest.mark.parametrize("kind", KINDS)
SMALL = dict(group=4, residual=6, sinks=1, window=4)  # prompts here have 19 to 39 tokens


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def method(**options):
    return MixedPrecisionKV(**{**SMALL, **options})


def run(model, batch, later=None):
    """Prompt logits (B, S, V), step logits (B, T, V) and the cache; positions are those of the real tokens."""
    later = answer_tokens(len(batch["input_ids"])) if later is None else later
    mask = batch["attention_mask"]
    counted = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "mm_token_type_ids" not in batch else {}
    out = model(**batch, **counted, use_cache=True)
    prompt, steps = out.logits, []
    for t in range(later.shape[1]):
        at = {"position_ids": mask.sum(1, keepdim=True) + t} if counted else {}
        out = go_on(model, batch, later[:, t : t + 1], t, out.past_key_values, **at)
        steps.append(out.logits[:, -1])
    return prompt, torch.stack(steps, 1), out.past_key_values


def patched_run(model, batch, *methods, later=None):
    with vlmaccel.patched(model, list(methods)):
        return run(model, batch, later)


def prefilled(model, batch, *methods):
    with vlmaccel.patched(model, list(methods)):
        return model(**batch, use_cache=True).past_key_values


def alone(batch, b):
    """Sample b of a batch of texts without its padding."""
    real = batch["attention_mask"][b].bool()
    return {k: batch[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}


def bits_of(layer, b, h):
    """{logical index: bits} of what head h of sample b holds."""
    out = {}
    for bits, slots in [*((b_, s.slots) for b_, s in sorted(layer.stores.items())), (16, layer.exact_slots)]:
        g = min(h, slots.index.shape[1] - 1)
        real = slots.sizes[b, g] > 0
        out |= dict.fromkeys(slots.index[b, g][real].tolist(), bits)
    return out


def bits_by_layer(cache, b):
    heads = cache.layers[0].keys.shape[1]
    return [[bits_of(layer, b, h) for h in range(heads)] for layer in cache.layers]


def error(a, b):
    return float((a - b).abs().max())


# ---- exact where nothing is in few bits


@kinds
@pytest.mark.parametrize("options", [{"keep": 1.0}, {"tau": 1.0}, {"residual": 200}], ids=str)
@pytest.mark.parametrize("pad", [False, True])
def test_all_in_full_precision_is_the_model(kind, options, pad):
    model, batch = build(kind), inputs(kind, 3, pad)
    later = answer_tokens(3)[:, :4]  # fewer than would leave the window: what is generated gets low_bits
    prompt, steps, _ = run(model, batch, later)
    options = {"group": 8, **options}
    got_prompt, got_steps, _ = patched_run(model, batch, method(low_bits=2, **options), later=later)
    real = batch["attention_mask"].bool()
    assert torch.equal(got_prompt[real], prompt[real])
    assert error(got_steps, steps) < 1e-5


@kinds
def test_the_prefill_is_exact(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    real = batch["attention_mask"].bool()
    prompt = run(model, batch)[0]
    assert torch.equal(patched_run(model, batch, method(low_bits=2))[0][real], prompt[real])


@kinds
def test_fewer_bits_are_further_off(kind):
    model, batch = build(kind), inputs(kind, 3)
    steps = run(model, batch)[1]
    off = {b: error(patched_run(model, batch, method(low_bits=b, keep=0.0))[1], steps) for b in (2, 4, 8)}
    if kind == "mistral-sliding":
        assert off == {2: 0, 4: 0, 8: 0}
    else:
        assert off[8] < 0.06
        assert off[8] < off[4] < off[2]
        assert off[2] > 0.3


def test_layers_with_a_sliding_window_stay_as_they_are():
    model, batch = build("qwen2-hybrid"), inputs("qwen2-hybrid", 2)
    cache = patched_run(model, batch, method())[2]
    assert [type(layer) for layer in cache.layers] == [MixedLayer, PrunedSlidingLayer] * (DEPTH // 2)


# ---- which entries are in few bits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava-clip-llama"])
def test_keep_0_is_by_position(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    a = patched_run(model, batch, method(keep=0.0, low_bits=2))
    b = patched_run(model, batch, method(by="position", low_bits=2))
    assert torch.equal(a[1], b[1])
    for sample in range(3):
        mine = bits_by_layer(a[2], sample)
        assert mine == bits_by_layer(b[2], sample)
        real = batch["attention_mask"][sample].nonzero().flatten().tolist()
        n = len(real) + STEPS
        few = (n - SMALL["sinks"] - SMALL["residual"]) // SMALL["group"] * SMALL["group"]
        low = set(range(real[0] + 1, real[0] + 1 + few))  # behind the sink, up to the last whole group
        assert mine == [[{i: 2 if i in low else 16 for i in range(real[0], real[0] + n)}] * 2] * DEPTH


def high(cache, b=0):
    """[layer][head] -> logical indices whose bits are high (8) in a prompt of which no residual is kept."""
    return [[{i for i, bits in head.items() if bits > 2} for head in heads] for heads in bits_by_layer(cache, b)]


@pytest.mark.parametrize("which", ["keep", "tau"])
def test_more_is_high_with_a_larger_share(which):
    model, batch = build("llava-clip-llama"), inputs("llava-clip-llama", 1)
    shares, seen = (0.0, 0.1, 0.3, 0.6, 0.9, 1.0), []
    for share in shares:
        chosen = method(high_bits=16, low_bits=2, group=1, residual=0, sinks=0, **{which: share})
        seen.append(high(prefilled(model, batch, chosen)))
    n = batch["input_ids"].shape[1]
    for less, more in pairwise(seen):
        assert all(a <= b for heads in zip(less, more, strict=True) for a, b in zip(*heads, strict=True))
    assert all(len(head) == 0 for heads in seen[0] for head in heads)
    assert all(len(head) == n for heads in seen[-1] for head in heads)
    if which == "keep":
        for share, layers in zip(shares, seen, strict=True):
            assert all(len(head) == int(n * share + 1e-9) for heads in layers for head in heads)
    else:
        assert len({len(head) for heads in seen[3] for head in heads}) > 1  # as many as a head needs


@pytest.mark.parametrize("rows", ["last", "post-vision"])
@pytest.mark.parametrize("which", ["keep", "tau"])
def test_the_salient_are_those_with_most_attention(rows, which):
    """By eager attention weights, worked out by the model itself."""
    kind = "llava-clip-llama"
    batch = inputs(kind, 1)
    weights = build(kind, "eager")(**batch, output_attentions=True).attentions
    got = high(
        prefilled(
            build(kind), batch, method(low_bits=2, group=1, residual=0, sinks=0, rows=rows, window=4, **{which: 0.5})
        )
    )
    n = batch["input_ids"].shape[1]
    # behind the last picture there are 7 tokens: too few, so that it is the last 16 that count
    first = n - 4 if rows == "last" else n - 16
    for layer, attention in enumerate(weights):
        asked = attention[0, :, first:]
        able = (torch.arange(first, n)[:, None] >= torch.arange(n)).sum(0)
        saliency = (asked.sum(1) / able).unflatten(0, (2, 2)).mean(1)
        for h in range(2):
            order = saliency[h].argsort(descending=True)
            if which == "keep":
                count = n // 2
            else:
                mass = saliency[h][order].cumsum(0)
                count = int((mass < 0.5 * mass[-1]).sum()) + 1
            assert got[layer][h] == set(order[:count].tolist())


@pytest.mark.parametrize("system_bits", [16, 8])
def test_every_modality_has_its_bits(system_bits):
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3)
    chosen = method(by="modality", image_bits=2, text_bits=4, system_bits=system_bits, group=1, residual=0, sinks=0)
    cache = patched_run(model, batch, chosen)[2]
    ids = batch["input_ids"]
    for b in range(3):
        image = ids[b] == model.config.image_token_id
        first = int(image.byte().argmax()) if image.any() else 0  # no picture: no text before it
        want = {i: 2 if image[i] else system_bits if i < first else 4 for i in range(ids.shape[1])}
        want |= dict.fromkeys(range(ids.shape[1], ids.shape[1] + STEPS), 4)
        assert bits_by_layer(cache, b) == [[want] * 2] * DEPTH


def test_video_has_bits_of_its_own():
    kind = "llava-onevision"
    model, batch = build(kind), inputs(kind, 3, video=True)
    chosen = method(by="modality", image_bits=4, video_bits=8, text_bits=2, group=1, residual=0, sinks=0)
    cache = prefilled(model, batch, chosen)
    for b in range(3):
        got = bits_by_layer(cache, b)[0][0]
        for i, token in enumerate(batch["input_ids"][b].tolist()):
            if token == model.config.image_token_id:
                assert got[i] == 4
            if token == model.config.video_token_id:
                assert got[i] == 8


def test_sinks_and_the_newest_stay_in_full_precision():
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    cache = patched_run(model, batch, method(keep=0.0, sinks=3, residual=5))[2]
    for b in range(3):
        start = int((batch["attention_mask"][b] == 0).sum())
        end = batch["input_ids"].shape[1] + STEPS
        for heads in bits_by_layer(cache, b):
            for head in heads:
                assert {head[i] for i in (*range(start, start + 3), *range(end - 5, end))} == {16}
                assert min(head) == start and 4 in head.values()


def test_high_bits_of_8():
    model, batch = build("llama"), inputs("llama", 1)
    cache = prefilled(model, batch, method(high_bits=8, low_bits=2, keep=0.5, group=1, residual=0, sinks=2))
    half = batch["input_ids"].shape[1] // 2
    for head in (head for heads in bits_by_layer(cache, 0) for head in heads):
        assert half - 2 <= list(head.values()).count(8) <= half  # a sink that is salient is one of the half
        assert [head[0], head[1]] == [16, 16] and list(head.values()).count(16) == 2


# ---- batches, attention implementations


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "options", [{"by": "position"}, {"keep": 0.3}, {"tau": 0.5, "high_bits": 8}], ids=["position", "keep", "tau"]
)
def test_a_padded_batch_is_its_samples(kind, options):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    later = answer_tokens(3)
    _, steps, cache = patched_run(model, batch, method(**options), later=later)
    for b in range(3):
        one = patched_run(model, alone(batch, b), method(**options), later=later[b : b + 1])
        start = int((batch["attention_mask"][b] == 0).sum())
        mine = [[{i - start: x for i, x in head.items()} for head in heads] for heads in bits_by_layer(cache, b)]
        assert mine == bits_by_layer(one[2], 0)
        assert error(steps[b], one[1][0]) < 5e-3


@pytest.mark.parametrize("kind", ["llama", "llava-clip-llama"])
def test_eager_attention_reads_the_same(kind):
    batch = inputs(kind, 3, pad=True)
    plain = run(build(kind), batch)[1]
    (_, a, first), (_, b, second) = (
        patched_run(build(kind, attn), batch, method(keep=0.3)) for attn in ("sdpa", "eager")
    )
    assert all(bits_by_layer(first, s) == bits_by_layer(second, s) for s in range(3))
    assert error(a, b) < 5e-3 < 0.02 < error(a, plain)


def test_half_precision_runs():
    model, batch = build("qwen2").bfloat16(), inputs("qwen2", 2, pad=True)
    plain = run(model, batch)[1]
    got = patched_run(model, batch, method(low_bits=8))[1]
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    assert float((got - plain).float().norm() / plain.float().norm()) < 0.1


# ---- generation


@pytest.mark.parametrize("kind", ["llama", "llava-clip-llama", "qwen2", "qwen3-vl"])
def test_generation_is_the_loop(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    with vlmaccel.patched(model, method(keep=0.3)):
        out = model.generate(**batch, **GREEDY)
        said = out.sequences[:, batch["input_ids"].shape[1] :]
        _, steps, cache = run(model, batch, said[:, :-1])
    assert torch.equal(torch.stack(out.logits, 1)[:, 1:], steps)
    assert all(bits_by_layer(out.past_key_values, b) == bits_by_layer(cache, b) for b in range(3))


@pytest.mark.parametrize("kind", ["llama", "llava-clip-llama"])
def test_beams_and_a_second_request(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    other = {k: v[:1] for k, v in inputs("llama", 2).items()}
    with vlmaccel.patched(model, method(keep=0.3)):
        first = model.generate(**batch, **GREEDY)
        beams = model.generate(**batch, num_beams=3, max_new_tokens=12, do_sample=False)
        model.generate(**other, **GREEDY)
        second = model.generate(**batch, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    assert beams.shape == (3, batch["input_ids"].shape[1] + 12)


def test_beams_with_all_in_full_precision_are_the_models():
    model, batch = build("llama"), inputs("llama", 2, pad=True)
    options = dict(num_beams=3, max_new_tokens=20, do_sample=False)
    plain = model.generate(**batch, **options)
    with vlmaccel.patched(model, method(low_bits=2, keep=1.0, residual=24)):
        assert torch.equal(model.generate(**batch, **options), plain)


def test_beams_give_the_score_of_their_tokens():
    """The best beam's score is the mean log-probability that a loop over its own tokens gives."""
    model, batch = build("llama"), inputs("llama", 2, pad=True)
    options = dict(num_beams=3, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with vlmaccel.patched(model, method(keep=0.3, residual=4)):
        out = model.generate(**batch, **options)
        new = out.sequences[:, batch["input_ids"].shape[1] :]
        looped = run(model, batch, new[:, :-1])
    plain = run(model, batch, new[:, :-1])

    def score(prompt, steps, _):
        logits = torch.cat([prompt[:, -1:], steps], 1)
        return logits.log_softmax(-1).gather(2, new[..., None])[..., 0].mean(1)

    assert error(score(*looped), out.sequences_scores) < 1e-4
    assert error(score(*plain), out.sequences_scores) > 1e-2


@pytest.mark.parametrize(
    "options", [{"residual": 12, "keep": 0.3}, {"residual": 0, "group": 1, "low_bits": 8}], ids=["window", "no window"]
)
def test_candidates_of_assisted_decoding(options):
    """Candidates can be taken back although no window is asked for."""
    model, batch = build("llama"), inputs("llama", 1)
    generation = {**GREEDY, "max_new_tokens": 12}
    with vlmaccel.patched(model, method(**options)):
        greedy = model.generate(**batch, **generation)
        assisted = model.generate(**batch, **generation, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted.sequences, greedy.sequences)


def second_turn(model, batch, said, question):
    """Logits of the second prompt's last token and of 4 steps, and the cache."""
    _, _, cache = run(model, batch, said)
    mask = extend_mask(batch["attention_mask"], said.shape[1] + question.shape[1])
    at = mask.cumsum(1)[:, -question.shape[1] :] - 1
    out = model(question, attention_mask=mask, position_ids=at, past_key_values=cache)
    logits = [out.logits[:, -1]]
    for t in range(4):
        mask = extend_mask(mask, 1)
        at = mask.sum(1, keepdim=True) - 1
        out = model(said[:, t : t + 1], attention_mask=mask, position_ids=at, past_key_values=cache)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), cache


def talk(batch):
    generator = torch.Generator().manual_seed(8)
    return answer_tokens(batch), torch.randint(2, 110, (batch, 12), generator=generator)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava-clip-llama"])
def test_a_second_turn(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    plain, _ = second_turn(model, batch, *talk(3))
    with vlmaccel.patched(model, method(keep=0.3, low_bits=8)):
        got, cache = second_turn(model, batch, *talk(3))
    assert 0 < error(got, plain) < 0.1
    n = batch["input_ids"].shape[1] + STEPS + 12 + 4
    for b in range(3):
        start = int((batch["attention_mask"][b] == 0).sum())
        for heads in bits_by_layer(cache, b):
            assert all(sorted(head) == list(range(start, n)) for head in heads)
    # a new prompt's entries are judged too: more than the residual is in few bits, and the share is in full precision
    late = [
        bits for heads in bits_by_layer(cache, 0) for head in heads for i, bits in head.items() if n - 16 <= i < n - 6
    ]
    assert {8, 16} <= set(late)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_second_turn_of_a_padded_batch_is_its_samples(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    said, question = talk(3)
    with vlmaccel.patched(model, method(keep=0.3)):
        together, cache = second_turn(model, batch, said, question)
        for b in range(3):
            one, own = second_turn(model, alone(batch, b), said[b : b + 1], question[b : b + 1])
            start = int((batch["attention_mask"][b] == 0).sum())
            mine = [[{i - start: x for i, x in head.items()} for head in heads] for heads in bits_by_layer(cache, b)]
            assert mine == bits_by_layer(own, 0)
            assert error(together[b], one[0]) < 5e-3


def test_a_cache_copied_mid_way_goes_on_alike():
    model, batch = build("qwen2"), inputs("qwen2", 2, pad=True)
    with vlmaccel.patched(model, method(keep=0.3)):
        cache = run(model, batch)[2]
        other = copy.deepcopy(cache)
        results = []
        for held in (cache, other):
            logits = []
            for t in range(6):
                mask = extend_mask(batch["attention_mask"], STEPS + t + 1)
                logits.append(model(answer_tokens(2)[:, t : t + 1], attention_mask=mask, past_key_values=held).logits)
            results.append(torch.cat(logits, 1))
    assert torch.equal(*results)


# ---- with other methods


def test_after_dropping_and_eviction():
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before = [PyramidDrop(ratio=0.7), VLCache(budget=0.7)]
    evicted = patched_run(model, batch, *before)
    _, steps, cache = patched_run(model, batch, *before, method(low_bits=8, residual=2))
    assert error(steps, evicted[1]) < 0.1
    full = patched_run(model, batch, *before, method(keep=1.0, residual=200))
    assert error(full[1], evicted[1]) < 1e-5
    # the same entries are held, in fewer bytes
    for layer, other in zip(cache.layers, evicted[2].layers, strict=True):
        assert isinstance(layer, MixedLayer)
        a, b = layer.slots, other.slots
        for sample in range(3):
            for h in range(2):
                held = set(bits_of(layer, sample, h))
                g = min(h, b.index.shape[1] - 1)
                padding = batch["attention_mask"].shape[1] - int(batch["attention_mask"][sample].sum())
                index = b.index[sample, g][b.sizes[sample, g] > 0].tolist()
                assert held == {i for i in index if i >= padding}
        assert a.index.shape[0] == 3
    assert any(layer.stores for layer in cache.layers)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava-clip-llama"])
def test_after_snapkv(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    snap = SnapKV(budget=0.6, window=4)
    evicted = patched_run(model, batch, snap)[1]
    eight = patched_run(model, batch, snap, method(low_bits=8, keep=0.2))
    two = patched_run(model, batch, snap, method(low_bits=2, keep=0.2))
    assert 0 < error(eight[1], evicted) < 0.1 < error(two[1], evicted)
    assert all(isinstance(layer, MixedLayer) and layer.stores for layer in two[2].layers)


def shared(cache, other):
    """Share of the entries of one cache that the other holds too, heads and layers together."""
    same = total = 0
    for layer, evicted in zip(cache.layers, other.layers, strict=True):
        slots = evicted.slots
        for b in range(slots.index.shape[0]):
            for h in range(evicted.keys.shape[1]):
                g = min(h, slots.index.shape[1] - 1)
                want = set(slots.index[b, g][slots.sizes[b, g] > 0].tolist())
                mine = set(bits_of(layer, b, h))
                assert len(mine) == len(want)
                same, total = same + len(mine & want), total + len(want)
    return same / total


EVICTIONS = [
    pytest.param(SnapKV(budget=20, window=4, sinks=1, pool=1), id="snapkv without pooling"),
    pytest.param(SnapKV(budget=20, window=4, sinks=1), id="snapkv"),
    pytest.param(AdaKV(budget=20, window=4, pool=1), id="adakv without pooling"),
    pytest.param(StreamingLLM(budget=20), id="streaming-llm"),
    pytest.param(H2O(budget=20), id="h2o"),
]


@pytest.mark.parametrize("kind", ["llama", "llava-clip-llama"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_eviction_in_later_turns_and_steps(kind, eviction):
    """At 8 bits, what is held and what is said is as with eviction alone."""
    model, batch = build(kind), inputs(kind, 2)
    with vlmaccel.patched(model, [eviction]):
        plain, evicted = second_turn(model, batch, *talk(2))
    with vlmaccel.patched(model, [eviction, method(low_bits=8, keep=0.3, group=2, residual=4)]):
        got, cache = second_turn(model, batch, *talk(2))
    assert shared(cache, evicted) > 0.97  # 8 bits may swap a pair that is nearly equal
    assert error(got, plain) < 0.1


def test_saliency_of_a_later_turn_stays_with_its_entries_when_others_are_evicted():
    """What is in high precision of the new prompt is the most salient of what SnapKV leaves of it."""
    model, batch = build("llama"), inputs("llama", 1)
    snap, seen = SnapKV(budget=26, window=4, sinks=1), {}

    class Watching(MixedPrecisionKV):
        def cache(self, at):
            if not at.decoding:
                seen[at.layer] = (at.entries.notes["saliency"].clone(), at.entries.exact_slots)
            return super().cache(at)

        def observe(self, at):
            super().observe(at)
            noted[at.layer] = (at.slots.index.expand(1, 2, -1).clone(), at.entries.notes["saliency"].clone())

    noted = {}
    with vlmaccel.patched(model, [snap, Watching(**{**SMALL, "group": 2, "residual": 4}, keep=0.3)]):
        second_turn(model, batch, *talk(1))
    for layer, (score, slots) in seen.items():
        index, saliency = noted[layer]
        for h in range(2):
            known = dict(zip(index[0, h].tolist(), saliency[0, h].tolist(), strict=True))
            exact = slots.index[0, min(h, slots.index.shape[1] - 1)].tolist()
            assert score[0, h, -len(exact) :].tolist() == [known[i] for i in exact]


# ---- the bias of the keys


def planted(kind):
    """The keys of the first layer get a large constant on a channel of each head that turns fast."""
    model = build(kind)
    text = getattr(model.model, "language_model", model.model)
    bias = text.layers[0].self_attn.k_proj.bias
    bias[0], bias[8] = 300, -300
    return model


def gain(forward, model, *before, **options):
    """Error of what `forward` gives, with the bias taken off the keys in units of the one without."""
    with vlmaccel.patched(model, [*before, KeepAll((0,))]):
        plain = forward()
    off = []
    for key_bias in (True, False):
        with vlmaccel.patched(model, [*before, method(by="position", key_bias=key_bias, **options)]):
            off.append(float((forward() - plain).norm()))
    return off[0] / off[1]


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.15), (2, 0.3)])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "qwen2-vl"])
def test_a_large_bias_of_the_keys_costs_little(kind, bits, limit, pad):
    model, batch = planted(kind), inputs(kind, 3, pad)
    assert gain(lambda: run(model, batch)[1], model, low_bits=bits) < limit


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-vl"])
def test_the_bias_is_that_of_the_entries_that_are_left(kind):
    """Entries are evicted, in every head others."""
    model, batch = planted(kind), inputs(kind, 3, pad=True)
    assert gain(lambda: run(model, batch)[1], model, SnapKV(budget=0.6, window=4)) < 0.25


@pytest.mark.parametrize(
    ("kind", "positions"), [("llava-clip-qwen2", "renumber"), ("llava-clip-qwen2", "keep"), ("qwen2-vl", "keep")]
)
def test_the_bias_of_tokens_that_were_dropped_before(kind, positions):
    model, batch = planted(kind), inputs(kind, 3, pad=True)
    drop = PyramidDrop(layers=(0, 2, 4), ratio=0.7, positions=positions)
    assert gain(lambda: run(model, batch)[1], model, drop) < 0.25


def test_the_bias_is_followed_into_later_turns():
    model, batch = planted("qwen2"), inputs("qwen2", 3, pad=True)
    assert gain(lambda: second_turn(model, batch, *talk(3))[0], model) < 0.25


@pytest.mark.parametrize("layers", [(0, 2, 4), (1, 3)])
@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_the_bias_of_later_turns_where_tokens_were_dropped(positions, layers):
    model, batch = planted("llava-clip-qwen2"), inputs("llava-clip-qwen2", 3, pad=True)
    drop = PyramidDrop(layers=layers, ratio=0.7, positions=positions)
    assert gain(lambda: second_turn(model, batch, *talk(3))[0][:, 1:], model, drop) < 0.25


def test_the_bias_is_followed_through_beams_and_copies():
    model, batch = planted("qwen2"), inputs("qwen2", 2, pad=True)

    def forward():
        cache = copy.deepcopy(run(model, batch)[2])
        cache.reorder_cache(torch.tensor([1, 0]))
        logits = []
        for t in range(6):
            mask = extend_mask(batch["attention_mask"].flip(0), STEPS + t + 1)
            at = mask.sum(1, keepdim=True) - 1
            token = answer_tokens(2)[:, t : t + 1]
            logits.append(model(token, attention_mask=mask, position_ids=at, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    assert gain(forward, model) < 0.25


# ---- rounding by the queries


def queries_of(model, batch):
    """[layer] (B, H, S, head_dim) rotated queries, worked out from what the projections give."""
    found, text = [], model.model
    hooks = [x.self_attn.q_proj.register_forward_hook(lambda m, a, out: found.append(out)) for x in text.layers]
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    try:
        model(**batch, position_ids=positions)
    finally:
        for hook in hooks:
            hook.remove()
    cos, sin = (x[:, None] for x in text.rotary_emb(found[0], positions))
    states = [x.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2) for x in found]
    half = cos.shape[-1] // 2
    return [x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in states]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_queries_of_the_prompt_are_known_to_every_layer(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    cache = patched_run(model, batch, method(low_bits=2))[2]
    for layer, query in zip(cache.layers, queries_of(model, batch), strict=True):
        mean, variance = layer.asked
        for b, real in enumerate(batch["attention_mask"].bool()):
            mine = query[b, :, real].unflatten(0, (2, -1)).flatten(1, 2)
            assert error(mean[b], mine.mean(1)) < 1e-5
            assert error(variance[b], mine.var(1, unbiased=False)) < 1e-5


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"low_bits": 2}, True),
        ({"low_bits": 2, "by_query": False}, False),
        ({"low_bits": 4}, False),
        ({"by": "modality"}, True),
        ({"by": "modality", "image_bits": 4, "video_bits": 4}, False),
    ],
    ids=str,
)
def test_queries_are_noted_where_2_bits_are_used(options, known):
    cache = prefilled(build("llama"), inputs("llama", 2), method(**options))
    assert all((layer.asked is not None) == known for layer in cache.layers)


def test_rounding_by_the_queries_follows_beams_and_later_turns():
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    with vlmaccel.patched(model, method(low_bits=2)):
        cache = run(model, batch)[2]
        before = [[x.clone() for x in layer.asked] for layer in cache.layers]
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        for layer, old in zip(cache.layers, before, strict=True):
            assert all(torch.equal(x, y[[2, 0, 0]]) for x, y in zip(layer.asked, old, strict=True))
        later = second_turn(model, batch, *talk(3))[1]
        assert not any(torch.equal(x.asked[0], y[0]) for x, y in zip(later.layers, before, strict=True))


# ---- bytes, options


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava-clip-llama"])
@pytest.mark.parametrize("low_bits", [2, 4])
def test_bytes_are_those_of_every_tensor(kind, low_bits):
    model, batch = build(kind), inputs(kind, 3)
    with vlmaccel.patched(model, method(keep=0.3, low_bits=low_bits)):
        cache = model(**batch, use_cache=True).past_key_values
        stats = vlmaccel.stats(model)
        assert [layer.nbytes for layer in cache.layers] == [held_bytes(layer) for layer in cache.layers]
        assert stats.kv_bytes == sum(layer.nbytes for layer in cache.layers)
        assert not any(layer.notes for layer in cache.layers)
        for t in range(5):
            mask = extend_mask(batch["attention_mask"], t + 1)
            model(answer_tokens(3)[:, t : t + 1], attention_mask=mask, past_key_values=cache)
        assert [layer.nbytes for layer in cache.layers] == [held_bytes(layer) for layer in cache.layers]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_bits": 3}, "low_bits.*2.*4.*8"),
        ({"low_bits": 16}, "low_bits.*8"),
        ({"high_bits": 2}, "high_bits.*4.*8.*16"),
        ({"image_bits": 1}, "image_bits.*2.*4.*8.*16"),
        ({"system_bits": 32}, "system_bits.*16"),
        ({"by": "magic"}, "by.*saliency.*modality.*position"),
        ({"rows": "first"}, "rows.*last.*post-vision"),
        ({"group": 0}, "group.*1 or more"),
        ({"residual": -1}, "residual.*0 or more"),
        ({"sinks": 1.5}, "sinks.*whole number"),
        ({"window": 0}, "window.*1 or more"),
        ({"keep": 1.5}, "keep.*0 to 1"),
        ({"tau": -0.1}, "tau.*0 to 1"),
        ({"keep": 0.5, "tau": 0.5}, "one of keep and tau"),
        ({"high_bits": 4, "low_bits": 8}, "fewer"),
        ({"high_bits": 4, "low_bits": 4}, "fewer"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        MixedPrecisionKV(**options)
    with pytest.raises(ValueError, match=message):
        vlmaccel.patch(build("llama"), "mixed-precision-kv", **options)
