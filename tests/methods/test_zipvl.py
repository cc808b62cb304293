"""ZipVL: it chooses what its formula says, and what it passes by is passed by as if by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import vlmaccel
from tests.support.drops import GREEDY, STEPS, answer_tokens, assert_like_reference, decode, extend_mask, turns
from tests.support.evictions import alone, kept_of, starts_of
from tests.support.models import DEPTH, SLIDING, build, inputs
from tests.support.reference import Reference
from tests.support.sparse import Seen, attended_of, call, chosen_of, long_inputs, recorded, reference_of, share_of
from vlmaccel.cache.mixed import MixedLayer
from vlmaccel.flops import decoder_flops
from vlmaccel.methods import BlockSparse, MixedPrecisionKV, PyramidDrop, SnapKV, ToMeDecoder, ZipVL
from vlmaccel.methods.zipvl import candidates, holding, last_of, received, seen_by

VLM = "llava-clip-llama"
KINDS = ("llama", "qwen3", VLM, "llava-siglip-qwen2", "llava-next")
SHAPES = {"one": (1, False), "three": (3, False), "three-padded": (3, True)}
SMALL = ZipVL(tau=0.8, recent=3, random=2)  # for prompts of 19 to 60 tokens
EVICT, FULL = SMALL, replace(SMALL, kv="full")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def choices(model: Any, batch: dict[str, Tensor], method: ZipVL, *before: Any) -> list[Seen]:
    recording, calls = recorded(method)
    with vlmaccel.patched(model, [*before, recording]):
        model(**batch)
    return calls


def rows_of(method: ZipVL, seen: Seen, b: int) -> list[int]:
    """Probe rows of a sample without its padding."""
    rows = method._probe_rows(seen.at, seen.at.real & ~candidates(seen.at))[b]
    start = starts_of(seen.at.real.byte())[b]
    return [row - start for row in rows.tolist() if row >= 0]


def slow_choice(attention: Tensor, rows: list[int], method: ZipVL) -> list[int]:
    """The formula, a token at a time. attention: (n, n) float64."""
    n, a = len(attention), attention.tolist()
    mass = [sum(a[i][j] for i in rows) for j in range(n)]
    score = [mass[j] / max(1, sum(i >= j for i in rows)) for j in range(n)]
    if method.rule == "threshold":
        chosen = {j for j in range(n) if score[j] > method.tau * sum(score) / n}
    else:
        chosen, held = set[int](), 0.0
        for j in sorted(range(n), key=lambda j: -score[j]):
            if held >= method.tau * sum(mass):
                break
            chosen.add(j)
            held += mass[j]
    return sorted(chosen | {n - 1})


# ---- what it chooses


WAYS = [
    *((kind, shape) for kind in ("llama", VLM) for shape in SHAPES),
    *((kind, "three-padded") for kind in ("qwen3", "llava-siglip-qwen2", "llava-next", "qwen3-vl")),
]


@pytest.mark.parametrize(
    ("kind", "shape", "method"),
    turns(WAYS, (SMALL, replace(SMALL, tau=0.95, recent=0.1, random=0.2), replace(SMALL, rule="threshold", tau=0.6))),
)
def test_the_choice_is_the_formula_s(kind: str, shape: str, method: ZipVL) -> None:
    """At every layer, given what the layers before did."""
    model, batch = build(kind), inputs(kind, *SHAPES[shape])
    mask = batch["attention_mask"]
    calls = choices(model, batch, method)
    assert [seen.layer for seen in calls] == list(range(DEPTH))
    chosen, attended, reference = chosen_of(calls, mask), attended_of(calls, mask), Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        trace = reference.run(embeds, attended=attended[b])
        for k, seen in enumerate(calls):
            wanted = slow_choice(reference.attention(trace, k), rows_of(method, seen, b), method)
            assert chosen[b][k][0].nonzero().flatten().tolist() == wanted, f"sample {b}, layer {k}"
            assert not bool(seen.pattern.chosen[b, ~mask[b].bool()].any())


@pytest.mark.parametrize(
    ("recent", "random", "numbers"),
    [(0.05, 0.05, (2, 2)), (0.1, 0.3, (4, 12)), (3, 0, (3, 0)), (0.0, 5, (1, 5)), (0, 0.0, (1, 0)), (100, 7, (40, 0))],
)
def test_probe_rows(recent: Any, random: Any, numbers: tuple[int, int]) -> None:
    """The last ones, at least one, and some of the others."""
    at = call(batch=3, n=50, padding=(10, 0, 31))
    rows = ZipVL(recent=recent, random=random)._probe_rows(at, at.real)
    probes = [[row for row in sample if row >= 0] for sample in rows.tolist()]
    last, others = numbers
    assert len(probes[0]) == last + others
    assert probes[0][len(probes[0]) - last :] == list(range(50 - last, 50))
    for sample, start, tail in zip(probes, (10, 0, 31), rows.tolist(), strict=True):
        assert sample == sorted(set(sample)) and min(sample) >= start
        assert tail == sample + [-1] * (len(tail) - len(sample))


def test_random_rows_depend_on_the_length_the_layer_and_the_seed_alone() -> None:
    def rows(seed: int = 0, padding: int = 10, **options: Any) -> list[int]:
        at = call(batch=2, n=50, padding=(padding, 0), **options)
        found = ZipVL(recent=1, random=6, seed=seed)._probe_rows(at, at.real)[0]
        return [row - padding for row in found.tolist()]

    alone = call(n=40)
    first = rows()
    assert len(first) == 7 and max(first) == 39
    assert first == rows() == ZipVL(recent=1, random=6)._probe_rows(alone, alone.real)[0].tolist()
    assert len({tuple(x) for x in (first, rows(1), rows(layer=1), rows(padding=11))}) == 4


@given(
    tau=st.floats(0, 1),
    n=st.integers(1, 40),
    past=st.sampled_from([0, 7]),
    seed=st.integers(0, 99),
    behind=st.integers(0, 3),
)
def test_the_chosen_hold_tau_and_no_fewer_would(tau: float, n: int, past: int, seed: int, behind: int) -> None:
    behind = min(behind, n - 1)
    at = call(batch=2, n=n, past=past, padding=(min(n - 1 - behind, 3), 0), seed=seed, behind=behind)
    method = ZipVL(tau=tau, recent=0.1, random=0.2)
    pattern = method.sparse_attention(at)
    if tau == 1:
        assert pattern is None
        return
    chosen, prompt = pattern.chosen, at.real & ~candidates(at)
    rows = method._probe_rows(at, prompt)
    mass = received(at, rows).double()
    score = mass / seen_by(rows, past + n).clamp(min=1)
    assert not bool((chosen & ~at.real).any())
    assert bool(chosen[:, past + n - 1 - behind :].all())  # the prompt's last token, and what is behind it
    held = (mass * chosen).sum(1)
    assert bool((held >= tau * mass.sum(1) - 1e-9).all())
    forced = last_of(prompt) | candidates(at)
    for b in range(2):
        free = (chosen & ~forced)[b].nonzero().flatten()
        others = (prompt & ~chosen)[b].nonzero().flatten()
        if len(free) and len(others):
            assert score[b, free].min() >= score[b, others].max()
        if len(free):  # without the worst, and without a last token that would not have been needed, it is too little
            worst = free[score[b, free].argmin()]
            without = chosen[b].clone()
            without[worst] = False
            without[forced[b] & (score[b] <= score[b, worst])] = False
            assert mass[b, without].sum() < tau * mass[b].sum() + 1e-9


@given(a=st.floats(0, 1), b=st.floats(0, 1), seed=st.integers(0, 99), rule=st.sampled_from(["mass", "threshold"]))
def test_more_tau_never_chooses_fewer_by_mass_nor_more_by_threshold(a: float, b: float, seed: int, rule: Any) -> None:
    at, more = call(batch=2, padding=(5, 0), seed=seed), sorted([a, b])
    sets = [ZipVL(tau=tau, rule=rule).sparse_attention(at) for tau in more]
    less, most = (at.real if pattern is None else pattern.chosen for pattern in sets)
    if rule == "threshold":
        less, most = most, less
    assert bool((less <= most).all())


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 3.0, 1e9])
def test_the_rule_threshold(tau: float) -> None:
    """More than tau times the mean: all but the last few, or only the last token."""
    at = call(batch=2, padding=(9, 0))
    method = ZipVL(rule="threshold", tau=tau, recent=4, random=4)
    chosen = method.sparse_attention(at).chosen
    rows = method._probe_rows(at, at.real)
    score = received(at, rows) / seen_by(rows, 40).clamp(min=1)
    for b in range(2):
        mean = score[b, at.real[b]].mean()
        wanted = at.real[b] & (score[b] > tau * mean)
        wanted[-1] = True
        assert torch.equal(chosen[b], wanted)
    assert int(chosen[1].sum()) == {0.0: 40, 1e9: 1}.get(tau, int(chosen[1].sum()))


def test_the_fewest_that_hold_a_share() -> None:
    mass = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    score = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4]])
    for share, want in ((0.0, (0, 0)), (0.1, (1, 1)), (0.11, (2, 1)), (0.5, (3, 2)), (0.61, (4, 2)), (1.0, (4, 4))):
        assert holding(share, mass, score).sum(1).tolist() == list(want)
    assert holding(0.3, mass, score)[0].tolist() == [False, False, True, True]


def test_attention_is_received_from_the_rows_alone() -> None:
    at = call(batch=2, padding=(5, 0), past=6)
    rows = torch.tensor([[20, 30, 45], [7, 45, -1]])
    key = at.key.repeat_interleave(2, 1)
    hidden = torch.full((46, 46), -torch.inf).triu(1)[6:] + torch.zeros(2, 1, 1, 46).masked_fill(
        ~at.real[:, None, None], -torch.inf
    )
    attention = (at.query @ key.mT * at.scale + hidden).softmax(-1).mean(1)
    got, seen = received(at, rows), seen_by(rows, 46)
    for b in range(2):
        some = [row for row in rows[b].tolist() if row >= 0]
        assert torch.allclose(got[b], sum(attention[b, row - 6] for row in some), atol=1e-6)
        assert seen[b].tolist() == [sum(row >= key for row in some) for key in range(46)]


def test_the_share_differs_from_sample_to_sample_and_layer_to_layer() -> None:
    calls = choices(build(VLM), inputs(VLM, 3, pad=True), SMALL)
    shares = [(seen.pattern.chosen.sum(1) / seen.at.real.sum(1)).tolist() for seen in calls]
    assert len({round(x, 4) for x in shares[0]}) == 3 and len({round(layer[0], 4) for layer in shares}) > 2
    assert min(map(min, shares)) > 0.3 and max(map(max, shares)) < 0.95


# ---- what is passed by is passed by


def decoding_ways() -> list[Any]:
    return [*turns(WAYS, (EVICT, FULL)), ("qwen2-hybrid", "three-padded", EVICT), ("mistral", "three-padded", EVICT)]


@pytest.mark.parametrize(("kind", "shape", "method"), decoding_ways())
def test_prefill_and_decoding_equal_the_reference(kind: str, shape: str, method: ZipVL) -> None:
    model, batch = build(kind), inputs(kind, *SHAPES[shape])
    mask, later = batch["attention_mask"], answer_tokens(len(batch["input_ids"]))
    full_prompt, full_steps = decode(model, batch, later)
    recording, calls = recorded(method)
    with vlmaccel.patched(model, recording):
        prompt, steps = decode(model, batch, later)
        attended, chosen = attended_of(calls, mask), chosen_of(calls, mask)
        said = model.generate(**batch, **GREEDY)
        kept = kept_of(model(**batch).past_key_values, mask)
    for b in range(len(mask)):
        for k, picked in chosen[b].items():
            assert torch.equal(kept[b][k], picked if method.kv == "evict" else torch.ones_like(picked))
    evicted = chosen if method.kv == "evict" else None
    assert_like_reference(reference_of(model, batch, later, attended, evicted), mask, prompt, steps)
    assert (prompt - full_prompt)[:, -1].abs().amax(-1).min() > 0.05
    assert (steps - full_steps).abs().amax((1, 2)).min() > 0.05
    new = said.sequences[:, mask.shape[1] :]
    traces = reference_of(model, batch, new[:, :-1], attended, evicted)
    assert_like_reference(traces, mask, None, torch.stack(said.logits, 1)[:, 1:])


@pytest.mark.parametrize(("kind", "pad", "kv"), turns([*KINDS, *SLIDING], (True, False), ("evict", "full", "mixed")))
def test_tau_1_is_the_model_bit_by_bit(kind: str, pad: bool, kv: Any) -> None:
    model, batch = build(kind), inputs(kind, 3, pad)
    real, later = batch["attention_mask"].bool(), answer_tokens(3)
    before = decode(model, batch, later)
    # in few bits nothing is before 100 tokens
    with vlmaccel.patched(model, ZipVL(tau=1, kv=kv)):
        inside = decode(model, batch, later)
        assert vlmaccel.stats(model).attended == [1.0] * DEPTH
    with vlmaccel.patched(model, SMALL):
        different = decode(model, batch, later)
    after = decode(model, batch, later)
    assert torch.equal(inside[0][real], before[0][real])
    assert torch.equal(inside[1], before[1]) or (kv == "mixed" and (inside[1] - before[1]).abs().max() < 1e-5)
    assert all(map(torch.equal, after, before))
    assert kind == "mistral-sliding" or not torch.equal(different[1], before[1])


def test_layers_whose_window_is_shorter_than_the_prompt_compute_everything() -> None:
    for kind, layers in (("mistral-sliding", []), ("qwen2-hybrid", [0, 2, 4]), ("mistral", list(range(DEPTH)))):
        model, batch = build(kind), inputs(kind, 3, pad=True)
        plain = decode(model, batch, answer_tokens(3))
        assert [seen.layer for seen in choices(model, batch, SMALL)] == layers
        with vlmaccel.patched(model, SMALL):
            got = decode(model, batch, answer_tokens(3))
            attended = vlmaccel.stats(model).attended
            uncached = model(**batch, use_cache=False).logits[:, -1]
            lazy = DynamicCache()  # which does not know of sliding layers
            assert torch.equal(model(**batch, past_key_values=lazy).logits[:, -1], got[0][:, -1])
        assert [k for k, share in enumerate(attended) if share < 1] == layers
        assert (uncached - got[0][:, -1]).abs().max() < 2e-5
        if not layers:
            assert torch.equal(got[1], plain[1])


@pytest.mark.parametrize(("kind", "kv"), turns(["llama", "qwen3", VLM], ("evict", "full", "mixed")))
def test_a_padded_batch_is_its_samples(kind: str, kv: Any) -> None:
    model, batch, later = build(kind), inputs(kind, 3, pad=True), answer_tokens(3)
    method = replace(SMALL, kv=kv, residual=4)
    together = chosen_of(choices(model, batch, method), batch["attention_mask"])
    with vlmaccel.patched(model, method):
        _, steps = decode(model, batch, later)
        for b in range(3):
            one = alone(batch, b)
            _, single = decode(model, one, later[b : b + 1])
            assert (single[0] - steps[b]).abs().max() < 2e-5
    for b in range(3):
        one = alone(batch, b)
        (own,) = chosen_of(choices(model, one, method), one["attention_mask"])
        assert all(torch.equal(own[k], together[b][k]) for k in range(DEPTH))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_prompts(length: int) -> None:
    model, ids = build("llama"), torch.arange(5, 5 + length)[None]
    for method in (replace(SMALL, tau=0.0), ZipVL(), replace(SMALL, tau=0.5, kv="mixed")):
        with vlmaccel.patched(model, method):
            assert model.generate(ids, **GREEDY).sequences.shape == (1, length + STEPS)


@pytest.mark.parametrize("kv", ["evict", "mixed"])
def test_half_precision(kv: Any) -> None:
    model, batch = build("llama").bfloat16(), inputs("llama", 3, pad=True)
    with vlmaccel.patched(model, replace(SMALL, kv=kv, residual=0)):
        said = model.generate(**batch, **GREEDY)
    assert torch.stack(said.logits).isfinite().all()


# ---- chosen entries in more bits


def bits_of(layer: MixedLayer, b: int, head: int) -> dict[int, int]:
    """{logical index: bits}."""
    found: dict[int, int] = {}
    for bits, slots in [*((bits, store.slots) for bits, store in layer.stores.items()), (16, layer.exact_slots)]:
        group = min(head, slots.index.shape[1] - 1)
        found |= dict.fromkeys(slots.index[b, group][slots.sizes[b, group] > 0].tolist(), bits)
    return found


def test_chosen_entries_get_4_bits_and_the_others_2() -> None:
    """Whole groups of 32, the oldest first; the first 4 tokens and the last ones stay."""
    model, batch = build("llama"), long_inputs((150, 130))
    method = replace(SMALL, tau=0.7, kv="mixed", residual=7)
    chosen = chosen_of(choices(model, batch, method), batch["attention_mask"])
    with vlmaccel.patched(model, method):
        cache = model(**batch).past_key_values
    for k, layer in enumerate(cache.layers):
        assert isinstance(layer, MixedLayer) and not layer.notes
        for b, (start, n) in enumerate(((0, 150), (20, 130))):
            picked = set(chosen[b][k][0].nonzero().flatten().tolist())
            old = range(4, n - 7)
            want = dict.fromkeys(range(n), 16)
            for bits, some in ((4, [i for i in old if i in picked]), (2, [i for i in old if i not in picked])):
                assert len(some) >= 32  # not vacuous
                want |= dict.fromkeys(some[: len(some) // 32 * 32], bits)
            for head in range(2):
                assert bits_of(layer, b, head) == {i + start: bits for i, bits in want.items()}


def test_a_second_prompt_gets_its_bits_by_its_own_choice() -> None:
    """What was decided before stays."""
    model, first, second = build("llama"), long_inputs((100,)), long_inputs((90,), seed=4)
    recording, calls = recorded(replace(SMALL, tau=0.7, kv="mixed", residual=0))
    with vlmaccel.patched(model, recording):
        cache = model(**first).past_key_values
        held = [layer.slots.index[0, 0].tolist() for layer in cache.layers]
        model(second["input_ids"], attention_mask=extend_mask(first["attention_mask"], 90), past_key_values=cache)
    for k, layer in enumerate(cache.layers):
        once, twice = (calls[k + turn].pattern.chosen[0].tolist() for turn in (0, DEPTH))
        picked = {i for i in range(100) if once[i]}
        picked |= {i for i, chosen in zip([*held[k], *range(100, 190)], twice, strict=True) if chosen and i >= 100}
        want = dict.fromkeys(range(190), 16)
        for bits, some in ((4, [i for i in range(4, 190) if i in picked]), (2, sorted(set(range(4, 190)) - picked))):
            want |= dict.fromkeys(some[: len(some) // 32 * 32], bits)
        assert bits_of(layer, 0, 0) == want


def test_mixed_bits_are_near_and_more_of_them_are_nearer() -> None:
    model, batch, later = build("llama"), long_inputs((150, 130)), answer_tokens(2)
    method = replace(SMALL, tau=0.7, residual=7)
    with vlmaccel.patched(model, replace(method, kv="full")):
        want = decode(model, batch, later)
    off = []
    for high, low in ((4, 2), (8, 2), (8, 4)):
        with vlmaccel.patched(model, replace(method, kv="mixed", high_bits=high, low_bits=low)):
            got = decode(model, batch, later)
            stats = vlmaccel.stats(model)
        real = batch["attention_mask"].bool()
        assert torch.equal(got[0][real], want[0][real])  # the prompt is computed before
        off.append(float((got[1] - want[1]).pow(2).mean().sqrt()))
        assert stats.kv_bytes < stats.kv_bytes_full
    assert off[0] > off[1] > off[2] > 0 and off[2] < 0.3 * float(want[1].std())


# ---- what it costs


def test_stats_count_pairs_bytes_and_flops() -> None:
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    recording, calls = recorded(EVICT)
    with vlmaccel.patched(model, recording):
        cache = model(**batch).past_key_values
        stats = vlmaccel.stats(model)
    shares = []
    for seen in calls:
        shares.append([])
        for b in range(3):
            count = int(seen.pattern.chosen[b].sum())
            n = int(seen.at.real[b].sum())
            shares[-1].append(count * (count + 1) / (n * (n + 1)))
    assert stats.attended == pytest.approx([sum(layer) / 3 for layer in shares])
    lengths = batch["attention_mask"].sum(1).tolist()
    flops = sum(decoder_flops([n] * DEPTH, 32, 64, True, [layer[b] for layer in shares]) for b, n in enumerate(lengths))
    assert stats.flops == pytest.approx(flops) and stats.flops < stats.flops_full
    assert "attention computed" in repr(stats)
    assert sum(layer.nbytes for layer in cache.layers) == stats.kv_bytes
    with vlmaccel.patched(model, FULL):
        model(**batch)
        full = vlmaccel.stats(model)
    assert stats.kv_bytes < 0.9 * full.kv_bytes and full.kv_bytes == full.kv_bytes_full
    assert full.attended == stats.attended


def test_bytes_fall_with_tau() -> None:
    model, batch, held = build("llama"), inputs("llama", 3), []
    for tau in (1.0, 0.95, 0.8, 0.5):
        with vlmaccel.patched(model, replace(EVICT, tau=tau)):
            model(**batch)
            held.append(vlmaccel.stats(model).kv_bytes)
    assert all(a > b for a, b in pairwise(held))


# ---- every way to generate


def continued(
    model: Any, batch: dict[str, Tensor], said: Tensor, question: Tensor, later: Tensor
) -> tuple[Tensor, Tensor, Any, list[Tensor]]:
    """Logits of a second prompt's rows and of the steps behind it, the cache, and what its slots were before."""
    out, mask = model(**batch), batch["attention_mask"]
    for t in range(said.shape[1]):
        mask = extend_mask(mask, 1)
        out = model(said[:, t : t + 1], attention_mask=mask, past_key_values=out.past_key_values)
    cache = out.past_key_values
    before = [
        layer.slots.index[:, 0] if hasattr(layer, "slots") else torch.arange(layer.keys.shape[2]).expand(len(mask), -1)
        for layer in cache.layers
    ]
    mask = extend_mask(mask, question.shape[1])
    prompt, steps = model(question, attention_mask=mask, past_key_values=cache).logits, []
    for t in range(later.shape[1]):
        mask = extend_mask(mask, 1)
        steps.append(model(later[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits[:, -1])
    return prompt, torch.stack(steps, 1), cache, before


def both_turns(
    calls: list[Seen], before: list[Tensor], mask: Tensor, said: int, question: int
) -> list[dict[int, Tensor]]:
    """What every token of two prompts and of the `said` ones between them saw, evictions apart."""
    first, n = attended_of(calls[:DEPTH], mask), mask.shape[1]
    found = []
    for b, start in enumerate(starts_of(mask)):
        found.append({})
        for k, seen in enumerate(calls[DEPTH : 2 * DEPTH]):
            whole = torch.ones(n + said + question, n + said + question, dtype=torch.bool)
            whole[start:n, start:n] = first[b][k]
            whole[n + said :] = False
            columns = torch.cat([before[k][b], torch.arange(n + said, n + said + question)])
            for i, row in enumerate(range(n + said, n + said + question)):
                whole[row, columns[seen.mask[b, 0, i]].long()] = True
            found[b][k] = whole[None, start:, start:]
    return found


@pytest.mark.parametrize(("kind", "method", "gap"), turns(["llama", VLM], (EVICT, FULL), (4, 0)))
def test_a_second_turn_and_a_prefill_in_two_chunks(kind: str, method: ZipVL, gap: int) -> None:
    """The second prompt's choice is over the earlier tokens too, and what it leaves out of them is evicted."""
    model, batch, later = build(kind), inputs(kind, 3, pad=True), answer_tokens(3)
    mask, said = batch["attention_mask"], answer_tokens(3).flip(1)[:, :gap]
    question = torch.randint(2, 110, (3, 9), generator=torch.Generator().manual_seed(8))
    recording, calls = recorded(method)
    with vlmaccel.patched(model, recording):
        once = kept_of(model(**batch).past_key_values, mask)
        calls.clear()
        prompt, steps, cache, before = continued(model, batch, said, question, later)
        shares = vlmaccel.stats(model).attended
    assert shares == pytest.approx([sum(share_of(seen)) / 3 for seen in calls[DEPTH:]], rel=1e-5)
    attended = both_turns(calls, before, mask, gap, 9)
    total = mask.shape[1] + gap + 9
    twice = kept_of(cache, mask, total)
    evicted = [{k: [once[b][k], twice[b][k]] for k in range(DEPTH)} for b in range(3)]
    if method.kv == "evict":
        assert all(
            int(twice[b][k][0, : once[b][k].shape[1]].sum()) < int(once[b][k][0].sum())
            for b in range(3)
            for k in (0, 2)
        )
    traces = reference_of(model, batch, torch.cat([said, question, later], 1), attended, evicted)
    for b, (start, trace) in enumerate(zip(starts_of(mask), traces, strict=True)):
        first = mask.shape[1] - start + gap
        assert (prompt[b] - trace.logits[first : first + 9]).abs().max() < 2e-5
        assert (steps[b] - trace.logits[first + 9 :]).abs().max() < 2e-5
    # and the choice is the formula's, over what was left
    reference = Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        tokens = torch.cat([embeds, reference.words(torch.cat([said[b], question[b]]))])
        trace = reference.run(tokens, evicted=evicted[b], attended=attended[b])
        start = starts_of(mask)[b]
        for k in (0, DEPTH - 1):
            seen = calls[DEPTH + k]
            held = {k: [once[b][k]]} if method.kv == "evict" else {}
            attention = reference.attention_by_head(trace, k, evicted=held).mean(0)
            columns = torch.cat([before[k][b], torch.arange(total - 9, total)]) - start
            rows = [int(columns[j]) for j in method._probe_rows(seen.at, seen.at.real)[b].tolist() if j >= 0]
            own = columns[seen.at.real[b]].long().tolist()
            mass = {j: sum(float(attention[i, j]) for i in rows) for j in own}
            order = sorted(own, key=lambda j: -mass[j] / max(1, sum(i >= j for i in rows)))
            wanted, share = set[int](), 0.0
            for j in order:
                if share >= method.tau * sum(mass.values()):
                    break
                wanted.add(j)
                share += mass[j]
            got = columns[seen.pattern.chosen[b]].long().tolist()
            assert set(got) == wanted | {total - 1 - start}


@pytest.mark.parametrize("method", [EVICT, FULL, replace(SMALL, kv="mixed", residual=0)])
def test_generate_in_chunks_is_a_loop_over_chunks(method: ZipVL) -> None:
    model, batch = build("llama"), long_inputs((120, 100))
    mask = batch["attention_mask"]
    with vlmaccel.patched(model, method):
        said = model.generate(**batch, **GREEDY, prefill_chunk_size=80)
        whole, cache, logits = extend_mask(mask, STEPS), None, []
        position = (whole.cumsum(1) - 1).clamp(
            min=0
        )  # `generate` counts without the padding; grids of keys depend on it
        for start, stop in ((0, 80), (80, 120), *((120 + t, 121 + t) for t in range(STEPS - 1))):
            some = slice(start, stop)
            out = model(
                said.sequences[:, some],
                attention_mask=whole[:, :stop],
                position_ids=position[:, some],
                past_key_values=cache,
            )
            cache = out.past_key_values
            logits.append(out.logits[:, -1])
    assert method.kv != "mixed" or all(layer.stores for layer in cache.layers)
    assert (torch.stack(said.logits, 1) - torch.stack(logits[1:], 1)).abs().max() < 2e-5


@pytest.mark.parametrize(("kind", "kv"), [("llama", "evict"), (VLM, "full"), ("qwen2-hybrid", "evict")])
def test_without_a_cache_every_step_is_a_prompt(kind: str, kv: Any) -> None:
    model, batch = build(kind), inputs(kind, 2, pad=True)
    mask = batch["attention_mask"]
    with vlmaccel.patched(model, replace(SMALL, kv=kv)):
        said = model.generate(**batch, **{**GREEDY, "max_new_tokens": 4}, use_cache=False)
        for t in (0, 3):
            whole = {
                **batch,
                "input_ids": said.sequences[:, : mask.shape[1] + t],
                "attention_mask": extend_mask(mask, t),
            }
            assert (model(**whole).logits[:, -1] - said.logits[t]).abs().max() < 2e-5


@pytest.mark.parametrize(("kind", "method"), turns(["llama", VLM], (EVICT, FULL)))
def test_beam_search(kind: str, method: ZipVL) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask = batch["attention_mask"]
    beams = dict(max_new_tokens=STEPS, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
    recording, calls = recorded(method)
    with vlmaccel.patched(model, recording):
        model(**batch)
        attended, kept = attended_of(calls, mask), chosen_of(calls, mask) if method.kv == "evict" else None
        said = model.generate(**batch, **beams)
    new = said.sequences[:, mask.shape[1] :]
    for b, trace in enumerate(reference_of(model, batch, new, attended, kept)):
        log_probability = trace.logits[-STEPS - 1 : -1].log_softmax(-1)
        score = log_probability.gather(1, new[b, :, None]).mean()
        assert abs(score - said.sequences_scores[b]) < 1e-5


def repeating(kind: str) -> dict[str, Tensor]:
    """A prompt whose end has been there before, so that prompt lookup has candidates from the first step on."""
    batch = inputs(kind)
    batch["input_ids"][:, -3:] = batch["input_ids"][:, -7:-4]
    return batch


@pytest.mark.parametrize(("kind", "kv"), [("llama", "evict"), (VLM, "evict"), ("qwen2-hybrid", "evict")])
def test_assisted_decoding_says_what_greedy_decoding_says(kind: str, kv: Any) -> None:
    """Candidates do not take part in the choice, and see what later tokens see."""
    model, batch = build(kind), repeating(kind)
    options, lengths = {**GREEDY, "max_new_tokens": 12}, []
    recording, calls = recorded(replace(SMALL, kv=kv))
    with vlmaccel.patched(model, recording):
        greedy = model.generate(**batch, **options)
        calls.clear()
        assisted = model.generate(**batch, **options, prompt_lookup_num_tokens=3)
        lengths = [seen.at.query.shape[2] for seen in calls]
    n = batch["input_ids"].shape[1]
    assert set(lengths) == {n + 3}  # candidates came with the prompt, and no others chose again
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert (torch.stack(assisted.logits) - torch.stack(greedy.logits)).abs().max() < 2e-5


@pytest.mark.parametrize("method", [EVICT, FULL, replace(SMALL, kv="mixed", residual=0)])
def test_candidates_over_a_cache_are_checked_and_taken_back(method: ZipVL) -> None:
    model, batch, later = build("llama"), long_inputs((90, 80, 110)), answer_tokens(3)
    mask = batch["attention_mask"]
    with vlmaccel.patched(model, method):
        _, steps = decode(model, batch, later)
        cache = model(**batch).past_key_values
        assert method.kv != "mixed" or cache.layers[0].stores
        wrong = torch.cat([later[:, :2], later.flip(1)[:, :2]], 1)
        checked = model(wrong, attention_mask=extend_mask(mask, 4), past_key_values=cache, logits_to_keep=4).logits
        assert (checked[:, :2] - steps[:, :2]).abs().max() < 2e-5
        cache.crop(-2)
        again = model(later[:, 2:3], attention_mask=extend_mask(mask, 3), past_key_values=cache).logits
        assert (again[:, -1] - steps[:, 2]).abs().max() < 2e-5


# ---- with other methods


@pytest.mark.parametrize(("kind", "positions"), turns([VLM, "llama"], ("renumber", "keep")))
def test_behind_tokens_that_were_dropped(kind: str, positions: Any) -> None:
    model, batch, later = build(kind), inputs(kind, 3, pad=True), answer_tokens(3)
    mask = batch["attention_mask"]
    drop = PyramidDrop(ratio=0.6, layers=(1, 4), positions=positions)
    recording, calls = recorded(EVICT)
    with vlmaccel.patched(model, [drop, recording]):
        stages = model(**batch) and vlmaccel.stats(model).stages
        calls.clear()
        prompt, steps = decode(model, batch, later)
    schedules = [
        {s.layer: (s.keep[b][s.size[b] > 0] - start).tolist() for s in stages}
        for b, start in enumerate(starts_of(mask))
    ]
    attended, kept = attended_of(calls, mask), chosen_of(calls, mask)
    traces = reference_of(model, batch, later, attended, kept, schedules, positions)
    assert_like_reference(traces, mask, prompt, steps)
    if kind == VLM:
        assert [stage.layer for stage in stages] == [1, 4]
        assert int(kept[0][5].sum()) < int(kept[0][3].sum()) < int(kept[0][0].sum())


def test_before_snapkv_and_few_bits() -> None:
    """SnapKV chooses among what ZipVL has left, and what both leave is quantised."""
    model, batch, later = build(VLM), inputs(VLM, 3, pad=True), answer_tokens(3)
    mask, snap = batch["attention_mask"], SnapKV(budget=0.3, window=4, sinks=1)
    recording, calls = recorded(EVICT)
    with vlmaccel.patched(model, [recording, snap]):
        cache = model(**batch).past_key_values
        attended, chosen, kept = attended_of(calls, mask), chosen_of(calls, mask), kept_of(cache, mask)
        prompt, steps = decode(model, batch, later)
        for b in range(3):
            single = decode(model, alone(batch, b), later[b : b + 1])[1]
            assert (single[0] - steps[b]).abs().max() < 2e-5
    for b in range(3):
        for k in range(DEPTH):
            assert not bool((kept[b][k] & ~chosen[b][k]).any()) and int(kept[b][k].sum()) < int(chosen[b][k].sum())
    assert_like_reference(reference_of(model, batch, later, attended, kept), mask, prompt, steps)
    off = []
    for bits in (8, 4):
        few = MixedPrecisionKV(low_bits=bits, keep=0.0, group=2, residual=2, sinks=0)
        with vlmaccel.patched(model, [EVICT, snap, few]):
            mixed = model(**batch).past_key_values
            off.append(float((decode(model, batch, later)[1] - steps).abs().max()))
        assert kept_of_mixed(mixed, mask) == kept_of_mixed(cache, mask)
    assert all(0 < error < 0.1 for error in off)


def kept_of_mixed(cache: Any, mask: Tensor) -> list[Any]:
    """Logical indices of every layer, sample and KV head."""
    found = []
    for layer in cache.layers:
        index, sizes = (x.expand(-1, 2, -1) for x in (layer.slots.index, layer.slots.sizes))
        starts = starts_of(mask)
        real = [[sorted(index[b, g][sizes[b, g] > 0].tolist()) for g in range(2)] for b in range(len(mask))]
        found.append([[[i for i in head if i >= starts[b]] for head in heads] for b, heads in enumerate(real)])
    return found


def test_behind_an_eviction_of_which_heads_keep_others() -> None:
    """Later prompts over heads that differ compute everything."""
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    snap, question = SnapKV(budget=0.5, window=4), answer_tokens(3)
    recording, calls = recorded(FULL)
    with vlmaccel.patched(model, [snap, recording]):
        out = model(**batch)
        assert len(calls) == DEPTH
        mask = extend_mask(batch["attention_mask"], question.shape[1])
        model(question, attention_mask=mask, past_key_values=out.past_key_values)
        assert len(calls) == DEPTH and vlmaccel.stats(model).attended == [1.0] * DEPTH


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, "tau.*0 to 1"),
        ({"tau": -0.1}, "tau.*0 to 1"),
        ({"tau": True}, "tau.*0 to 1"),
        ({"tau": float("nan")}, "tau.*0 to 1"),
        ({"tau": "0.9"}, "tau.*0 to 1"),
        ({"tau": -1, "rule": "threshold"}, "tau.*0 or more"),
        ({"rule": "sum"}, "rule.*mass.*threshold"),
        ({"recent": 1.5}, "recent.*share.*number"),
        ({"recent": -1}, "recent.*share.*number"),
        ({"random": True}, "random.*share.*number"),
        ({"random": "all"}, "random.*share.*number"),
        ({"kv": "drop"}, "kv.*evict.*mixed.*full"),
        ({"high_bits": 3}, "high_bits.*4.*8"),
        ({"low_bits": 4}, "low_bits are fewer"),
        ({"residual": -1}, "residual.*0 or more"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZipVL(**options)
    with pytest.raises(ValueError, match=message):
        vlmaccel.patch(build("llama"), "zipvl", **options)


def usable(model: Any, batch: dict[str, Tensor], right: Any) -> bool:
    return all(map(torch.equal, decode(model, batch, answer_tokens(3)), right))


def test_eager_attention_is_refused() -> None:
    model, batch = build("llama", "eager"), inputs("llama", 3)
    right = decode(model, batch, answer_tokens(3))
    with (
        vlmaccel.patched(model, "zipvl"),
        pytest.raises(NotImplementedError, match='ZipVL.*attn_implementation="sdpa".*"eager"'),
    ):
        model(**batch)
    assert usable(model, batch, right)


def test_a_mask_of_pairs_is_refused_and_the_next_call_works() -> None:
    model, batch = build("llama"), inputs("llama", 3)
    plain = decode(model, batch, answer_tokens(3))
    n = batch["input_ids"].shape[1]
    pairs = torch.ones(3, 1, n, n, dtype=torch.bool).tril()
    with vlmaccel.patched(model, SMALL):
        right = decode(model, batch, answer_tokens(3))
        with pytest.raises(NotImplementedError, match="ZipVL.*mask.*padding"):
            model(input_ids=batch["input_ids"], attention_mask=pairs)
        assert usable(model, batch, right)
    assert usable(model, batch, plain)


def test_merged_tokens_that_weigh_more_are_refused() -> None:
    model, batch = build(VLM), inputs(VLM, 3)
    plain = decode(model, batch, answer_tokens(3))
    with (
        vlmaccel.patched(model, [ToMeDecoder(), SMALL]),
        pytest.raises(NotImplementedError, match="ZipVL.*merged.*prop_attn=False"),
    ):
        model(**batch)
    with vlmaccel.patched(model, [ToMeDecoder(prop_attn=False), SMALL]):
        got = decode(model, batch, answer_tokens(3))
        assert got[1].isfinite().all() and min(vlmaccel.stats(model).attended) < 1
    assert usable(model, batch, plain)


def test_only_one_method_can_have_the_attention() -> None:
    model, batch = build("llama"), inputs("llama", 3)
    plain = decode(model, batch, answer_tokens(3))
    with pytest.raises(ValueError, match="only one method.*BlockSparse.*ZipVL"):
        vlmaccel.patch(model, [ZipVL(), BlockSparse()])
    vlmaccel.patch(model, SMALL)
    right = decode(model, batch, answer_tokens(3))
    with pytest.raises(ValueError, match="only one method"):
        vlmaccel.patch(model, "block-sparse")
    assert usable(model, batch, right)
    vlmaccel.unpatch(model)
    assert usable(model, batch, plain)


def test_weights_that_are_no_numbers_raise_and_leave_the_model_usable() -> None:
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    with vlmaccel.patched(model, SMALL):
        right = decode(model, batch, answer_tokens(3))
        weight = model.model.layers[2].self_attn.k_proj.weight
        whole = weight.clone()
        weight[3] = torch.nan
        with pytest.raises(ValueError, match="zipvl.*decoder layer 2 are NaN.*bfloat16"):
            model(**batch)
        weight.copy_(whole)
        assert usable(model, batch, right)


def test_training_through_it_says_how_to_train() -> None:
    model, batch = build("llama"), inputs("llama", 3)
    with torch.enable_grad():
        with vlmaccel.patched(model, SMALL):
            loss = model(**batch, labels=batch["input_ids"]).loss
            assert loss.isfinite()
            with pytest.raises(RuntimeError, match="no gradient.*unpatch"):
                loss.backward()
            for parameter in model.parameters():
                assert parameter.grad is None or parameter.grad.isfinite().all()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        wanted = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
        model.zero_grad()
        with vlmaccel.patched(model, ZipVL(tau=1, kv="full")):  # which computes all of it
            model(**batch, labels=batch["input_ids"]).loss.backward()
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight.grad, wanted)
