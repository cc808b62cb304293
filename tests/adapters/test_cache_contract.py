"""A cache with evicted entries keeps the contract of a Hugging Face cache: every way to generate, and honest bytes."""

from __future__ import annotations

import pickle
import threading
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

import vlmaccel
from tests.support.drops import GREEDY, STEPS, answer_tokens, assert_like_reference, decode, extend_mask, go_on, turns
from tests.support.evictions import METHODS, PREFILL, held_by, kept_of, reference_of, starts_of
from tests.support.models import DEPTH, IMAGE, VIDEO, build, inputs
from vlmaccel.adapters import scores
from vlmaccel.cache import PrunedLayer, kv_bytes_by_layer
from vlmaccel.hooks import CacheEntries
from vlmaccel.kernels import score_rows
from vlmaccel.methods import AdaKV, PyramidDrop, PyramidKV, SnapKV, VLCache
from vlmaccel.reduction import Reduction

VLM = "llava-clip-llama"
KINDS = ("llama", "qwen2-hybrid", VLM, "qwen2-vl")
every_method = pytest.mark.parametrize("name", METHODS)
prefill_methods = pytest.mark.parametrize("name", PREFILL)


def text_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


@torch.no_grad()
def loop(model: Any, batch: dict[str, Tensor], steps: int = STEPS, cache: Any = None) -> tuple[Tensor, Tensor, Any]:
    """What a user's own greedy loop says, its logits (B, steps, V), and the cache."""
    out, said, logits = model(**batch, past_key_values=cache, use_cache=True), [], []
    for t in range(steps):
        logits.append(out.logits[:, -1])
        said.append(logits[-1].index_fill(1, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax(1, keepdim=True))
        if t < steps - 1:
            out = go_on(model, batch, said[-1], t, out.past_key_values)
    return torch.cat(said, 1), torch.stack(logits, 1), out.past_key_values


def second_question(batch: dict[str, Tensor], said: Tensor) -> dict[str, Tensor]:
    """The whole conversation: the first prompt, what was said, and 7 tokens more."""
    more = torch.randint(2, 110, (len(said), 7), generator=torch.Generator().manual_seed(8))
    return {
        "input_ids": torch.cat([batch["input_ids"], said, more], 1),
        "attention_mask": extend_mask(batch["attention_mask"], said.shape[1] + 7),
    }


# ---- generate and a loop by hand


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), KINDS))
@torch.no_grad()
def test_generate_is_a_loop_by_hand_with_or_without_a_cache_of_one_s_own(kind: str, name: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    own = DynamicCache(config=model.config.get_text_config())
    lazy = None if kind == "qwen2-hybrid" else DynamicCache()  # which does not know of sliding layers, patched or not
    with vlmaccel.patched(model, replace(METHODS[name], every=3) if hasattr(METHODS[name], "every") else METHODS[name]):
        said = model.generate(**batch, **GREEDY)
        given = model.generate(**batch, **GREEDY, past_key_values=own)
        by_hand = [loop(model, batch), loop(model, batch, cache=DynamicCache(config=model.config.get_text_config()))]
        if lazy is not None:
            by_hand.append(loop(model, batch, cache=lazy))
    assert torch.equal(given.sequences, said.sequences) and all(map(torch.equal, given.logits, said.logits))
    assert given.past_key_values is own and all(isinstance(layer, PrunedLayer) for layer in own.layers)
    new = said.sequences[:, batch["input_ids"].shape[1] :]
    for tokens, logits, cache in by_hand:
        assert torch.equal(tokens, new)
        assert (logits - torch.stack(said.logits, 1)).abs().max() < 2e-5
        assert cache.get_seq_length() == own.get_seq_length()
        assert [held_by(layer) for layer in cache.layers] == [held_by(layer) for layer in own.layers]


@pytest.mark.parametrize(("name", "kind", "pad"), turns(list(METHODS), ("llama", VLM), (True, False)))
@torch.no_grad()
def test_a_second_turn_over_an_old_cache(kind: str, name: str, pad: bool) -> None:
    """Old and new entries compete in the second turn; `generate` and a loop by hand agree with the reference."""
    model, batch = build(kind), inputs(kind, 3, pad)
    mask, length = batch["attention_mask"], batch["input_ids"].shape[1]
    with vlmaccel.patched(model, METHODS[name]):
        first = model.generate(**batch, **GREEDY)
        cache = first.past_key_values
        talk = second_question(batch, first.sequences[:, length:])
        before = kept_of(cache, mask, length)
        second = model.generate(**talk, **GREEDY, past_key_values=cache)
        seen = cache.get_seq_length()
        # the last token that was said is not in the cache yet: it comes with the question
        rest = {**talk, "input_ids": talk["input_ids"][:, length + STEPS - 1 :]}
        tokens, logits, by_hand_cache = loop(model, rest, cache=loop(model, batch)[2])
        stats = vlmaccel.stats(model)
    total = talk["input_ids"].shape[1]
    after = kept_of(cache, talk["attention_mask"], total)
    assert seen == total + STEPS - 1 == by_hand_cache.get_seq_length()
    new = second.sequences[:, total:]
    assert torch.equal(tokens, new) and (logits - torch.stack(second.logits, 1)).abs().max() < 2e-5
    evicted = [{k: [before[b][k], after[b][k]] for k in range(DEPTH)} for b in range(3)]
    whole = torch.cat([talk["input_ids"][:, length:], new[:, :-1]], 1)
    for b, trace in enumerate(reference_of(model, batch, whole, evicted)):
        assert (torch.stack(second.logits, 1)[b] - trace.logits[-STEPS:]).abs().max() < 2e-5, f"sample {b}"
        for k in range(DEPTH):  # what was gone stays gone, and something went
            p = before[b][k].shape[1]
            assert not bool((after[b][k][:, :p] & ~before[b][k]).any())
        assert sum(int((~x).sum()) for x in after[b].values()) > sum(int((~x).sum()) for x in before[b].values())
    assert stats.kv_bytes < stats.kv_bytes_full


# ---- positions


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), ("llama", VLM, "qwen2.5-vl")))
@torch.no_grad()
def test_new_tokens_have_the_position_they_would_have_had(kind: str, name: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    seen: list[Tensor] = []
    rotary = getattr(model.model, "language_model", model.model).rotary_emb

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[1] if len(args) > 1 else kwargs["position_ids"])

    handle = rotary.register_forward_pre_hook(note, with_kwargs=True)
    decode(model, batch, answer_tokens(3))
    model.generate(**batch, **GREEDY)
    plain, seen = seen, []
    with vlmaccel.patched(model, METHODS[name]):
        decode(model, batch, answer_tokens(3))
        model.generate(**batch, **GREEDY)
    handle.remove()
    assert len(plain) == len(seen) and all(map(torch.equal, plain, seen))
    length = batch["input_ids"].shape[1]
    if kind != "qwen2.5-vl":
        assert plain[1].flatten().tolist() == [length] and plain[STEPS].flatten().tolist() == [length + STEPS - 1]


@pytest.mark.parametrize(("name", "kind", "positions"), turns(PREFILL, ("llama", VLM), ("renumber", "keep")))
@torch.no_grad()
def test_eviction_behind_tokens_that_were_dropped(kind: str, name: str, positions: Any) -> None:
    """PyramidDrop shortens the sequence, and renumbers it or not; what it left is evicted from each layer."""
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask, later = batch["attention_mask"], answer_tokens(3)
    both = [PyramidDrop(ratio=0.6, layers=(1, 4), positions=positions), METHODS[name]]
    with vlmaccel.patched(model, both):
        cache = model(**batch, use_cache=True).past_key_values
        stages = vlmaccel.stats(model).stages
        _, steps = decode(model, batch, later)
        said = model.generate(**batch, **GREEDY)
    assert [stage.layer for stage in stages] == [1, 4]
    schedules = [
        {s.layer: (s.keep[b][s.size[b] > 0] - start).tolist() for s in stages}
        for b, start in enumerate(starts_of(mask))
    ]
    kept = kept_of(cache, mask)
    for b, schedule in enumerate(schedules):
        left = torch.zeros(kept[b][5].shape[1], dtype=torch.bool)
        left[schedule[4]] = True
        assert not bool((kept[b][5] & ~left).any())
        left = 2 * (kept[b][0].shape[1] + 3 * len(schedule[1]) + 2 * len(schedule[4]))
        assert sum(int(x.sum()) for x in kept[b].values()) < left
    traces = reference_of(model, batch, later, kept, schedules, positions)
    assert_like_reference(traces, mask, None, steps)
    new = said.sequences[:, mask.shape[1] :]
    traces = reference_of(model, batch, new[:, :-1], kept, schedules, positions)
    assert_like_reference(traces, mask, None, torch.stack(said.logits, 1)[:, 1:])


# ---- several tokens at once over an evicted cache


class FirstOnly:
    """Evicts in the first prefill, then never again."""

    def cache(self, at: CacheEntries) -> Reduction | None:
        return None if at.run.past else super().cache(at)  # type: ignore[misc]


@dataclass(frozen=True)
class SnapOnce(FirstOnly, SnapKV):
    name: ClassVar[str] = "snap-once"


@dataclass(frozen=True)
class PyramidOnce(FirstOnly, PyramidKV):
    name: ClassVar[str] = "pyramid-once"


@dataclass(frozen=True)
class AdaOnce(FirstOnly, AdaKV):
    name: ClassVar[str] = "ada-once"


@dataclass(frozen=True)
class VLOnce(FirstOnly, VLCache):
    name: ClassVar[str] = "vl-once"


ONCE = {
    "snapkv": SnapOnce(budget=0.4, window=4),
    "pyramidkv": PyramidOnce(budget=0.4, window=2, beta=4),
    "adakv": AdaOnce(budget=0.4, window=2, pool=1),
    "vl-cache": VLOnce(budget=0.4, threshold=0.3),
}


@pytest.mark.parametrize(
    ("name", "kind", "attn", "chunk"),
    turns(list(ONCE), ("llama", VLM, "qwen2-hybrid", "qwen3-vl"), ("sdpa", "eager"), (3, STEPS)),
)
@torch.no_grad()
def test_several_tokens_at_once_are_one_by_one(name: str, kind: str, attn: str, chunk: int) -> None:
    """Unequal layers and heads, a padded batch: the mask of a chunk is causal and right in every layer."""
    model, batch = build(kind, attn), inputs(kind, 3, pad=True)
    mask, later = batch["attention_mask"], answer_tokens(3)
    with vlmaccel.patched(model, ONCE[name]):
        _, steps = decode(model, batch, later)
        cache, chunks = model(**batch).past_key_values, []
        kept = kept_of(cache, mask)
        for part in later.split(chunk, 1):
            chunks.append(go_on(model, batch, part, sum(x.shape[1] for x in chunks), cache).logits)
    together = torch.cat(chunks, 1)
    assert (together - steps).abs().max() < 2e-5
    assert_like_reference(reference_of(model, batch, later, kept), mask, None, together)


@pytest.mark.parametrize(("name", "kind"), turns(list(ONCE), ("llama", VLM)))
@torch.no_grad()
def test_a_prefill_in_chunks_is_a_prefill_and_its_rest(name: str, kind: str) -> None:
    """`generate` in chunks: the first one is evicted from, the others see what was left and stay whole."""
    model, batch = build(kind), text_of(inputs("llama", 3, pad=True))
    mask = batch["attention_mask"]
    head = {k: x[:, :26] for k, x in batch.items()}
    with vlmaccel.patched(model, ONCE[name]):
        said = model.generate(**batch, **GREEDY, prefill_chunk_size=26)
        kept = kept_of(model(**head).past_key_values, mask[:, :26])
    new = said.sequences[:, 30:]
    traces = reference_of(model, head, torch.cat([batch["input_ids"][:, 26:], new[:, :-1]], 1), kept)
    for b, trace in enumerate(traces):
        assert (torch.stack(said.logits, 1)[b] - trace.logits[-STEPS:]).abs().max() < 2e-5


# ---- assisted decoding


@pytest.mark.parametrize(("name", "kind"), turns(PREFILL, ("llama", VLM, "qwen2-hybrid", "qwen3-vl")))
@torch.no_grad()
def test_prompt_lookup_says_what_greedy_decoding_says(kind: str, name: str) -> None:
    model, batch = build(kind), inputs(kind)
    options = {**GREEDY, "max_new_tokens": 12}
    with vlmaccel.patched(model, METHODS[name]):
        greedy = model.generate(**batch, **options)
        assisted = model.generate(**batch, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert (torch.stack(assisted.logits) - torch.stack(greedy.logits)).abs().max() < 2e-5


@pytest.mark.parametrize(("name", "kind", "attn"), turns(PREFILL, ("llama", VLM), ("sdpa", "eager")))
@torch.no_grad()
def test_candidates_are_checked_over_an_evicted_cache_and_taken_back(name: str, kind: str, attn: str) -> None:
    """What assisted decoding does after its first step, in a padded batch: four candidates, of which two are right."""
    model, batch, later = build(kind, attn), inputs(kind, 3, pad=True), answer_tokens(3)
    mask, wrong = batch["attention_mask"], answer_tokens(3).flip(1)[:, :2]
    with vlmaccel.patched(model, METHODS[name]):
        _, steps = decode(model, batch, later)
        cache = model(**batch).past_key_values
        before = kept_of(cache, mask)
        candidates = torch.cat([later[:, :2], wrong], 1)
        checked = model(candidates, attention_mask=extend_mask(mask, 4), past_key_values=cache, logits_to_keep=4).logits
        assert (checked[:, :2] - steps[:, :2]).abs().max() < 2e-5
        cache.crop(-2)
        assert cache.get_seq_length() == mask.shape[1] + 2
        again = model(
            later[:, 2:5], attention_mask=extend_mask(mask, 5), past_key_values=cache, logits_to_keep=3
        ).logits
        last = model(later[:, 5:6], attention_mask=extend_mask(mask, 6), past_key_values=cache).logits
        assert (torch.cat([again, last], 1) - steps[:, 2:6]).abs().max() < 2e-5
    after = kept_of(cache, mask, mask.shape[1])
    assert all(torch.equal(before[b][k], after[b][k]) for b in range(3) for k in range(DEPTH))


@prefill_methods
@torch.no_grad()
def test_candidates_are_checked_over_what_is_left(name: str) -> None:
    """As assisted decoding checks them: several at once, some taken back. Nothing is evicted for them."""
    model, batch, later = build("llama"), inputs("llama"), answer_tokens(1)
    with vlmaccel.patched(model, METHODS[name]):
        steps = decode(model, batch, later)[1]
        cache = model(**batch, use_cache=True).past_key_values
        mask = batch["attention_mask"]
        for start, stop, right in ((0, 3, 2), (2, 6, 3)):
            out = model(
                later[:, start:stop],
                attention_mask=extend_mask(mask, stop),
                past_key_values=cache,
                logits_to_keep=stop - start,
            )
            assert (out.logits - steps[:, start:stop]).abs().max() < 2e-5
            cache.crop(start + right - stop)
        assert cache.get_seq_length() == mask.shape[1] + 5


@prefill_methods
@torch.no_grad()
def test_an_assistant_s_first_candidates_see_the_whole_prompt_and_later_ones_what_is_left(name: str) -> None:
    """The first come together with the prompt, and see all of it as it does itself. (With a cache that is there already,
    assisted decoding of transformers reads the whole prompt once more.)"""
    model, batch = build("llama"), inputs("llama")
    mask, length, starts = batch["attention_mask"], batch["input_ids"].shape[1], []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        starts.append(int(kwargs["position_ids"][0, 0]))

    with vlmaccel.patched(model, METHODS[name]):
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        said = model.generate(**batch, **{**GREEDY, "max_new_tokens": 12}, assistant_model=build("llama"))
        handle.remove()
    assert starts[0] == 0 and length < starts[1] < length + 12  # some of the first candidates were right
    kept = kept_of(said.past_key_values, mask, starts[1])
    assert not all(bool(x.all()) for x in kept[0].values())
    (trace,) = reference_of(model, batch, said.sequences[:, length:-1], kept)
    assert (torch.stack(said.logits, 1)[0] - trace.logits[length - 1 :]).abs().max() < 2e-5


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PREFILL])
@torch.no_grad()
def test_assisted_decoding_is_refused_by_methods_that_evict_while_decoding(name: str) -> None:
    model, batch = build("llama"), inputs("llama")
    with vlmaccel.patched(model, METHODS[name]):
        right = model.generate(**batch, **GREEDY).sequences
        with pytest.raises(NotImplementedError, match=f"{name}.*assisted decoding.*snapkv"):
            model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=3)
        assert torch.equal(model.generate(**batch, **GREEDY).sequences, right)


# ---- beams and several answers


@pytest.mark.parametrize(("name", "kind"), turns(PREFILL, ("llama", VLM, "qwen2-hybrid", "qwen3-vl")))
@torch.no_grad()
def test_beam_search(kind: str, name: str) -> None:
    """The score of a beam is the mean log-probability of its tokens: the reference's, for the same tokens."""
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask = batch["attention_mask"]
    beams = dict(max_new_tokens=STEPS, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with vlmaccel.patched(model, METHODS[name]):
        kept = kept_of(model(**batch).past_key_values, mask)
        said = model.generate(**batch, **beams, num_return_sequences=2)
    new = said.sequences[:, mask.shape[1] :]
    for answer in (0, 1):
        for b, trace in enumerate(reference_of(model, batch, new[answer::2], kept)):
            log_probability = trace.logits[-STEPS - 1 : -1].log_softmax(-1)
            score = log_probability.gather(1, new[answer::2][b, :, None]).mean()
            assert abs(score - said.sequences_scores[answer::2][b]) < 1e-5


@pytest.mark.parametrize(("name", "kind"), turns(PREFILL, ("llama", VLM, "qwen2-vl")))
@torch.no_grad()
def test_several_sampled_answers(kind: str, name: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask = batch["attention_mask"]
    torch.manual_seed(3)
    with vlmaccel.patched(model, METHODS[name]):
        kept = kept_of(model(**batch).past_key_values, mask)
        said = model.generate(**batch, **{**GREEDY, "do_sample": True, "num_return_sequences": 2, "top_k": 0})
    new = said.sequences[:, mask.shape[1] :]
    assert not torch.equal(new[0::2], new[1::2])
    for answer in (0, 1):
        traces = reference_of(model, batch, new[answer::2, :-1], kept)
        assert_like_reference(traces, mask, None, torch.stack(said.logits, 1)[answer::2, 1:])


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), ("llama", VLM)))
@torch.no_grad()
def test_reordering_a_cache_by_hand(kind: str, name: str) -> None:
    """As beam search does between steps: every row goes on as the sample it was taken from would have alone."""
    model, batch, later = build(kind), inputs(kind, 3, pad=True), answer_tokens(3)
    mask = batch["attention_mask"]
    method = replace(METHODS[name], every=3) if hasattr(METHODS[name], "every") else METHODS[name]
    beams = torch.tensor([2, 0, 0])
    with vlmaccel.patched(model, method):
        _, steps = decode(model, batch, later)
        cache = model(**batch).past_key_values
        for t in range(STEPS):
            if t == 4:
                cache.reorder_cache(beams)
                later, mask = later[beams], mask[beams]
            seen = extend_mask(mask, t + 1)
            out = model(later[:, t : t + 1], attention_mask=seen, past_key_values=cache).logits[:, -1]
            assert (out - (steps[:, t] if t < 4 else steps[beams, t])).abs().max() < 2e-5


# ---- one model, many users


@every_method
@torch.no_grad()
def test_the_second_request_knows_nothing_of_the_first(name: str) -> None:
    """In turn and mixed: what is evicted belongs to the cache, and each is evicted from."""
    model, batches = build(VLM), [inputs(VLM, 3, pad=True), inputs(VLM, 2), text_of(inputs("llama", 1))]
    method = replace(METHODS[name], every=3) if hasattr(METHODS[name], "every") else METHODS[name]
    fresh = []
    for batch in batches:
        with vlmaccel.patched(build(VLM), method) as new:
            fresh.append(decode(new, batch, answer_tokens(len(batch["input_ids"])))[1])
    with vlmaccel.patched(model, method):
        for i in (1, 2, 0):
            batch = batches[i]
            assert torch.equal(decode(model, batch, answer_tokens(len(batch["input_ids"])))[1], fresh[i])
            stats = vlmaccel.stats(model)
            assert stats.kv_bytes < stats.kv_bytes_full
        caches = [model(**batch).past_key_values for batch in batches]
        for t in range(STEPS):
            for batch, cache, want in zip(batches, caches, fresh, strict=True):
                seen = extend_mask(batch["attention_mask"], t + 1)
                new = answer_tokens(len(seen))[:, t : t + 1]
                logits = model(new, attention_mask=seen, past_key_values=cache).logits[:, -1]
                assert torch.equal(logits, want[:, t])


@pytest.mark.parametrize("name", ["h2o", "adakv", "vl-cache"])
def test_two_threads_and_two_models(name: str) -> None:
    models = [build("llama"), build(VLM)]
    jobs = [
        (models[0], inputs("llama", 3, pad=True)),
        (models[0], inputs("llama", 2)),
        (models[1], inputs(VLM, 3, pad=True)),
    ]
    for model in models:
        vlmaccel.patch(model, METHODS[name])
    want = [model.generate(**batch, **GREEDY).sequences for model, batch in jobs]
    got: dict[int, list[Tensor]] = {i: [] for i in range(len(jobs))}
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        start.wait()
        for _ in range(2):
            got[i].append(jobs[i][0].generate(**jobs[i][1], **GREEDY).sequences)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(got[i]) == 2 and all(torch.equal(x, want[i]) for x in got[i]) for i in got)


@every_method
def test_a_method_is_not_changed_by_a_run(name: str) -> None:
    method = METHODS[name]
    before, text = pickle.dumps(method), repr(method)
    for kind in ("llama", VLM):
        with vlmaccel.patched(build(kind), method) as model:
            model.generate(**inputs(kind, 3, pad=True), **GREEDY)
    assert pickle.dumps(method) == before and repr(method) == text and hash(method) == hash(pickle.loads(before))


# ---- caches that cannot hold less


class QuantizedLike(DynamicLayer):
    """Stands for a layer that keeps its entries in a form of its own."""


class Offloaded(DynamicCache):
    """Offloads as `DynamicCache(offloading=True)` does, without the GPU's streams."""

    def __init__(self) -> None:
        super().__init__()
        self.offloading, self.only_non_sliding = True, False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        return self.layers[layer_idx].update(key_states, value_states)


CACHES = {
    "static": lambda model: StaticCache(config=model.config.get_text_config(), max_cache_len=64),
    "quantized": lambda model: Cache(layers=[QuantizedLike() for _ in range(DEPTH)]),
    "offloaded": lambda model: Offloaded(),
}


@pytest.mark.parametrize(("name", "kind", "kind_of_cache"), turns(list(METHODS), ("llama", VLM), list(CACHES)))
@torch.no_grad()
def test_a_cache_that_cannot_be_evicted_from_is_left_with_a_warning(name: str, kind: str, kind_of_cache: str) -> None:
    model, batch, make = build(kind), inputs(kind, 3, pad=True), CACHES[kind_of_cache]
    plain = model.generate(**batch, **GREEDY, past_key_values=make(model))
    with vlmaccel.patched(model, METHODS[name]), pytest.warns(UserWarning, match="Use the default dynamic cache"):
        said = model.generate(**batch, **GREEDY, past_key_values=make(model))
    assert torch.equal(said.sequences, plain.sequences) and all(map(torch.equal, said.logits, plain.logits))
    assert not any(isinstance(layer, PrunedLayer) for layer in said.past_key_values.layers)
    with vlmaccel.patched(model, METHODS[name]), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(**batch, **GREEDY)


@pytest.mark.gpu
@torch.no_grad()
def test_the_offloading_cache_of_transformers_is_one_of_them() -> None:
    model, batch = build("llama").cuda(), {k: x.cuda() for k, x in inputs("llama", 3, pad=True).items()}
    plain = model.generate(**batch, **GREEDY, past_key_values=DynamicCache(offloading=True))
    with vlmaccel.patched(model, METHODS["snapkv"]), pytest.warns(UserWarning, match="Use the default dynamic cache"):
        said = model.generate(**batch, **GREEDY, past_key_values=DynamicCache(offloading=True))
    assert torch.equal(said.sequences, plain.sequences)


# ---- bytes


def storages(x: Any, found: dict[int, int] | None = None) -> dict[int, int]:
    """Bytes of every piece of memory that the tensors in an object hold on to, views' whole memory included."""
    found = {} if found is None else found
    if isinstance(x, Tensor):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    elif isinstance(x, dict):
        for value in x.values():
            storages(value, found)
    elif hasattr(x, "__dict__") and not isinstance(x, type):
        storages(vars(x), found)
    return found


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), ("llama", VLM, "qwen2-hybrid")))
@torch.no_grad()
def test_bytes_are_those_of_the_tensors_that_are_held(kind: str, name: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    full = sum(sum(storages(layer).values()) for layer in model(**batch, use_cache=True).past_key_values.layers)
    with vlmaccel.patched(model, METHODS[name]):
        cache = model(**batch, use_cache=True).past_key_values
        stats = vlmaccel.stats(model)
        after = model(
            answer_tokens(3)[:, :1], attention_mask=extend_mask(batch["attention_mask"], 1), past_key_values=cache
        )
        assert vlmaccel.stats(model).kv_bytes_by_layer == stats.kv_bytes_by_layer  # a step is no prefill
        again = model(**batch, use_cache=True).past_key_values
    held, whole = kv_bytes_by_layer(again)
    assert tuple(stats.kv_bytes_by_layer) == held and stats.kv_bytes == sum(held)
    assert [sum(storages(layer).values()) for layer in again.layers] == list(held)
    assert stats.kv_bytes_full == sum(whole)
    if kind != "qwen2-hybrid":
        assert stats.kv_bytes_full == full
    assert stats.kv_bytes < stats.kv_bytes_full
    assert after.past_key_values.get_seq_length() == batch["input_ids"].shape[1] + 1


@every_method
@torch.no_grad()
def test_the_peak_falls_where_layers_are_evicted_one_by_one(name: str) -> None:
    """A longer prompt, so that what tells tokens apart is small beside the tokens."""
    model, method = build("llama"), METHODS[name]
    batch = {"input_ids": torch.randint(2, 110, (2, 200), generator=torch.Generator().manual_seed(1))}
    with vlmaccel.patched(model, method):
        cache = model(**batch, use_cache=True).past_key_values
        stats = vlmaccel.stats(model)
    note = 200 * 2 * 4 * (2 if name in ("h2o", "vl-cache") else 1 if name == "vl-cache-layer" else 0)
    bookkeeping = DEPTH * (200 * 2 * 4 + note)  # one position, and the scores of the method, for each entry
    assert max(stats.kv_bytes_by_layer) < stats.kv_bytes <= stats.kv_bytes_peak
    if method.two_phase:
        assert stats.kv_bytes_full < stats.kv_bytes_peak <= stats.kv_bytes_full + bookkeeping
    else:
        assert stats.kv_bytes_peak < stats.kv_bytes_full
        one = max(kv_bytes_by_layer(cache)[1]) + bookkeeping // DEPTH
        assert stats.kv_bytes_peak <= stats.kv_bytes + one


@pytest.mark.parametrize("kind", ["llama", VLM])
@every_method
@torch.no_grad()
def test_notes_of_a_prefill_are_gone_those_of_decoding_are_counted(kind: str, name: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    with vlmaccel.patched(model, METHODS[name]):
        cache = model(**batch).past_key_values
        layer = cache.layers[2]
        assert all(bool(layer.notes) == (name == "h2o") for layer in cache.layers)
        if name == "h2o":
            assert {key: x.shape for key, x in layer.notes.items()} == {"h2o": (3, 2, layer.held)}
            assert layer.nbytes == layer.keys.nbytes + layer.values.nbytes + layer.slots.nbytes + 3 * 2 * layer.held * 4
            seen = extend_mask(batch["attention_mask"], 1)
            model(answer_tokens(3)[:, :1], attention_mask=seen, past_key_values=cache)
            assert layer.notes["h2o"].shape == (3, 2, layer.held)


# ---- no attention matrix


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@dataclass(frozen=True)
class Watched(SnapKV):
    """SnapKV that notes the largest tensor made while it scores and chooses."""

    name: ClassVar[str] = "watched"
    largest: Any = None

    def cache(self, at: CacheEntries) -> Reduction | None:
        with self.largest:
            return super().cache(at)


@torch.no_grad()
def test_scoring_makes_a_row_for_each_observed_token_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "score_rows", score_rows._torch_form)  # not as one operation
    n, window, heads = 480, 8, 4
    model, ids = build("llama"), torch.randint(2, 100, (1, 480), generator=torch.Generator().manual_seed(0))
    largest = Largest()
    with vlmaccel.patched(model, Watched(budget=0.2, window=window, largest=largest)):
        model(ids, logits_to_keep=1)
    assert window * n * heads / 2 < largest.numel <= window * n * heads


@every_method
@torch.no_grad()
def test_no_attention_matrix_is_made(name: str) -> None:
    n = 1024
    ids = torch.randint(2, 100, (1, n), generator=torch.Generator().manual_seed(0))
    for attn, made in (("sdpa", False), ("eager", True)):  # eager itself makes one: so it would be seen
        with vlmaccel.patched(build("llama", attn), METHODS[name]) as model, Largest() as largest:
            model(ids, logits_to_keep=1)
        assert (largest.numel >= n * n) == made


@pytest.mark.parametrize("name", ["snapkv", "vl-cache"])
@torch.no_grad()
def test_what_is_kept_does_not_depend_on_whether_a_sliding_layer_records_its_past(name: str) -> None:
    model, batch, caches = build("mistral-sliding"), inputs("mistral-sliding"), []
    with vlmaccel.patched(model, replace(METHODS[name], budget=5)):
        for record in (False, True):
            cache = DynamicCache(config=model.config)
            for layer in cache.layers if record else ():
                layer.activate_past_recording()
            caches.append(model(**batch, past_key_values=cache).past_key_values)
    assert [held_by(layer) for layer in caches[0].layers] == [held_by(layer) for layer in caches[1].layers]


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv", "adakv", "vl-cache"])
@torch.no_grad()
def test_compiled_says_the_same(name: str) -> None:
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    with vlmaccel.patched(model, METHODS[name]):
        want = model.generate(**batch, **GREEDY).sequences
        compiled = torch.compile(model)
        assert torch.equal(compiled.generate(**batch, **GREEDY).sequences, want)
        assert torch.equal(loop(compiled, batch)[0], want[:, batch["input_ids"].shape[1] :])
        assert vlmaccel.stats(compiled).kv_bytes < vlmaccel.stats(compiled).kv_bytes_full
    torch.compiler.reset()
