"""Methods that evict cache entries: what they keep is the right thing, and the rest is gone as if by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vlmaccel
from tests.support.drops import GREEDY, answer_tokens, assert_like_reference, decode, turns
from tests.support.evictions import (
    METHODS,
    SCORED,
    UNIFORM,
    alone,
    held_by,
    kept_of,
    reference_of,
    starts_of,
)
from tests.support.models import DEPTH, IMAGE, KINDS, PAD, SLIDING, build, inputs
from tests.support.reference import Reference
from vlmaccel.cache import kv_bytes_by_layer
from vlmaccel.hooks import CacheEntries
from vlmaccel.methods import H2O, AdaKV, PyramidKV, SnapKV, StreamingLLM, VLCache
from vlmaccel.methods.budget import divide
from vlmaccel.methods.eviction import Eviction, pooled

SHAPES = {"one": (1, False), "three": (3, False), "three-padded": (3, True)}
# the decoder of one is another's, with experts in the other
WAYS = [way for way in product(KINDS, SHAPES) if way not in (("qwen2.5-vl", "three"), ("qwen3-vl-moe", "three"))]
VLM = "llava-clip-llama"
FEW = ("qwen2-hybrid", VLM)  # the rest is marked slow
HEADS, KV_HEADS = 4, 2
every_method = pytest.mark.parametrize("name", METHODS)
kinds = pytest.mark.parametrize("kind", ["llama", "qwen3", VLM, "llava-clip-qwen2", "qwen3-vl"])


@torch.no_grad()
def prefill(model: Any, batch: dict[str, Tensor], method: Any) -> Any:
    """The cache that a patched model's prefill leaves."""
    with vlmaccel.patched(model, method):
        return model(**batch, use_cache=True).past_key_values


# ---- what is evicted is as if it had been hidden by hand


def decoding_ways() -> list[Any]:
    """Every way to run every method: attention and method take turns, and two kinds whose decode steps attend straight
    from the cache layer (no sliding window, sdpa) meet all methods; the rest is marked slow."""
    found = turns(WAYS, ("sdpa", "eager"), tuple(METHODS))
    for i, x in enumerate(found):
        kind, shape, attn, _ = x.values
        if kind in ("llama", "llava-clip-qwen2") and shape == "three-padded" and attn == "sdpa":
            found[i] = pytest.param(*x.values)
    return found


@pytest.mark.parametrize(("kind", "shape", "attn", "name"), decoding_ways())
@torch.no_grad()
def test_decoding_equals_the_reference(kind: str, attn: str, shape: str, name: str) -> None:
    model, batch = build(kind, attn), inputs(kind, *SHAPES[shape])
    mask = batch["attention_mask"]
    later = answer_tokens(len(mask))
    full_prompt, full_steps = decode(model, batch, later)
    kept = kept_of(prefill(model, batch, METHODS[name]), mask)
    with vlmaccel.patched(model, METHODS[name]):
        prompt, steps = decode(model, batch, later)
        said = model.generate(**batch, **GREEDY)
    real = mask.bool()
    assert torch.equal(prompt[real], full_prompt[real])  # the prompt's own attention is exact
    assert_like_reference(reference_of(model, batch, later, kept), mask, None, steps)
    assert (steps - full_steps).abs().amax((1, 2)).min() > 0.05  # every sample lost something that mattered
    new = said.sequences[:, mask.shape[1] :]
    traces = reference_of(model, batch, new[:, :-1], kept)
    assert_like_reference(traces, mask, None, torch.stack(said.logits, 1)[:, 1:])


def test_the_settings_of_these_tests_differ_in_layers_and_heads() -> None:
    """So that the comparison above has met unequal budgets of both kinds."""
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    for name, method in METHODS.items():
        counts = torch.stack(
            [
                torch.stack([kept.sum(1) for kept in sample.values()])
                for sample in kept_of(prefill(model, batch, method), batch["attention_mask"])
            ]
        )
        layers = any(sample.sum(1).unique().numel() > 1 for sample in counts)
        heads = bool((counts[..., 0] != counts[..., 1]).any())
        assert (layers, heads) == (isinstance(method, (PyramidKV, VLCache)), isinstance(method, AdaKV)), name


@pytest.mark.parametrize("name", ["streaming-llm", "h2o"])
@pytest.mark.parametrize("kind", ["llama", VLM])
@pytest.mark.parametrize("every", [1, 3])
@torch.no_grad()
def test_eviction_while_decoding_equals_the_reference(kind: str, name: str, every: int) -> None:
    """Every token is written down with what was left when it came."""
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask, later = batch["attention_mask"], answer_tokens(3)
    method = replace(METHODS[name], every=every, budget=8)
    length, steps = mask.shape[1], []
    history: list[dict[int, list[Tensor]]] = [{k: [] for k in range(DEPTH)} for _ in mask]

    def note(cache: Any) -> None:
        for b, sample in enumerate(kept_of(cache, mask, cache.get_seq_length())):
            for k, kept in sample.items():
                history[b][k].append(kept)

    with vlmaccel.patched(model, method):
        out = model(**batch)
        for t in range(later.shape[1]):
            note(out.past_key_values)
            seen = torch.cat([mask, mask.new_ones(3, t + 1)], 1)
            out = model(later[:, t : t + 1], attention_mask=seen, past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
            counts = [len(head) for layer in out.past_key_values.layers for one in held_by(layer) for head in one]
            assert max(counts) <= 8 + every - 1
            assert every > 1 or min(counts) == 8
    assert_like_reference(reference_of(model, batch, later, history), mask, None, torch.stack(steps, 1))
    assert length + 8 == out.past_key_values.get_seq_length()


SAME = [(kind, name) for kind in KINDS for name in METHODS]


@pytest.mark.parametrize(
    ("kind", "name", "attn", "shape"),
    [
        pytest.param(*x.values, marks=(*x.marks, *(() if few else (pytest.mark.slow,))))
        for x in turns(SAME, ("sdpa", "eager"), SHAPES)
        for few in [x.values[0] in FEW or x.values[:2] in (("qwen2-vl", "h2o"), ("qwen3-vl", "adakv"))]
    ],
)
@torch.no_grad()
def test_a_budget_for_everything_is_bit_identical(kind: str, name: str, attn: str, shape: str) -> None:
    model, batch = build(kind, attn), inputs(kind, *SHAPES[shape])
    later, real = answer_tokens(len(batch["input_ids"])), batch["attention_mask"].bool()
    prompt, steps = decode(model, batch, later)
    said = model.generate(**batch, **GREEDY)
    for budget in (1.0, 4096):
        with vlmaccel.patched(model, replace(METHODS[name], budget=budget)):
            patched_prompt, patched_steps = decode(model, batch, later)
            patched_said = model.generate(**batch, **GREEDY)
        assert torch.equal(patched_prompt[real], prompt[real])
        assert torch.equal(patched_steps, steps)
        assert torch.equal(patched_said.sequences, said.sequences)
        assert all(map(torch.equal, patched_said.logits, said.logits))


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), ("llama", "qwen3", VLM, "qwen2-vl")))
@torch.no_grad()
def test_a_padded_batch_is_its_samples(kind: str, name: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    mask, later = batch["attention_mask"], answer_tokens(3)
    kept = kept_of(prefill(model, batch, METHODS[name]), mask)
    with vlmaccel.patched(model, METHODS[name]):
        _, steps = decode(model, batch, later)
        for b in range(3):
            one = alone(batch, b)
            (own,) = kept_of(model(**one, use_cache=True).past_key_values, one["attention_mask"])
            assert all(torch.equal(own[k], kept[b][k]) for k in range(DEPTH)), f"sample {b}"
            _, single = decode(model, one, later[b : b + 1])
            assert (single[0] - steps[b]).abs().max() < 2e-5


# ---- which entries stay: every method's choice worked out by hand


def shares(weight: list[float], total: int, low: list[int], high: list[int]) -> list[int]:
    """`divide` for one sample, the slow way: try every set of shares that sit at a bound, then largest remainders."""
    total = min(max(total, sum(low)), sum(high))
    fixed: dict[int, float] = {}
    while True:
        free = [i for i in range(len(weight)) if i not in fixed]
        level = (total - sum(fixed.values())) / max(sum(weight[i] for i in free), 1e-30)
        over = {i: high[i] for i in free if weight[i] * level > high[i]}
        under = {i: low[i] for i in free if weight[i] * level < low[i]}
        more = sum(weight[i] * level - at for i, at in over.items())
        less = sum(at - weight[i] * level for i, at in under.items())
        if not over and not under:
            break
        fixed |= over if more >= less else under
    exact = [fixed.get(i, weight[i] * level) for i in range(len(weight))]
    whole = [math.floor(x + 1e-6) for x in exact]
    rank = sorted((i for i in range(len(weight)) if whole[i] < high[i]), key=lambda i: (whole[i] - exact[i], i))
    for i in rank[: total - sum(whole)]:
        whole[i] += 1
    return whole


def choose(score: Tensor, count: int, first: int, last: int) -> list[int]:
    """The protected first and last, then the best of the rest, in ascending order."""
    n = len(score)
    last = min(last, n - first)
    always = [*range(first), *range(n - last, n)]
    rest = sorted((i for i in range(n) if i not in always), key=lambda i: (-score[i].item(), i))
    return sorted(always + rest[: count - len(always)])


def smooth(score: Tensor, width: int, how: str) -> Tensor:
    near = [score[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(score))]
    return torch.stack([x.mean() if how == "mean" else x.max() for x in near])


def by_group(attention: Tensor, how: str = "mean") -> list[Tensor]:
    """(H, ...) of the query heads as a list of those of KV heads."""
    groups = [attention[g * HEADS // KV_HEADS : (g + 1) * HEADS // KV_HEADS] for g in range(KV_HEADS)]
    return [x.mean(0) if how == "mean" else x.amax(0) for x in groups]


def window_score(attention: Tensor, method: Any, rows: list[int] | None = None) -> list[Tensor]:
    """The observed rows' attention by KV head, smoothed: (n,) each. attention: (H, n, n)."""
    n = attention.shape[-1]
    rows = list(range(n - method.window, n)) if rows is None else rows
    seen = torch.tensor([max(1, sum(row >= j for row in rows)) for j in range(n)])
    mean = attention[:, rows].sum(1) / seen
    return [smooth(score, method.pool, method.pooling) for score in by_group(mean, method.group)]


def question(batch: dict[str, Tensor], b: int, window: int) -> list[int]:
    """Rows of the text behind the last picture, at least 16, the last `window` where there is none; without padding."""
    ids = batch["input_ids"][b, batch["attention_mask"][b].bool()].tolist()
    n = len(ids)
    pictures = [i for i, token in enumerate(ids) if token == IMAGE]
    if not pictures or pictures[-1] == n - 1:
        return list(range(max(0, n - window), n))
    return list(range(max(0, min(pictures[-1] + 1, n - 16)), n))


def attention_of(model: Any, batch: dict[str, Tensor]) -> list[list[Tensor]]:
    """Of every sample, the attention (H, n, n) of every layer over the whole prompt."""
    reference = Reference(model)
    traces = [reference.run(embeds) for embeds in reference.embed(batch)]
    return [[reference.attention_by_head(trace, k) for k in range(DEPTH)] for trace in traces]


def assert_kept(model: Any, batch: dict[str, Tensor], method: Any, wanted: Any) -> None:
    """wanted(b, attention of every layer): [layer][KV head] ascending indices without padding."""
    mask = batch["attention_mask"]
    layers = prefill(model, batch, method).layers
    for b, attention in enumerate(attention_of(model, batch)):
        want, start = wanted(b, attention), starts_of(mask)[b]
        for k, layer in enumerate(layers):
            mine = [[i - start for i in head if i >= start] for head in held_by(layer)[b]]
            assert mine == want[k], f"sample {b}, layer {k}"


@kinds
@pytest.mark.parametrize(
    "options", [{}, dict(pooling="max", group="max", sinks=2, recent=5, budget=0.5), dict(pool=1, budget=8)]
)
def test_snapkv_keeps_what_the_window_looks_at(kind: str, options: dict[str, Any]) -> None:
    method = replace(METHODS["snapkv"], **options)

    def wanted(b: int, attention: list[Tensor]) -> list[list[list[int]]]:
        n = attention[0].shape[-1]
        count = method.budget if isinstance(method.budget, int) else int(n * method.budget)
        last = max(method.recent, method.window)
        return [[choose(s, count, method.sinks, last) for s in window_score(a, method)] for a in attention]

    assert_kept(build(kind), inputs(kind, 3, pad=True), method, wanted)


@pytest.mark.parametrize("kind", [VLM, "llama"])
def test_snapkv_can_observe_the_text_behind_the_picture(kind: str) -> None:
    method, batch = SnapKV(budget=0.5, window=2, rows="post-vision"), inputs(kind, 3, pad=True)

    def wanted(b: int, attention: list[Tensor]) -> list[list[list[int]]]:
        rows, count = question(batch, b, method.window), attention[0].shape[-1] // 2
        return [[choose(s, count, 0, 2) for s in window_score(a, method, rows)] for a in attention]

    assert_kept(build(kind), batch, method, wanted)


@kinds
@pytest.mark.parametrize(("budget", "beta"), [(0.4, 4), (0.4, 20), (0.8, 20), (3, 2)])
def test_pyramidkv_budgets_fall_in_equal_steps(kind: str, budget: float, beta: float) -> None:
    """0.8 of the prompt: the first layers would get more than there is, which the others then share."""
    method = replace(METHODS["pyramidkv"], budget=budget, beta=beta)

    def wanted(b: int, attention: list[Tensor]) -> list[list[list[int]]]:
        n = attention[0].shape[-1]
        mean = budget if isinstance(budget, int) else int(n * budget)
        window = min(method.window, mean)
        exact = [(mean - window) * ((2 - 1 / beta) - k / (DEPTH - 1) * (2 - 2 / beta)) for k in range(DEPTH)]
        while max(exact) > n - window:  # what a layer cannot take goes to those that can, in proportion
            full = [x >= n - window for x in exact]
            left = (mean - window) * DEPTH - (n - window) * sum(full)
            open_ = sum(x for x, at in zip(exact, full, strict=True) if not at)
            exact = [n - window if at else x * left / open_ for x, at in zip(exact, full, strict=True)]
        beside = [held[b][k] - window for k in range(DEPTH)]
        assert all(abs(count - x) < 1 for count, x in zip(beside, exact, strict=True))
        assert sum(beside) == (mean - window) * DEPTH and beside == sorted(beside, reverse=True)
        return [
            [choose(s, window + count, 0, window) for s in window_score(a, method)]
            for a, count in zip(attention, beside, strict=True)
        ]

    model, batch = build(kind), inputs(kind, 3, pad=True)
    kept = kept_of(prefill(model, batch, method), batch["attention_mask"])
    held = [[int(layer[0].sum()) for layer in sample.values()] for sample in kept]
    assert_kept(model, batch, method, wanted)


@kinds
@pytest.mark.parametrize("options", [{}, dict(pool=7), dict(floor=0.0), dict(floor=1.0), dict(budget=5, sinks=1)])
def test_adakv_divides_by_the_best_of_all_heads(kind: str, options: dict[str, Any]) -> None:
    method = replace(METHODS["adakv"], **options)

    def wanted(b: int, attention: list[Tensor]) -> list[list[list[int]]]:
        n = attention[0].shape[-1]
        mean = method.budget if isinstance(method.budget, int) else int(n * method.budget)
        spare = mean - method.sinks - method.window
        free = range(method.sinks, n - method.window)
        layers = []
        for a in attention:
            score = window_score(a, method)
            everything = sorted((-score[g][i].item(), g, i) for g in range(KV_HEADS) for i in free)
            among = [sum(g == h for _, g, _ in everything[: spare * KV_HEADS]) for h in range(KV_HEADS)]
            weight = [(1 - method.floor) * count + method.floor * spare for count in among]
            low = [int(method.floor * spare + 1e-9)] * KV_HEADS
            counts = shares(weight, spare * KV_HEADS, low, [len(free)] * KV_HEADS)
            layers.append(
                [
                    choose(s, method.sinks + method.window + c, method.sinks, method.window)
                    for s, c in zip(score, counts, strict=True)
                ]
            )
        return layers

    assert_kept(build(kind), inputs(kind, 3, pad=True), method, wanted)


@kinds
@pytest.mark.parametrize(
    "options",
    [{}, dict(threshold=0.01), dict(granularity="layer", recent=3, sinks=1), dict(budget=0.9), dict(budget=3)],
)
def test_vl_cache_budgets_follow_the_density_of_the_question_s_attention(kind: str, options: dict[str, Any]) -> None:
    method, batch = replace(METHODS["vl-cache"], **options), inputs(kind, 3, pad=True)

    def wanted(b: int, attention: list[Tensor]) -> list[list[list[int]]]:
        rows, n = question(batch, b, method.window), attention[0].shape[-1]
        visible = sum(row + 1 for row in rows) * HEADS
        density = []
        for a in attention:
            large = sum(
                int((a[h, row, : row + 1] >= method.threshold * a[h, row].max()).sum())
                for h in range(HEADS)
                for row in rows
            )
            density.append(large / visible)  # 1 - sparsity
        mean = method.budget if isinstance(method.budget, int) else int(n * method.budget + 1e-9)
        budgets = shares(density, mean * DEPTH, [1] * DEPTH, [n] * DEPTH)
        assert sum(budgets) == mean * DEPTH
        layers = []
        for a, count in zip(attention, budgets, strict=True):
            score = by_group(a[:, rows].sum(1))
            if method.granularity == "layer":
                score = [torch.stack(score).mean(0)] * KV_HEADS
            newest = max(method.recent, math.ceil(count / 10))
            layers.append([choose(s, count, method.sinks, newest) for s in score])
        return layers

    assert_kept(build(kind), batch, method, wanted)


@kinds
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("budget", [0.5, 7])
def test_h2o_keeps_the_largest_sums_of_columns_and_the_newest(kind: str, reduce: str, budget: float) -> None:
    method = replace(METHODS["h2o"], reduce=reduce, budget=budget)

    def wanted(b: int, attention: list[Tensor]) -> list[list[list[int]]]:
        n = attention[0].shape[-1]
        count = budget if isinstance(budget, int) else int(n * budget)
        seen = torch.arange(n, 0, -1) if reduce == "mean" else 1
        return [[choose(s / seen, count, 0, (count + 1) // 2) for s in by_group(a.sum(1))] for a in attention]

    assert_kept(build(kind), inputs(kind, 3, pad=True), method, wanted)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("budget", [8, 0.4])
@torch.no_grad()
def test_h2o_adds_up_what_generated_tokens_look_at(reduce: str, budget: float) -> None:
    """Step by step: the sums of the reference's columns over what was left at each row give what is left next."""
    model, batch, method = build("qwen2"), inputs("qwen2"), H2O(budget=budget, every=1, reduce=reduce)
    later, reference = answer_tokens(1), Reference(model)
    embeds = torch.cat([reference.embed(batch)[0], reference.words(later[0])])
    n = batch["input_ids"].shape[1]
    history: dict[int, list[Tensor]] = {k: [] for k in range(DEPTH)}
    with vlmaccel.patched(model, method):
        cache = model(**batch).past_key_values
        for t in range(n, n + later.shape[1] + 1):
            trace = reference.run(embeds[:t], evicted=history)
            count = budget if isinstance(budget, int) else int(t * budget)
            for k, layer in enumerate(cache.layers):
                attention = by_group(reference.attention_by_head(trace, k, evicted=history).sum(1))
                alive = history[k][-1] if history[k] else torch.ones(KV_HEADS, n, dtype=torch.bool)
                kept = torch.zeros(KV_HEADS, t, dtype=torch.bool)
                for g in range(KV_HEADS):
                    left = [i for i in range(t) if i >= alive.shape[1] or alive[g, i]]
                    rows = [sum(r >= i for r in range(t)) if reduce == "mean" else 1 for i in left]
                    chosen = choose(attention[g][left] / torch.tensor(rows), count, 0, (count + 1) // 2)
                    kept[g, [left[i] for i in chosen]] = True
                    assert held_by(layer)[0][g] == kept[g].nonzero().flatten().tolist(), f"{t} tokens, layer {k}"
                history[k].append(kept)
            if t < n + later.shape[1]:
                cache = model(later[:, t - n : t - n + 1], past_key_values=cache).past_key_values


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_scores_in_a_sliding_window_are_the_layer_s_own_attention(name: str) -> None:
    """Rows before the last one saw entries that have left the window since."""
    model, batch, seen = build("mistral-sliding"), inputs("mistral-sliding"), {}
    kind = type(METHODS[name])

    @dataclass(frozen=True)
    class Noted(kind):  # type: ignore[misc, valid-type]
        name: ClassVar[str] = "noted"

        def score(self, at: CacheEntries) -> Tensor:
            score = super().score(at)
            seen[at.layer] = at.slots.index[0, 0].tolist(), score[0]
            return score

    prefill(model, batch, Noted(budget=5, **(dict(window=4, pool=1) if name == "snapkv" else {})))
    for k, attention in enumerate(attention_of(model, batch)[0]):
        index, score = seen[k]
        method = SnapKV(window=4, pool=1)
        want = by_group(attention.sum(1)) if name == "h2o" else window_score(attention, method)
        for g in range(KV_HEADS):
            assert (score[g] - want[g][index]).abs().max() < 1e-5


@kinds
@pytest.mark.parametrize(("budget", "sinks"), [(0.5, 4), (6, 0), (6, 5)])
def test_streaming_llm_keeps_the_first_and_the_newest(kind: str, budget: float, sinks: int) -> None:
    method = StreamingLLM(budget=budget, sinks=sinks)

    def wanted(b: int, attention: list[Tensor]) -> list[list[list[int]]]:
        n = attention[0].shape[-1]
        count = budget if isinstance(budget, int) else int(n * budget)
        return [[[*range(sinks), *range(n - count + sinks, n)]] * KV_HEADS] * DEPTH

    assert_kept(build(kind), inputs(kind, 3, pad=True), method, wanted)


# ---- what holds for every choice


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("kind", ["llama", VLM, "mistral-sliding"])
@every_method
def test_survivors_are_ascending_real_and_within_the_budget(kind: str, name: str, pad: bool) -> None:
    """Sinks and window are among them; in a padded batch nobody loses more because of the padding."""
    model, batch, method = build(kind), inputs(kind, 3, pad), METHODS[name]
    mask = batch["attention_mask"]
    layers = prefill(model, batch, method).layers
    for b, start in enumerate(starts_of(mask)):
        length, totals = mask.shape[1] - start, []
        most = length if kind not in SLIDING else min(length, 9)
        budget = method.budget if isinstance(method.budget, int) else int(most * method.budget)
        for layer in layers:
            held = held_by(layer)[b]
            totals.append(sum(map(len, held)))
            for head in held:
                assert head == sorted(set(head)) and head[0] >= start and head[-1] == mask.shape[1] - 1
                if method.sinks and kind not in SLIDING:
                    assert set(range(start, start + min(method.sinks, len(head) - 1))) <= set(head)
                window = getattr(method, "window", 0) if not isinstance(method, VLCache) else math.ceil(len(head) / 10)
                last = max(window, method.recent)
                assert last > len(head) or head[len(head) - last :] == list(range(mask.shape[1] - last, mask.shape[1]))
        if kind not in SLIDING or not isinstance(method, PyramidKV):
            assert sum(totals) == budget * KV_HEADS * DEPTH
        if name in UNIFORM or isinstance(method, AdaKV):
            assert totals == [budget * KV_HEADS] * DEPTH


@torch.no_grad()
def test_padding_goes_before_any_real_token() -> None:
    """A budget of 20 for 30, 19 and 15 tokens of 30: the short ones lose their padding at most."""
    batch = inputs("llama", 3, pad=True)
    mask = batch["attention_mask"]
    assert mask.sum(1).tolist() == [30, 19, 15]
    for name in UNIFORM:
        cache = prefill(build("llama"), batch, replace(METHODS[name], budget=20))
        for layer in cache.layers:
            assert layer.keys.shape[2] == 20
            for b, start in enumerate(starts_of(mask)):
                assert all([i for i in head if i >= start] == list(range(start, 30)) for head in held_by(layer)[b]) == (
                    b > 0
                )


@dataclass(frozen=True)
class Constant(Eviction):
    """All entries are worth the same."""

    name: ClassVar[str] = "constant"

    def score(self, at: CacheEntries) -> Tensor:
        return torch.zeros_like(at.slots.index, dtype=torch.float)


def test_ties_go_to_the_lower_position() -> None:
    batch = inputs("llama", 3, pad=True)
    cache = prefill(build("llama"), batch, Constant(budget=8, sinks=2, recent=3))
    for b, start in enumerate(starts_of(batch["attention_mask"])):
        assert held_by(cache.layers[0])[b][0] == [*range(start, start + 5), 27, 28, 29]


@torch.no_grad()
def test_ties_between_heads_and_neighbours_go_to_the_lower_position() -> None:
    """Queries of zero look at everything evenly, so that every score of a window is a tie."""
    model, batch = build("llama"), inputs("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    for name in ("snapkv", "pyramidkv", "adakv"):
        for layer in prefill(model, batch, replace(METHODS[name], pool=1)).layers:
            for head in held_by(layer)[0]:
                window = METHODS[name].window
                rest = len(head) - window
                assert head == [*range(rest), *range(30 - window, 30)], name
    for layer in prefill(model, batch, VLCache(budget=10)).layers:
        assert held_by(layer)[0] == [[*range(9), 29]] * KV_HEADS  # evenly is dense everywhere: equal budgets


def test_pooling_ignores_padding_and_ends_and_follows_the_sequence() -> None:
    score = torch.tensor([[[9.0, 2, 4, 9, 6, 1]]])
    real = torch.tensor([[[False, True, True, False, True, True]]])
    index = torch.arange(6)[None, None]
    mean = pooled(score, real, index, 3)[0, 0].tolist()
    assert mean == pytest.approx([0, 3, 4, 0, 11 / 3, 3.5])
    assert pooled(score, real, index, 3, "max").tolist() == [[[0, 4, 6, 0, 6, 6]]]
    assert pooled(score, real, index, 1) is score
    turned = torch.tensor([5, 2, 0, 1, 4, 3])  # entries of several precisions lie one behind the other
    for how in ("mean", "max"):
        straight, mixed = (
            pooled(x, r, i, 3, how)
            for x, r, i in ((score, real, index), (score[..., turned], real[..., turned], index[..., turned]))
        )
        assert torch.equal(mixed, straight[..., turned])


# ---- budgets


@st.composite
def divisions(draw: st.DrawFn) -> tuple[list[float], int, list[int], list[int]]:
    n = draw(st.integers(1, 6))
    weight = draw(st.lists(st.floats(0, 1000) | st.integers(0, 3), min_size=n, max_size=n))
    low = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    high = [a + draw(st.integers(0, 40)) for a in low]
    return weight, draw(st.integers(0, 120)), low, high


def divided(weight: list[float], total: int, low: list[int], high: list[int]) -> list[int]:
    return divide(
        torch.tensor([weight], dtype=torch.double), torch.tensor([total]), torch.tensor([low]), torch.tensor([high])
    )[0].tolist()


@given(divisions())
def test_shares_sum_exactly_and_stay_within_their_bounds(case: Any) -> None:
    _, total, low, high = case
    got = divided(*case)
    assert sum(got) == min(max(total, sum(low)), sum(high))
    assert all(a <= x <= b for a, x, b in zip(low, got, high, strict=True))


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 5), st.integers(5, 40)
)
def test_more_weight_is_no_smaller_share(weight: list[float], total: int, low: int, high: int) -> None:
    n = len(weight)
    got = divided(weight, total, [low] * n, [high] * n)
    order = sorted(range(n), key=lambda i: weight[i])
    assert all(got[i] <= got[j] + math.isclose(weight[i], weight[j]) for i, j in pairwise(order))


@given(st.integers(1, 8), st.floats(0.001, 1000), st.integers(0, 300), st.integers(0, 60))
def test_equal_weights_are_equal_shares_and_the_rest_goes_to_the_first(
    n: int, weight: float, total: int, high: int
) -> None:
    got = divided([weight] * n, total, [0] * n, [high] * n)
    assert max(got) - min(got) <= 1 and got == sorted(got, reverse=True)


@given(divisions())
def test_shares_are_within_one_of_the_level_of_the_water(case: Any) -> None:
    weight, total, low, high = case
    weight = [max(w, 0.01) for w in weight]
    got = divided(weight, total, low, high)
    want = shares(weight, total, low, high)
    assert all(abs(a - b) <= 1 for a, b in zip(got, want, strict=True))


def test_what_a_share_cannot_take_the_others_do_in_proportion() -> None:
    assert divided([8, 2, 1], 30, [0] * 3, [10, 99, 99]) == [10, 13, 7]
    assert divided([8, 1, 1], 30, [0, 9, 0], [99] * 3) == [19, 9, 2]
    assert divided([0, 0, 0], 7, [0] * 3, [9] * 3) == [3, 2, 2]
    assert divided([0, 1, 0], 7, [1, 0, 0], [9, 3, 9]) == [2, 3, 2]


def test_equal_fractions_go_to_the_lowest_index() -> None:
    assert divided([1.75, 1.45, 1.15, 0.85, 0.55, 0.25], 60, [0] * 6, [28] * 6) == [18, 15, 12, 8, 5, 2]


@every_method
def test_a_budget_of_one_token(name: str) -> None:
    cache = prefill(build("llama"), inputs("llama"), replace(METHODS[name], budget=1))
    assert sum(len(head) for layer in cache.layers for head in held_by(layer)[0]) == KV_HEADS * DEPTH


@pytest.mark.parametrize("kind", SLIDING)
def test_pyramidkv_with_room_for_everything_in_a_sliding_window(kind: str) -> None:
    model, batch = build(kind), inputs(kind)
    full = [layer.keys.shape[2] for layer in model(**batch, use_cache=True).past_key_values.layers]
    cache = prefill(model, batch, replace(METHODS["pyramidkv"], budget=4096))
    assert [layer.keys.shape[2] for layer in cache.layers] == full


@pytest.mark.parametrize("budget", [0.3, 8])
@pytest.mark.parametrize("name", ["pyramidkv", "vl-cache", "vl-cache-layer", "adakv"])
def test_layers_share_exactly_the_whole_budget(name: str, budget: float) -> None:
    for kind in ("llama", VLM):
        model, batch = build(kind), inputs(kind, 3, pad=True)
        mask = batch["attention_mask"]
        for sample, n in zip(
            kept_of(prefill(model, batch, replace(METHODS[name], budget=budget)), mask), mask.sum(1), strict=True
        ):
            mean = budget if isinstance(budget, int) else int(n * budget)
            counts = torch.stack([kept.sum(1) for kept in sample.values()])
            assert int(counts.sum()) == mean * DEPTH * KV_HEADS
            assert counts.min() >= 1 and counts.max() <= n


@pytest.mark.parametrize("name", UNIFORM)
@pytest.mark.parametrize("kibibytes", [4, 8, 16])
def test_a_budget_in_bytes_is_kept_to(name: str, kibibytes: int) -> None:
    """The whole cache of a sample, positions included, is within it, and no further from it than one entry a layer."""
    model, batch = build("llama"), inputs("llama")
    method = replace(METHODS[name], budget=f"{kibibytes}KiB", sinks=1)
    cache = prefill(model, batch, method)
    held = sum(kv_bytes_by_layer(cache)[0]) - sum(x.nbytes for layer in cache.layers for x in layer.notes.values())
    entry = KV_HEADS * (2 * 8 * 4 + 4)
    assert kibibytes * 1024 - entry * DEPTH < held + 4 * DEPTH * 30 and held <= kibibytes * 1024
    assert {len(head) for layer in cache.layers for head in held_by(layer)[0]} == {kibibytes * 1024 // (entry * DEPTH)}


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.5, -0.2, math.nan, True, None, "64 parsecs", "-1MiB", "0MiB", ""])
@pytest.mark.parametrize("method", [SnapKV, StreamingLLM, H2O, PyramidKV, AdaKV, VLCache])
def test_a_wrong_budget_names_what_is_allowed(method: type, budget: Any) -> None:
    with pytest.raises(ValueError, match=r"ratio.*float.*int.*MiB"):
        method(budget=budget)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SnapKV, dict(window=0), "window"),
        (SnapKV, dict(pool=4), "odd"),
        (SnapKV, dict(pooling="median"), "mean"),
        (SnapKV, dict(group="sum"), "mean"),
        (SnapKV, dict(rows="first"), "post-vision"),
        (SnapKV, dict(sinks=-1), "sinks"),
        (SnapKV, dict(recent=1.5), "recent"),
        (PyramidKV, dict(beta=0.5), "beta"),
        (AdaKV, dict(floor=1.2), "floor"),
        (VLCache, dict(threshold=2), "threshold"),
        (VLCache, dict(granularity="token"), "head"),
        (H2O, dict(reduce="max"), "sum"),
        (H2O, dict(every=0), "every"),
        (StreamingLLM, dict(every=True), "every"),
    ],
)
def test_wrong_options_are_named(method: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


# ---- odd inputs


@pytest.mark.parametrize("name", SCORED)
@torch.no_grad()
def test_hidden_states_that_are_no_numbers_raise_and_leave_the_model_usable(name: str) -> None:
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    with vlmaccel.patched(model, METHODS[name]):
        right = decode(model, batch, answer_tokens(3))
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[0, 25] = torch.nan
        with pytest.raises(ValueError, match="decoder layer 0 are NaN.*bfloat16"):
            model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
        assert all(map(torch.equal, decode(model, batch, answer_tokens(3)), right))


def pictures_at_the_end() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, 110, (2, 24), generator=generator)
    ids[0, -9:] = IMAGE
    ids[1, :5] = PAD
    ids[1, 9:18] = IMAGE
    ids[1, 18:] = torch.randint(2, 110, (6,), generator=generator)
    pixels = torch.randn(2, 3, 24, 24, generator=generator)
    return dict(input_ids=ids, attention_mask=(ids != PAD).long(), pixel_values=pixels)


@pytest.mark.parametrize("name", [*METHODS, "post-vision"])
@torch.no_grad()
def test_a_picture_at_the_end_and_no_picture_at_all(name: str) -> None:
    """Nothing behind the picture: the last rows decide, as where there is no picture."""
    method = METHODS.get(name, SnapKV(budget=0.4, window=3, rows="post-vision"))
    model, batch, later = build(VLM), pictures_at_the_end(), answer_tokens(2)
    for prompts in (batch, inputs("llama", 2, pad=True)):
        kept = kept_of(prefill(model, prompts, method), prompts["attention_mask"])
        with vlmaccel.patched(model, method):
            _, steps = decode(model, prompts, later)
        assert_like_reference(reference_of(model, prompts, later, kept), prompts["attention_mask"], None, steps)
        assert all(not one.all() for sample in kept for one in list(sample.values())[-1:])
    if isinstance(method, VLCache):
        assert question(batch, 0, method.window) == list(range(24 - min(24, method.window), 24))


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), ("llama", VLM)))
@torch.no_grad()
def test_prompts_of_one_and_two_tokens(kind: str, name: str) -> None:
    model = build(kind)
    for n in (1, 2):
        ids = torch.arange(5, 5 + n)[None]
        plain = model.generate(ids, **GREEDY)
        with vlmaccel.patched(model, replace(METHODS[name], budget=3, every=1) if name == "h2o" else METHODS[name]):
            said = model.generate(ids, **GREEDY)
        assert torch.equal(said.logits[0], plain.logits[0]) and said.sequences.shape == plain.sequences.shape


@every_method
@torch.no_grad()
def test_half_precision(name: str) -> None:
    """Scores are added up in float32 whatever the model is in, and stay finite."""
    model, batch = build("llama").bfloat16(), inputs("llama", 3, pad=True)
    with vlmaccel.patched(model, METHODS[name]):
        cache = model(**batch).past_key_values
        said = model.generate(**batch, **GREEDY)
    assert torch.stack(said.logits).isfinite().all()
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for layer in cache.layers for x in layer.notes.values())


def test_every_method_has_a_name_that_patch_finds_and_options_it_prints() -> None:
    for method in METHODS.values():
        assert type(method).name in vlmaccel.methods()
        again = eval(repr(method), {type(method).__name__: type(method)})
        assert again == method and {f.name for f in fields(method)} <= set(
            repr(method).replace("(", " ").replace("=", " ").split()
        )
