"""Vertical-slash, block-sparse and FlexPrefill: the lists are what their rules say, and the model computes those lists."""

from __future__ import annotations

import math
from dataclasses import replace
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
from tests.support.models import DEPTH, build, inputs
from tests.support.reference import Reference
from tests.support.sparse import Seen, attended_of, call, long_inputs, recorded, reference_of, share_of
from vlmaccel.kernels import block_gather, block_prefill
from vlmaccel.methods import BlockSparse, FlexPrefill, PyramidDrop, SnapKV, VerticalSlash, vertical_slash

VLM = "llava-clip-llama"
METHODS: dict[str, Any] = {
    "vertical-slash": VerticalSlash(vertical=9, slash=4, last=7, block=16),
    "vertical-slash-mass": VerticalSlash(mass=0.06, last=20, block=16),
    "block-sparse": BlockSparse(blocks=3, block=16),
    "block-sparse-mass": BlockSparse(mass=0.7, block=16),
    "flexprefill": FlexPrefill(gamma=0.66, tau=0.16, block=16),
    "flexprefill-few": FlexPrefill(gamma=0.06, tau=0.2, block=16),
}
every_method = pytest.mark.parametrize("name", METHODS)
LENGTHS = (150, 61, 118)
TOLERANCE = 5e-5  # prompts are longer than elsewhere


@pytest.fixture(autouse=True)
def _few_forced(monkeypatch: Any) -> Any:
    """Prompts here are shorter than the 100 diagonals that would always be there."""
    monkeypatch.setattr(vertical_slash, "SINKS", 3)
    monkeypatch.setattr(vertical_slash, "NEAR", 2)
    with torch.no_grad():
        yield


def prompts(kind: str) -> dict[str, Tensor]:
    if not kind.startswith("llava"):
        return long_inputs(LENGTHS)
    batch, text = inputs(kind, 3, pad=True), long_inputs((90, 90, 90))  # behind the pictures
    return batch | {k: torch.cat([batch[k], text[k]], 1) for k in text}


# ---- the rules, a pair at a time


def pick(score: list[float], forced: set[int], count: int | None, mass: float | None) -> set[int]:
    """The forced, then the best, `count` in all or as many as hold `mass`; not what scores nothing."""
    order = sorted(range(len(score)), key=lambda i: (i not in forced, 0 if i in forced else -score[i], i))
    found, held = set(forced), 0.0
    for rank, i in enumerate(order):
        if rank >= count if mass is None else held >= mass * sum(score):  # type: ignore[operator]
            break
        held += score[i]
        if score[i] > 0:
            found.add(i)
    return found


def of_lines(vertical: set[int], slash: set[int], n: int, m: int, block: int) -> Tensor:
    """(n, m) bool: chosen keys, and the whole key blocks that a chosen diagonal crosses in a block of rows."""
    seen, earlier = torch.zeros(n, m, dtype=torch.bool), m - n
    for first in range(0, n, block):
        rows = range(first + earlier, first + earlier + block)
        crossed = {(row - d) // block for row in rows for d in slash | {0} if row >= d}
        seen[first : first + block, [key for key in range(m) if key // block in crossed or key in vertical]] = True
    return seen.tril(earlier)


def of_blocks(blocks: list[set[int]], n: int, m: int, block: int) -> Tensor:
    """(n, m) bool: the key blocks of every block of rows."""
    seen = torch.zeros(n, m, dtype=torch.bool)
    for i, chosen in enumerate(blocks):
        seen[i * block : (i + 1) * block, [key for key in range(m) if key // block in chosen]] = True
    return seen.tril(m - n)


def line_scores(attention: Tensor, rows: list[int]) -> tuple[list[float], list[float]]:
    """What some rows' attention (m, m) comes to along every key and every diagonal."""
    m, a = len(attention), {row: attention[row].tolist() for row in rows}
    vertical = [sum(a[row][key] for row in rows) for key in range(m)]
    slash = [sum(a[row][row - d] for row in rows if row >= d) for d in range(m)]
    return vertical, slash


def softmax(x: list[float]) -> list[float]:
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def mean_row(x: Tensor, real: list[int]) -> Tensor:
    return x[real].double().mean(0) if real else torch.zeros(x.shape[1], dtype=torch.float64)


def shares_of_blocks(seen: Seen, b: int, h: int, block: int, row_blocks: list[range]) -> list[list[float]]:
    """[row block][key block], softmax of the products of means; rows by key number."""
    at = seen.at
    m, n = at.key.shape[2], at.query.shape[2]
    real = [j for j in range(m) if at.real[b, j]]
    query, key = at.query[b, h], at.key[b, h * at.key.shape[1] // at.query.shape[1]]
    keys = [mean_row(key, [j for j in real if j // block == kb]) for kb in range(-(-m // block))]
    found = []
    for rows in row_blocks:
        mean = mean_row(query, [i - m + n for i in rows if i in real])
        able = [kb for kb in range(len(keys)) if kb <= rows[-1] // block and any(j // block == kb for j in real)]
        share = softmax([float(mean @ keys[kb]) * at.scale for kb in able]) if able else []
        found.append([share[able.index(kb)] if kb in able else 0.0 for kb in range(len(keys))])
    return found


def rule(method: Any, seen: Seen, b: int, h: int, attention: Tensor) -> Tensor:
    """(n, m) bool, what a head of a sample is to compute. attention: (m, m) of that head, zeros in rows of padding."""
    at, block = seen.at, method.block
    n, m = at.query.shape[2], at.key.shape[2]
    start = int(at.real[b].byte().argmax())
    row_blocks = [range(i + m - n, min(i + block, n) + m - n) for i in range(0, n, block)]
    own = [{row // block for row in rows} for rows in row_blocks]
    if isinstance(method, VerticalSlash):
        vertical, slash = line_scores(attention, list(range(max(m - n, m - method.last), m)))
        keys = pick(vertical, set(range(start, min(m, start + 3))), method.vertical, method.mass)
        return of_lines(keys, pick(slash, set(range(min(m, 2))), method.slash, method.mass), n, m, block)
    shares = shares_of_blocks(seen, b, h, block, row_blocks)
    if isinstance(method, BlockSparse):
        chosen = [pick(share, mine, method.blocks, method.mass) for share, mine in zip(shares, own, strict=True)]
        return of_blocks(chosen, n, m, block)
    last = range(max(m - n, m - block), m)
    expected = shares_of_blocks(seen, b, h, block, [last])[0]
    true = [float(attention[last[0] :, kb * block : (kb + 1) * block].sum()) for kb in range(len(expected))]
    true = [x / sum(true) for x in true]
    middle = [(p + q) / 2 for p, q in zip(expected, true, strict=True)]
    divergence = sum(
        0.5 * x * math.log(x / at_middle)
        for side in (expected, true)
        for x, at_middle in zip(side, middle, strict=True)
        if x > 0
    )
    if math.sqrt(max(0.0, divergence)) <= method.tau:
        flat = [(share, i, kb) for i, row in enumerate(shares) for kb, share in enumerate(row)]
        held, chosen = 0.0, [set(mine) for mine in own]
        for share, i, kb in sorted(flat, key=lambda x: -x[0]):
            if held >= method.gamma * sum(map(sum, shares)):
                break
            chosen[i].add(kb)
            held += share
        for i, share in enumerate(shares):
            if share[start // block] > 0:
                chosen[i].add(start // block)
        kinds.append("means")
        return of_blocks(chosen, n, m, block)
    kinds.append("lines")
    vertical, slash = line_scores(attention, list(last))
    keys = pick(vertical, set(range(start, min(m, start + block))), None, method.gamma)
    return of_lines(keys, pick(slash, set(), None, method.gamma), n, m, block)


kinds: list[str] = []  # which way FlexPrefill's heads went


def padded(attention: Tensor, start: int) -> Tensor:
    """(H, n, n) of the real tokens as (H, m, m) of the padded sequence."""
    return torch.nn.functional.pad(attention, (start, 0, start, 0))


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), ("llama", "qwen3", VLM)))
def test_the_lists_are_the_rule_s(kind: str, name: str) -> None:
    """For every head of three layers, given what the layers before did, from the reference's attention."""
    model, batch, method = build(kind), prompts(kind), METHODS[name]
    mask = batch["attention_mask"]
    recording, calls = recorded(method)
    with vlmaccel.patched(model, recording):
        model(**batch)
    assert [seen.layer for seen in calls] == list(range(DEPTH))
    attended, reference = attended_of(calls, mask), Reference(model)
    computed: list[float] = []
    kinds.clear()
    for b, embeds in enumerate(reference.embed(batch)):
        trace, start = reference.run(embeds, attended=attended[b]), starts_of(mask)[b]
        for k in (0, 2, DEPTH - 1):
            attention = padded(reference.attention_by_head(trace, k), start)
            for h in range(4):
                wanted = rule(method, calls[k], b, h, attention[h])
                got = calls[k].mask[b, h]
                assert torch.equal(got[start:, start:], wanted[start:, start:]), f"sample {b}, layer {k}, head {h}"
                assert not bool(got[:, :start].any())
                computed.append(2 * int(got[start:].sum()) / (len(embeds) * (len(embeds) + 1)))
    assert sum(computed) / len(computed) < 0.95  # not vacuous
    assert not name.startswith("flexprefill") or set(kinds) == {"means", "lines"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("n", "past"), [(37, 0), (40, 23), (5, 60), (1, 40)])
def test_the_lists_behind_earlier_turns(name: str, n: int, past: int) -> None:
    method = METHODS[name]
    at = call(batch=2, heads=4, kv_heads=2, n=n, past=past, padding=(min(7, past + n - n), 0), sharp=3)
    seen = Seen(at, method.sparse_attention(at))
    m = past + n
    key = at.key.double().repeat_interleave(2, 1)
    hidden = torch.ones(n, m, dtype=torch.bool).triu(past + 1) | ~at.real[:, None, None]
    attention = (at.query.double() @ key.mT * at.scale).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    attention = torch.nn.functional.pad(attention * at.real[:, None, past:, None], (0, 0, past, 0))
    for b in range(2):
        for h in range(4):
            wanted = rule(method, seen, b, h, attention[b, h]) & at.real[b]
            assert torch.equal(seen.mask[b, h][at.real[b, past:]], wanted[at.real[b, past:]])


def test_lists_do_not_name_what_no_row_sees() -> None:
    """Although there is room for it: neither padding nor what comes later."""
    at = call(batch=2, n=90, padding=(37, 0))
    whole = BlockSparse(blocks=100, block=16).sparse_attention(at).blocks
    single = VerticalSlash(vertical=1000, slash=0, block=16).sparse_attention(at).columns
    for b, start in enumerate((37, 0)):
        for i in range(start // 16, 6):
            last = min(90, 16 * i + 16)
            assert whole[b, 0, i][whole[b, 0, i] >= 0].tolist() == list(range(start // 16, i + 1))
            named = single[b, 0, i][single[b, 0, i] >= 0].tolist()
            assert len(named) == len(set(named)) and all(start <= key < last for key in named)


def test_30_keys_and_100_diagonals_are_always_there(monkeypatch: Any) -> None:
    monkeypatch.undo()
    at = call(n=200, padding=(13,), sharp=5)
    seen = Seen(at, VerticalSlash(vertical=0, slash=0, block=16).sparse_attention(at)).mask[0]
    for row in range(13, 200):
        assert bool(seen[:, row, 13 : min(43, row + 1)].all()) and bool(seen[:, row, max(13, row - 99) : row + 1].all())
    assert not bool(seen[:, 199, 43:80].any()) and not bool(seen[:, :, :13].any())


# ---- the model computes them


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), ("llama", VLM, "qwen3", "qwen2-hybrid")))
def test_prefill_and_decoding_equal_the_reference(kind: str, name: str) -> None:
    """The cache stays whole; a layer with a shorter window computes everything."""
    model, batch, later = build(kind), prompts(kind), answer_tokens(3)
    mask = batch["attention_mask"]
    full = decode(model, batch, later)
    recording, calls = recorded(METHODS[name])
    with vlmaccel.patched(model, recording):
        prompt, steps = decode(model, batch, later)
        shares = vlmaccel.stats(model).attended
        said = model.generate(**batch, **GREEDY)
        uncached = model(**batch, use_cache=False).logits
        unaware = model(**batch, past_key_values=DynamicCache()).logits  # of sliding layers
    attended = attended_of(calls[:DEPTH] if kind != "qwen2-hybrid" else calls[: DEPTH // 2], mask)
    assert_like_reference(reference_of(model, batch, later, attended), mask, prompt, steps, TOLERANCE)
    new = said.sequences[:, mask.shape[1] :]
    traces = reference_of(model, batch, new[:, :-1], attended)
    assert_like_reference(traces, mask, None, torch.stack(said.logits, 1)[:, 1:], TOLERANCE)
    assert (prompt - full[0])[:, -1].abs().max() > 0.05
    for other in (uncached, unaware):
        assert (other - prompt)[mask.bool()].abs().max() < TOLERANCE
    # and stats count the pairs, over all heads
    for k in range(DEPTH):
        if k not in attended[0]:
            assert kind == "qwen2-hybrid" and shares[k] == 1
            continue
        seen = next(seen for seen in calls if seen.layer == k)
        assert shares[k] == pytest.approx(sum(share_of(seen)) / 3, rel=1e-5)


@every_method
def test_all_of_the_keys_is_dense_attention(name: str) -> None:
    model, batch, later = build("qwen2"), long_inputs(LENGTHS), answer_tokens(3)
    real = batch["attention_mask"].bool()
    plain = decode(model, batch, later)
    everything = {"vertical": 150, "slash": 150, "blocks": 10, "mass": None, "gamma": 1 - 1e-9, "tau": 0}
    fields = type(METHODS[name]).__dataclass_fields__
    for more in ({}, {"vertical": 0}, {"slash": 0}, {"tau": 1}):
        options = {k: x for k, x in {**everything, **more}.items() if k in fields}
        if not set(more) <= set(fields) or "vertical" in more:
            continue
        if "slash" in more:
            options["vertical"] = 150
        with vlmaccel.patched(model, replace(METHODS[name], **options)):
            got = decode(model, batch, later)
            assert min(vlmaccel.stats(model).attended) > 0.9999
        assert (got[0] - plain[0])[real].abs().max() < 1e-5 * plain[0].abs().max()
        assert (got[1] - plain[1]).abs().max() < 1e-5 * plain[1].abs().max()


@pytest.mark.parametrize("method", [VerticalSlash(mass=1), BlockSparse(mass=1.0), FlexPrefill(gamma=1)])
@pytest.mark.parametrize("pad", [True, False])
def test_the_whole_mass_is_the_model_bit_by_bit(method: Any, pad: bool) -> None:
    model, batch, later = build(VLM), inputs(VLM, 3, pad), answer_tokens(3)
    plain = decode(model, batch, later)
    with vlmaccel.patched(model, method):
        got = decode(model, batch, later)
        assert vlmaccel.stats(model).attended == [1.0] * DEPTH
    real = batch["attention_mask"].bool()
    assert torch.equal(got[0][real], plain[0][real]) and torch.equal(got[1], plain[1])
    assert all(map(torch.equal, decode(model, batch, later), plain))


@pytest.mark.parametrize("pays", [0.0, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_heads_that_would_be_slower_than_dense_compute_everything(name: str, pays: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(block_prefill, "SHORT", 1)
    monkeypatch.setattr(block_gather, "pays_below", lambda dtype: pays)
    model, batch = build("llama"), prompts("llama")
    real, whole = batch["attention_mask"].bool(), model(**batch).logits
    with vlmaccel.patched(model, METHODS[name]):
        sparse = model(**batch).logits
        attended = vlmaccel.stats(model).attended
    assert (min(attended) == 1) == (pays == 0)
    assert ((sparse - whole)[real].abs().max() < TOLERANCE) == (pays == 0)


@pytest.mark.parametrize(("name", "kind"), turns(list(METHODS), ("llama", "qwen3", "qwen2")))
def test_a_padded_batch_is_its_samples(kind: str, name: str) -> None:
    """To the block, where the padding is whole blocks (they are counted from the first column)."""
    model, batch, later = build(kind), long_inputs((149, 69, 117)), answer_tokens(3)
    mask = batch["attention_mask"]
    recording, calls = recorded(METHODS[name])
    with vlmaccel.patched(model, recording):
        _, steps = decode(model, batch, later)
        together = attended_of(calls, mask)
        for b in range(3):
            calls.clear()
            one = alone(batch, b)
            _, single = decode(model, one, later[b : b + 1])
            (own,) = attended_of(calls, one["attention_mask"])
            assert all(torch.equal(own[k], together[b][k]) for k in range(DEPTH)), f"sample {b}"
            assert (single[0] - steps[b]).abs().max() < TOLERANCE


# ---- more computes more


RAISED: dict[str, Any] = {
    "vertical-slash-mass": lambda x: VerticalSlash(mass=x, last=9, block=16),
    "block-sparse-mass": lambda x: BlockSparse(mass=x, block=16),
    "flexprefill": lambda x: FlexPrefill(gamma=x, tau=0.4, block=16),
    "vertical": lambda x: VerticalSlash(vertical=int(90 * x), slash=4, block=16),
    "slash": lambda x: VerticalSlash(vertical=4, slash=int(90 * x), block=16),
    "blocks": lambda x: BlockSparse(blocks=1 + int(6 * x), block=16),
}


@given(
    name=st.sampled_from(sorted(RAISED)),
    shares=st.lists(st.floats(0.01, 0.999), min_size=2, max_size=2),
    n=st.integers(1, 90),
    past=st.sampled_from([0, 21]),
    padding=st.integers(0, 30),
    seed=st.integers(0, 50),
)
def test_more_never_computes_less_and_no_row_is_empty(
    name: str, shares: list[float], n: int, past: int, padding: int, seed: int
) -> None:
    at = call(batch=2, n=n, past=past, padding=(min(padding, n + past - 1), 0), seed=seed)
    less, more = (Seen(at, RAISED[name](share).sparse_attention(at)).mask for share in sorted(shares))
    assert bool((less <= more).all())
    own = torch.arange(n) + past
    assert bool(less[:, :, torch.arange(n), own].logical_or(~at.real[:, None, past:]).all())  # a row sees itself
    assert not bool((more & ~at.real[:, None, None]).any())


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("vertical-slash-mass", (0.02, 0.15, 0.6)),
        ("block-sparse-mass", (0.02, 0.15, 0.6)),
        ("flexprefill", (0.15, 0.6, 0.9)),
    ],
)
def test_stats_fall_with_the_mass(name: str, shares: tuple[float, ...]) -> None:
    model, batch, attended = build("llama"), long_inputs(LENGTHS), []
    for share in shares:
        with vlmaccel.patched(model, RAISED[name](share)):
            model(**batch)
            stats = vlmaccel.stats(model)
        attended.append(stats.attended[0])
        assert stats.flops < stats.flops_full and stats.kv_bytes == stats.kv_bytes_full
    assert attended[0] < attended[1] < attended[2] <= 1


# ---- ways to generate, other methods


@pytest.mark.parametrize(("name", "gap"), turns(list(METHODS), (5, 0)))
def test_a_second_turn_and_a_prefill_in_two_chunks(name: str, gap: int) -> None:
    model, batch, later = build("llama"), long_inputs((70, 54)), answer_tokens(2)
    mask, said = batch["attention_mask"], answer_tokens(2).flip(1)[:, :gap]
    question = torch.randint(2, 110, (2, 45), generator=torch.Generator().manual_seed(8))
    recording, calls = recorded(METHODS[name])
    with vlmaccel.patched(model, recording):
        out, seen_mask = model(**batch), mask
        for t in range(gap):
            seen_mask = extend_mask(seen_mask, 1)
            out = model(said[:, t : t + 1], attention_mask=seen_mask, past_key_values=out.past_key_values)
        first, cache = attended_of(calls, mask), out.past_key_values
        calls.clear()
        seen_mask = extend_mask(seen_mask, 45)
        prompt = model(question, attention_mask=seen_mask, past_key_values=cache).logits
        steps = []
        for t in range(STEPS):
            seen_mask = extend_mask(seen_mask, 1)
            steps.append(model(later[:, t : t + 1], attention_mask=seen_mask, past_key_values=cache).logits[:, -1])
        shares = vlmaccel.stats(model).attended
    assert shares == pytest.approx([sum(share_of(seen)) / 2 for seen in calls], rel=1e-5) and len(calls) == DEPTH
    total, attended = 70 + gap + 45, []
    for b, start in enumerate(starts_of(mask)):
        attended.append({})
        for k in range(DEPTH):
            whole = torch.ones(4, total, total, dtype=torch.bool)
            whole[:, start:70, start:70] = first[b][k]
            whole[:, total - 45 :] = calls[k].mask[b]
            attended[b][k] = whole[:, start:, start:]
    traces = reference_of(model, batch, torch.cat([said, question, later], 1), attended)
    for b, (start, trace) in enumerate(zip(starts_of(mask), traces, strict=True)):
        begin = 70 - start + gap
        assert (prompt[b] - trace.logits[begin : begin + 45]).abs().max() < TOLERANCE
        assert (torch.stack(steps, 1)[b] - trace.logits[begin + 45 :]).abs().max() < TOLERANCE


@every_method
def test_candidates_over_a_cache_see_everything(name: str) -> None:
    model, batch, later = build("llama"), long_inputs(LENGTHS), answer_tokens(3)
    with vlmaccel.patched(model, METHODS[name]):
        _, steps = decode(model, batch, later)
        cache, seen = model(**batch).past_key_values, extend_mask(batch["attention_mask"], 4)
        checked = model(later[:, :4], attention_mask=seen, past_key_values=cache, logits_to_keep=4).logits
    assert (checked - steps[:, :4]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["vertical-slash", "block-sparse"])
def test_beams(name: str) -> None:
    model, batch = build("llama"), long_inputs((77, 45))
    mask = batch["attention_mask"]
    recording, calls = recorded(METHODS[name])
    with vlmaccel.patched(model, recording):
        model(**batch)
        attended = attended_of(calls, mask)
        said = model.generate(
            **batch, max_new_tokens=4, num_beams=2, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    new = said.sequences[:, mask.shape[1] :]
    for b, trace in enumerate(reference_of(model, batch, new, attended)):
        score = trace.logits[-5:-1].log_softmax(-1).gather(1, new[b, :, None]).mean()
        assert abs(score - said.sequences_scores[b]) < 1e-5


@pytest.mark.parametrize(("name", "positions"), turns(list(METHODS), ("renumber", "keep")))
def test_behind_tokens_that_were_dropped(name: str, positions: Any) -> None:
    """Blocks are of what is left."""
    model, batch, later = build(VLM), inputs(VLM, 3, pad=True), answer_tokens(3)
    mask = batch["attention_mask"]
    drop = PyramidDrop(ratio=0.6, layers=(1, 4), positions=positions)
    recording, calls = recorded(METHODS[name])
    with vlmaccel.patched(model, [drop, recording]):
        stages = model(**batch) and vlmaccel.stats(model).stages
        calls.clear()
        prompt, steps = decode(model, batch, later)
    schedules = [
        {s.layer: (s.keep[b][s.size[b] > 0] - start).tolist() for s in stages}
        for b, start in enumerate(starts_of(mask))
    ]
    traces = reference_of(model, batch, later, attended_of(calls, mask), None, schedules, positions)
    assert_like_reference(traces, mask, prompt, steps, TOLERANCE)


def test_padding_on_the_right_computes_everything() -> None:
    model, batch = build("llama"), long_inputs((60, 60))
    batch["attention_mask"][1, 50:] = 0
    plain = model(**batch).logits
    for name, method in METHODS.items():
        with vlmaccel.patched(model, method):
            got = model(**batch).logits
            assert vlmaccel.stats(model).attended == [1.0] * DEPTH, name
        assert torch.equal(got[batch["attention_mask"].bool()], plain[batch["attention_mask"].bool()])


@pytest.mark.parametrize("name", ["vertical-slash", "block-sparse"])
def test_before_an_eviction(name: str) -> None:
    model, batch, later = build("llama"), long_inputs(LENGTHS), answer_tokens(3)
    mask = batch["attention_mask"]
    recording, calls = recorded(METHODS[name])
    with vlmaccel.patched(model, [recording, SnapKV(budget=0.3, window=4)]):
        prompt, steps = decode(model, batch, later)
        attended = attended_of(calls[:DEPTH], mask)
        kept = kept_of(model(**batch).past_key_values, mask)
    assert_like_reference(reference_of(model, batch, later, attended, kept), mask, prompt, steps, TOLERANCE)


# ---- what cannot be


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (VerticalSlash, {"vertical": -1}, "vertical.*0 or more"),
        (VerticalSlash, {"vertical": 0.5}, "vertical.*whole number"),
        (VerticalSlash, {"slash": True}, "slash.*whole number"),
        (VerticalSlash, {"last": 0}, "last.*1 or more"),
        (VerticalSlash, {"mass": 0}, "mass.*above 0"),
        (VerticalSlash, {"mass": True}, "mass.*share"),
        (VerticalSlash, {"block": 48}, "block.*64.*128"),
        (BlockSparse, {"blocks": 0}, "blocks.*1 or more"),
        (BlockSparse, {"mass": 1.1}, "mass.*at most 1"),
        (BlockSparse, {"mass": float("nan")}, "mass.*share"),
        (BlockSparse, {"block": "64"}, "block.*64.*128"),
        (FlexPrefill, {"gamma": -0.1}, "gamma.*above 0"),
        (FlexPrefill, {"gamma": "all"}, "gamma.*share"),
        (FlexPrefill, {"gamma": None}, "gamma.*share"),
        (FlexPrefill, {"tau": 1.5}, "tau.*0 to 1"),
        (FlexPrefill, {"tau": True}, "tau.*0 to 1"),
        (FlexPrefill, {"block": 100}, "block.*64.*128"),
    ],
)
def test_wrong_options(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)
    with pytest.raises(ValueError, match=message):
        vlmaccel.patch(build("llama"), method.name, **options)


@every_method
def test_eager_attention_masks_of_pairs_and_training_are_refused(name: str) -> None:
    model, batch, method = build("llama"), long_inputs((60, 40)), METHODS[name]
    plain = decode(model, batch, answer_tokens(2))
    with vlmaccel.patched(model, method):
        right = decode(model, batch, answer_tokens(2))
        pairs = torch.ones(2, 1, 60, 60, dtype=torch.bool).tril()
        with pytest.raises(NotImplementedError, match=f"{type(method).__name__}.*padding"):
            model(input_ids=batch["input_ids"], attention_mask=pairs)
        with torch.enable_grad(), pytest.raises(RuntimeError, match="unpatch"):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(map(torch.equal, decode(model, batch, answer_tokens(2)), right))
    assert all(map(torch.equal, decode(model, batch, answer_tokens(2)), plain))
    eager = vlmaccel.patch(build("llama", "eager"), method)
    with pytest.raises(NotImplementedError, match='attn_implementation="sdpa"'):
        eager(**batch)


@pytest.mark.parametrize("name", ["vertical-slash", "flexprefill"])
def test_two_of_them_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="only one method.*BlockSparse"):
        vlmaccel.patch(build("llama"), [BlockSparse(), METHODS[name]])


@every_method
def test_short_prompts_and_half_precision(name: str) -> None:
    model = build("llama")
    for n in (1, 2, 17):
        ids = torch.arange(5, 5 + n)[None]
        plain = model(ids).logits
        with vlmaccel.patched(model, replace(METHODS[name], block=128)):  # one block
            assert (model(ids).logits - plain).abs().max() < 1e-5
    half = build("llama").bfloat16()
    with vlmaccel.patched(half, METHODS[name]):
        assert torch.stack(half.generate(**long_inputs(LENGTHS), **GREEDY).logits).isfinite().all()


@every_method
@torch.no_grad()
def test_weights_that_are_no_numbers_raise_and_leave_the_model_usable(name: str) -> None:
    model, batch, method = build("llama"), long_inputs(LENGTHS), METHODS[name]
    with vlmaccel.patched(model, method):
        right = decode(model, batch, answer_tokens(3))
        weight = model.model.layers[2].self_attn.k_proj.weight
        whole = weight.clone()
        weight[3] = torch.nan
        with pytest.raises(ValueError, match=f"{method.name}.*decoder layer 2 are NaN.*bfloat16"):
            model(**batch)
        weight.copy_(whole)
        assert all(map(torch.equal, decode(model, batch, answer_tokens(3)), right))
