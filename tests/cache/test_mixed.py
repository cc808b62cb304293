"""The mixed-precision layer alone: what is quantised and when, eviction, going back, batches, bytes, the keys' bias."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad
from transformers import Qwen2_5_VLTextConfig, Qwen2Config
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from tests.cache.test_store import groups_of
from tests.support.memory import Largest, held_bytes
from tests.support.models import build
from vlmaccel.cache import KeyBias, PrunedLayer, extend, key_bias
from vlmaccel.cache import mixed as mixed_module
from vlmaccel.cache.mixed import FULL, MixedLayer
from vlmaccel.cache.pruned import ROOM
from vlmaccel.kernels import mixed_decode
from vlmaccel.kernels.decode_attention import decode_attention
from vlmaccel.kernels.quantize_pack import scale_dtype
from vlmaccel.reduction import Reduction

HEADS, DIM, GROUP, RESIDUAL, DEFAULT = 2, 8, 4, 6, 4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def draw(seed, n, batch=1, dim=DIM):
    """(B, H_kv, n, dim) keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, HEADS, n, dim, generator=generator).unbind(0)


def draw_bits(seed, n, batch=1, heads=HEADS, choice=(2, 4, 8, FULL)):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(choice)[torch.randint(0, len(choice), (batch, heads, n), generator=generator)].to(torch.int8)


def prefill(keys, values, bits=None, padding=None, **options):
    options = {"group": GROUP, "residual": RESIDUAL, "default": DEFAULT, **options}
    plain, n = PrunedLayer(), keys.shape[2]
    plain.expect(extend(None, 0, n, keys.shape[0], keys.device), n)
    plain.update(keys.clone(), values.clone())
    layer = MixedLayer.of(plain, padding, **options)
    if bits is not None:
        layer.name(bits)
    if layer.key_bias is not None:
        layer.see_positions(torch.arange(n).expand(1, keys.shape[0], n))
    layer.settle()
    return layer


def step(layer, keys, values, n=1):
    """Decode the first n tokens of keys and values one by one."""
    for t in range(n):
        layer.update(keys[:, :, t : t + 1].clone(), values[:, :, t : t + 1].clone())
        if layer.key_bias is not None:
            layer.see_positions(torch.full((1, keys.shape[0], 1), layer.get_seq_length() - 1))
        layer.settle()


def stream(keys, values, first, bits=None, **options):
    """The first `first` tokens at once, the others one by one."""
    layer = prefill(keys[:, :, :first], values[:, :, :first], None if bits is None else bits[..., :first], **options)
    step(layer, keys[:, :, first:], values[:, :, first:], keys.shape[2] - first)
    return layer


def content(layer, b, h):
    """All that head h of sample b holds in few bits, to the bit."""
    return {bits: groups for bits, s in sorted(layer.stores.items()) if (groups := groups_of(s, b, h))}


def contents(layer):
    return [content(layer, b, h) for b in range(layer.keys.shape[0]) for h in range(HEADS)]


def exact(layer, b, h):
    slots = layer.exact_slots
    g = min(h, slots.index.shape[1] - 1)
    return slots.index[b, g][slots.sizes[b, g] > 0].tolist()


def due(bits, n, groups=GROUP, residual=RESIDUAL):
    """By the rule alone: {bits: logical indices}, for the named bits of n tokens in order."""
    out = {}
    for precision in (2, 4, 8):
        old = [i for i in range(max(n - residual, 0)) if bits[i] == precision]
        if whole := old[: len(old) // groups * groups]:
            out[precision] = whole
    return out


def quantised(layer, b, h):
    return {bits: [i for group in groups for i in group[0]] for bits, groups in content(layer, b, h).items()}


@given(st.integers(1, 40), st.integers(0, 20), st.sampled_from([1, 4]), st.sampled_from([0, 6]), st.integers(0, 99))
def test_which_entries_are_quantised(prompt, steps, group, residual, seed):
    keys, values = draw(seed, prompt + steps)
    bits = draw_bits(seed, prompt)
    layer = stream(keys, values, prompt, pad(bits, (0, steps)), group=group, residual=residual)
    for h in range(HEADS):
        named = bits[0, h].tolist() + [DEFAULT] * steps
        want = due(named, prompt + steps, group, residual)
        assert quantised(layer, 0, h) == want
        gone = {i for indices in want.values() for i in indices}
        assert exact(layer, 0, h) == [i for i in range(prompt + steps) if i not in gone]
        assert exact(layer, 0, h)[-residual:] == list(range(prompt + steps))[-residual:] or residual == 0


@given(st.integers(1, 45), st.integers(0, 44), st.integers(0, 99))
def test_a_stream_is_quantised_as_a_block(n, steps, seed):
    steps = min(steps, n - 1)
    keys, values = draw(seed, n)
    bits = draw_bits(seed, n)
    bits[..., n - steps :] = DEFAULT
    block, streamed = prefill(keys, values, bits), stream(keys, values, n - steps, bits)
    assert contents(block) == contents(streamed)
    assert [exact(block, 0, h) for h in range(HEADS)] == [exact(streamed, 0, h) for h in range(HEADS)]
    assert block.get_seq_length() == streamed.get_seq_length() == n
    assert sorted_dense(block).equal(sorted_dense(streamed))


def sorted_dense(layer):
    """(2, B, H_kv, n, dim) keys and values in the order of the sequence, hidden entries left out (one sample)."""
    slots = layer.slots
    index = slots.index.expand(-1, HEADS, -1).masked_fill((slots.sizes == 0).expand(-1, HEADS, -1), 1 << 30)
    order = index.argsort(2)[:, :, : int((slots.sizes > 0).sum(2).max())]
    return torch.stack([x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])) for x in layer.dense()])


def test_codes_of_the_past_never_change():
    keys, values = draw(1, 120)
    layer = prefill(keys[:, :, :40], values[:, :, :40], draw_bits(1, 40))
    before, dense = contents(layer), {}
    for t in range(40, 120):
        step(layer, keys[:, :, t:], values[:, :, t:])
        now = contents(layer)
        for old, new in zip(before, now, strict=True):
            assert all(new[bits][: len(groups)] == groups for bits, groups in old.items())
        before = now
        got = sorted_dense(layer)
        for i in quantised(layer, 0, 0).get(DEFAULT, []):
            assert dense.setdefault(i, got[:, 0, 0, i]).equal(got[:, 0, 0, i])
    assert len(dense) > 60


@given(st.integers(1, 30), st.integers(0, 12), st.integers(0, 99))
def test_new_entries_and_the_window_are_exact(prompt, steps, seed):
    keys, values = draw(seed, prompt + steps)
    layer = stream(keys, values, prompt, None)
    got = sorted_dense(layer)[:, 0, :, -RESIDUAL:]
    assert torch.equal(got, torch.stack([keys, values])[:, 0, :, -RESIDUAL:])


@given(
    st.lists(st.integers(1, 33), min_size=2, max_size=3),
    st.integers(0, 14),
    st.integers(0, 99),
    st.sampled_from([1, HEADS]),
)
def test_a_batch_is_quantised_as_its_samples_are(lengths, steps, seed, heads):
    """Left-padded samples, every one with other bits; padding is neither counted nor held in few bits."""
    longest, batch = max(lengths), len(lengths)
    keys, values = draw(seed, longest + steps, batch)
    bits = draw_bits(seed, longest, batch, heads)
    start = [longest - n for n in lengths]
    padding = torch.arange(longest) < torch.tensor(start)[:, None]
    keys[:, :, :longest][padding[:, None].expand(-1, HEADS, -1)] = 77.0
    bits = bits.masked_fill(padding[:, None], 0)
    layer = prefill(keys[:, :, :longest], values[:, :, :longest], bits, padding if padding.any() else None)
    step(layer, keys[:, :, longest:], values[:, :, longest:], steps)
    for b, skipped in enumerate(start):
        alone = stream(
            keys[b : b + 1, :, skipped:],
            values[b : b + 1, :, skipped:],
            lengths[b],
            pad(bits[b : b + 1, :, skipped:], (0, steps)),
        )
        for h in range(HEADS):
            mine = {
                bits: [(tuple(i - skipped for i in group[0]), *group[1:]) for group in groups]
                for bits, groups in content(layer, b, h).items()
            }
            assert mine == content(alone, 0, h)
            assert [i - skipped for i in exact(layer, b, h)] == exact(alone, 0, h)
    query = torch.randn(batch, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(seed))
    got = layer.attend(query, 0.4)
    for b in range(batch):
        assert torch.allclose(got[b : b + 1], softmax_over(layer, query, b), atol=1e-5)


def softmax_over(layer, query, b, wanted=None):
    """Attention of sample b's query over its entries that are not hidden (and, of those, the `wanted` (H_kv, m))."""
    keys, values = (x[b] for x in layer.dense())
    real = layer.slots.sizes[b].expand(HEADS, -1) > 0
    real = real if wanted is None else real & wanted
    out = []
    for h in range(query.shape[1]):
        kv = h // (query.shape[1] // HEADS)
        k, v = keys[kv, real[kv]], values[kv, real[kv]]
        out.append((query[b, h] @ k.T * 0.4).softmax(-1) @ v)
    return torch.stack(out)[None]


def mixed(seed=3, n=50, batch=2, bits=None, **options):
    keys, values = draw(seed, n, batch)
    return prefill(keys, values, draw_bits(seed, n, batch) if bits is None else bits, **options)


@pytest.mark.parametrize("prefer", ["attend", "update"])
def test_a_decode_step_reads_all_entries(prefer):
    layer = mixed()
    new, query = draw(8, 1, 2), torch.randn(2, 2 * HEADS, 1, DIM)
    if prefer == "attend":
        layer.announce_attend(None)
        got = layer.update(*new)
        assert torch.equal(got[0], new[0])
    else:
        got = layer.update(*new)
        assert got[0].shape[2] == layer.held == 51 + (layer.held - 51)
        assert all(torch.equal(a, b) for a, b in zip(got, layer.dense(), strict=True))
    want = torch.cat([softmax_over(layer, query, b) for b in range(2)])
    assert torch.allclose(layer.attend(query, 0.4), want, atol=1e-5)


def by_copies(layer, query, scale=0.4):
    """Attention over all entries written out in float32."""
    layer.announce_attend(None)
    return decode_attention(query, *layer.dense(), layer._bias(layer.slots), scale)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("planted", [None, 0.0, 30.0])
@pytest.mark.parametrize("kind", ["whole", "fillers", "padding", "sizes"])
def test_attention_over_codes_is_that_over_entries_written_out(heads, ratio, planted, kind):
    """In ragged batches, with hidden entries, sizes of merged ones, and keys that share a bias."""
    keys, values = draw(6, 60, 3)
    bias = None if planted is None else qwen(planted)
    padding = torch.arange(60) < torch.tensor([0, 9, 17])[:, None] if kind == "padding" else None
    layer = prefill(keys, values, draw_bits(6, 60, 3, heads), padding, key_bias=bias)
    if kind == "fillers":
        evict(layer, (torch.rand(3, heads, layer.held) < 0.4) & (layer.slots.sizes > 0))
    step(layer, *draw(7, 9, 3), 9)
    if kind == "sizes":
        for part in (*layer.stores.values(), layer):
            slots = layer.exact_slots if part is layer else part.slots
            known = replace(slots, size=slots.sizes * torch.randint(1, 9, slots.index.shape), prop_attn=True)
            part.__dict__["_slots" if part is layer else "slots"] = known
    assert len(layer.stores) == 3
    assert layer.slots.index.shape[1] == heads or kind == "padding"
    query = torch.randn(3, ratio * HEADS, 1, DIM, generator=torch.Generator().manual_seed(8))
    assert torch.allclose(layer.attend(query, 0.4), by_copies(layer, query), atol=1e-5)


def test_attention_where_heads_hold_most_tokens_but_not_the_same():
    """The bias is worked out for all positions, then, not for those of every head."""
    keys, values = draw(6, 60, 2)
    layer = prefill(keys, values, draw_bits(6, 60, 2, HEADS, (4, 4, 4, FULL)), residual=0, key_bias=qwen(30.0))
    step(layer, *draw(7, 2, 2), 2)
    index = layer.stores[4].slots.index
    assert HEADS * index.shape[2] > 62 and not torch.equal(index[:, 0], index[:, 1])
    query = torch.randn(2, 3 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(8))
    assert torch.allclose(layer.attend(query, 0.4), by_copies(layer, query), atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("few", [2, 4, 8])
def test_attention_makes_no_copy_of_the_cache(biased, few, monkeypatch):
    n, dim = 16384, 64
    keys, values = (x.bfloat16() for x in draw(1, n, 1, dim))
    rotary = modeling_qwen2.Qwen2RotaryEmbedding(Qwen2Config(hidden_size=4 * dim, num_attention_heads=4))
    bias = KeyBias(torch.randn(HEADS, dim), rotary, modeling_qwen2.apply_rotary_pos_emb) if biased else None
    bits = torch.full((1, 1, n), few, dtype=torch.int8)
    layer = prefill(keys, values, bits, group=32, residual=64, key_bias=bias)
    query = torch.randn(1, 4, 1, dim).bfloat16()
    monkeypatch.setattr(mixed_module, "mixed_decode", mixed_decode._torch_form)  # so that what happens inside is seen
    with Largest() as largest:
        got = layer.attend(query, dim**-0.5)
    whole = 2 * keys.nbytes
    assert 0 < layer.transient <= 4 * mixed_decode.CHUNK < whole / 4
    assert largest.bytes <= max(layer.transient, 4 * 4 * layer.held)
    with Largest() as copied:
        want = by_copies(layer, query, dim**-0.5)
    assert copied.bytes >= whole / 2
    assert torch.allclose(got, want, atol=0.02)


def test_what_attention_copies_of_little_is_little():
    assert mixed(n=4).transient == 0
    layer = mixed(n=50, batch=2)
    most = max(store.slots.index.shape[2] for store in layer.stores.values())
    assert layer.transient == 2 * HEADS * most * DIM * 4


# ---- eviction


def evict(layer, wanted):
    layer.reduce(Reduction.select(wanted.flatten(0, 1) if wanted.ndim == 3 else wanted))


def indices(slots, wanted):
    """Logical indices of the `wanted` (B, H_kv, m) entries of every head of every sample."""
    index = slots.index.expand(-1, HEADS, -1)
    return [sorted(index[b, h][wanted[b, h]].tolist()) for b in range(len(index)) for h in range(HEADS)]


@given(
    st.integers(0, 99),
    st.sampled_from(["heads differ", "heads are evicted differently", "heads are alike"]),
    st.floats(0.05, 0.95),
    st.integers(0, 9),
)
def test_evicted_entries_have_no_influence(seed, kind, share, steps):
    layer = mixed(seed, bits=draw_bits(seed, 50, 2, HEADS if kind == "heads differ" else 1))
    slots = layer.slots
    wanted = torch.rand(2, HEADS, layer.held, generator=torch.Generator().manual_seed(seed)) < share
    wanted = (wanted[:, :1] if kind == "heads are alike" else wanted) & (slots.sizes > 0)
    wanted[..., -1] = True
    each = wanted.expand(-1, HEADS, -1)
    query = torch.randn(2, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(seed))
    want = torch.cat([softmax_over(layer, query, b, each[b]) for b in range(2)])
    stays = indices(slots, each)
    evict(layer, wanted)
    assert torch.allclose(layer.attend(query, 0.4), want, atol=1e-5)
    assert indices(layer.slots, (layer.slots.sizes > 0).expand(-1, HEADS, -1)) == stays
    new = draw(seed + 1, steps, 2)
    step(layer, *new, steps)
    want = torch.cat([softmax_over(layer, query, b) for b in range(2)])
    assert torch.allclose(layer.attend(query, 0.4), want, atol=1e-5)


def test_eviction_of_a_sample_where_heads_differ():
    layer = mixed()
    slots, wanted = layer.slots, torch.arange(layer.held) % 3 > 0
    stays = indices(slots, wanted & (slots.sizes > 0))
    evict(layer, wanted.expand(2, -1))
    assert indices(layer.slots, layer.slots.sizes > 0) == stays


def test_memory_of_whole_groups_is_freed():
    layer = mixed(batch=1, bits=torch.full((1, 1, 50), 4, dtype=torch.int8))
    store = layer.stores[4]
    groups, nbytes, all_ = store.keys[0].shape[2], store.nbytes, content(layer, 0, 0)[4]
    assert groups == 11
    wanted = torch.ones(1, layer.held, dtype=torch.bool)
    wanted[0, GROUP : 3 * GROUP] = wanted[0, 5 * GROUP] = False  # two groups, and one entry of another
    evict(layer, wanted)
    left = content(layer, 0, 0)[4]
    assert [group[2:] for group in left] == [group[2:] for i, group in enumerate(all_) if i not in (1, 2)]
    # what is left of the memory, and a size for every entry now that one is hidden
    assert layer.stores[4].nbytes == nbytes * 9 // 11 + 9 * GROUP * 4
    evict(layer, torch.arange(layer.held)[None] >= 9 * GROUP)
    assert not layer.stores and layer.held == 6
    assert layer.nbytes == held_bytes(layer)


def test_eviction_in_turns_is_eviction_at_once():
    once, twice = mixed(5), mixed(5)
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(once.slots.index.shape, generator=generator).expand(-1, HEADS, -1) < 0.6
    second = torch.rand(first.shape, generator=generator) < 0.6
    real = once.slots.sizes > 0
    index = once.slots.index.expand(-1, HEADS, -1).long().masked_fill(~real, 50)
    by_index = torch.zeros(2, HEADS, 51, dtype=torch.bool).scatter(2, index, second & real)
    evict(once, first & second & real)
    evict(twice, first & real)
    slots = twice.slots
    evict(twice, by_index.gather(2, slots.index.long()) & (slots.sizes > 0))
    assert contents(once) == contents(twice)
    assert [exact(once, b, h) for b in range(2) for h in range(HEADS)] == [
        exact(twice, b, h) for b in range(2) for h in range(HEADS)
    ]


def test_merging_is_refused_and_changes_nothing():
    layer = mixed(batch=1)
    before = contents(layer), layer.nbytes
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        layer.reduce(Reduction.merge_into(torch.arange(layer.held)[None] // 2 * 2))
    assert (contents(layer), layer.nbytes) == before


# ---- going back and batches


@given(
    st.integers(20, 40),
    st.integers(0, 4),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.sampled_from([0, 6]),
)
def test_candidates_that_are_taken_back_leave_no_trace(prompt, candidates, accepted, residual):
    """Assisted decoding: a known token and candidates come in at once, then what is wrong of these is taken back."""
    n = prompt + sum(min(right, candidates) + 1 for right in accepted)
    keys, values = draw(n, n)
    bits = draw_bits(prompt, prompt)
    layer, t = prefill(keys[:, :, :prompt], values[:, :, :prompt], bits, residual=residual), prompt
    for number, right in enumerate(accepted):
        right = min(right, candidates)
        new = draw(1000 + number, candidates + 1)
        for x, known in zip(new, (keys, values), strict=True):
            x[:, :, : right + 1] = known[:, :, t : t + right + 1]
        layer.update(*new)
        layer.settle(open_=candidates)
        layer.crop(right - candidates)
        t += right + 1
        assert layer.get_seq_length() == t
        known = prefill(keys[:, :, :t], values[:, :, :t], pad(bits, (0, t - prompt), value=DEFAULT), residual=residual)
        assert sorted_dense(layer).shape == sorted_dense(known).shape
        for h in range(HEADS):  # nothing before it is due, and what was due without the accepted candidates
            mine, most = quantised(layer, 0, h), quantised(known, 0, h)
            assert all(most[b][: len(x)] == x for b, x in mine.items())
    layer.settle()
    assert contents(layer) == contents(known)
    assert sorted_dense(layer).equal(sorted_dense(known))


@pytest.mark.parametrize("accepted", [1, 2, 3])
def test_several_tokens_at_once_are_quantised_when_due(accepted):
    keys, values = draw(4, 30 + 5 * (accepted + 1))
    layer, t = prefill(keys[:, :, :30], values[:, :, :30]), 30
    for _ in range(5):
        layer.update(keys[:, :, t : t + accepted], values[:, :, t : t + accepted])
        t += accepted
        step(layer, keys[:, :, t:], values[:, :, t:])
        t += 1
        assert quantised(layer, 0, 0) == due([DEFAULT] * t, t)


def test_nothing_is_looked_at_before_something_is_due(monkeypatch):
    layer, looked = prefill(*draw(1, 30), group=8), []
    ask = MixedLayer.exact_slots.fget
    monkeypatch.setattr(MixedLayer, "exact_slots", property(lambda self: looked.append(1) or ask(self)))
    step(layer, *draw(2, 32), 32)
    assert len(looked) <= 2 * 32 // 8 + 2


def test_crop_refuses_what_is_in_few_bits():
    keys, values = draw(4, 40)
    layer = prefill(keys, values)
    before = contents(layer)
    assert exact(layer, 0, 0) == list(range(32, 40))
    with pytest.raises(ValueError, match="in few bits"):
        layer.crop(-9)
    with pytest.raises(ValueError, match="in few bits"):
        layer.crop(-41)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(2)
    layer.crop(0)
    assert contents(layer) == before and layer.get_seq_length() == 40
    layer.crop(-8)
    assert contents(layer) == before and exact(layer, 0, 0) == [] and layer.get_seq_length() == 32


def test_crop_refuses_to_leave_a_hole():
    """Entries in full precision are not the newest ones only: going back over them would keep newer ones in few bits."""
    bits = torch.full((1, 1, 40), 4, dtype=torch.int8)
    bits[..., 10:14] = FULL
    keys, values = draw(4, 40)
    layer = prefill(keys, values, bits)
    newest = exact(layer, 0, 0)[4:]
    assert exact(layer, 0, 0)[:4] == [10, 11, 12, 13] and newest[0] > 30
    with pytest.raises(ValueError, match="in few bits"):
        layer.crop(-len(newest) - 1)
    layer.crop(-len(newest))
    assert exact(layer, 0, 0) == [10, 11, 12, 13]


def go_on(layer, seed=9, n=14):
    step(layer, *draw(seed, n, layer.keys.shape[0]), n)


@pytest.mark.parametrize("named", [HEADS, 1])
@pytest.mark.parametrize("before", [0, 3])
def test_batch_operations_move_whole_samples(named, before):
    def fresh(order=(0, 1, 2)):
        keys, values = draw(6, 50, 3)
        bits = draw_bits(6, 50, 3, named)
        padding = torch.arange(50) < torch.tensor([0, 5, 9])[:, None]
        order = torch.tensor(order)
        layer = prefill(keys[order], values[order], bits.masked_fill(padding[:, None], 0)[order], padding[order])
        new = draw(7, before, 3)
        step(layer, new[0][order], new[1][order], before)
        return layer

    query = torch.randn(3, 2 * HEADS, 1, DIM)
    for change, order in (
        (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    ):
        layer, want = fresh(), fresh(order)
        change(layer)
        for now in (False, True):
            if now:
                go_on(layer)
                go_on(want)
            assert contents(layer) == contents(want)
            asked = query[torch.tensor(order)]
            assert torch.allclose(layer.attend(asked, 0.4), want.attend(asked, 0.4), atol=1e-6)


def test_copies_go_on_apart():
    layer = mixed()
    step(layer, *draw(1, 2, 2), 2)
    other = copy.deepcopy(layer)
    before = contents(other)
    go_on(layer, 2)
    assert contents(other) == before and other.get_seq_length() == 52
    again = copy.deepcopy(other)
    go_on(other, 2)
    assert contents(other) == contents(layer)
    go_on(again, 3)
    assert contents(again) != contents(layer)


def test_reset_leaves_an_empty_layer():
    layer = mixed()
    layer.reset()
    assert layer.slots is None and layer.nbytes == 0 and layer.held == 0 and layer.get_seq_length() == 0
    assert held_bytes(layer) == 0


def test_a_layer_is_of_use_again_after_a_reset():
    keys, values = draw(2, 40)
    layer = prefill(*draw(1, 50))
    layer.reset()
    layer.expect(extend(None, 0, 40, 1, keys.device), 40)
    layer.update(keys, values)
    layer.settle()
    assert contents(layer) == contents(prefill(keys, values))


def test_a_layer_is_of_use_again_after_a_reset_unannounced():
    keys, values = draw(2, 40)
    layer = prefill(*draw(1, 50))
    layer.reset()
    layer.update(keys, values)
    layer.settle()
    assert contents(layer) == contents(prefill(keys, values))


def test_inference_mode_is_left_and_entered():
    keys, values = draw(4, 60)
    with torch.inference_mode():
        layer = prefill(keys[:, :, :40], values[:, :, :40])
        step(layer, keys[:, :, 40:], values[:, :, 40:], 5)
    step(layer, keys[:, :, 45:], values[:, :, 45:], 5)
    with torch.inference_mode():
        step(layer, keys[:, :, 50:], values[:, :, 50:], 10)
    assert contents(layer) == contents(prefill(keys, values))


# ---- bytes


@given(st.integers(0, 99), st.integers(0, 20), st.booleans())
def test_bytes_are_those_of_every_tensor(seed, steps, evicts):
    layer = mixed(seed)
    if evicts:
        evict(layer, (torch.rand(2, HEADS, layer.held) < 0.5) & (layer.slots.sizes > 0))
    step(layer, *draw(seed, steps, 2), steps)
    assert layer.nbytes == held_bytes(layer)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("few", [[2], [4], [2, 4]])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_bytes_are_what_the_formula_says(dim, few, heads):
    n, group = 1000, 32
    keys, values = (x.bfloat16() for x in draw(0, n + 3, 1, dim))

    def formula(layer):
        # heads with fewer groups of a precision are filled up to the one with most
        held = {b: max(len(quantised(layer, 0, h).get(b, [])) for h in range(HEADS)) for b in few}
        rest = max(len(exact(layer, 0, h)) for h in range(HEADS))
        assert rest <= 128 + 32 * (len(few) if heads == 1 else 2 * len(few))
        quantities = sum(count * HEADS * 2 * dim * (b + 32 / group) / 8 for b, count in held.items())
        exact_ = rest * HEADS * 2 * dim * 2
        entries = sum(held.values()) + rest
        return quantities + exact_ + entries * heads * (4 if layer.slots.size is None else 8)

    layer = prefill(keys[:, :, :n], values[:, :, :n], draw_bits(1, n, 1, heads, few), group=group, residual=128)
    assert layer.nbytes == pytest.approx(formula(layer), rel=0.02)
    assert layer.nbytes == held_bytes(layer)
    whole = 2 * HEADS * 2 * dim * n
    assert layer.nbytes < (0.42 if max(few) == 4 else 0.31) * whole + 2 * HEADS * 2 * dim * 128
    step(layer, keys[:, :, n:], values[:, :, n:], 3)
    space = layer._room.keys.shape[2] - layer.keys.shape[2]
    assert 0 <= space <= max(ROOM, layer.keys.shape[2] // ROOM)
    assert layer.nbytes == pytest.approx(formula(layer) + space * 2 * HEADS * 2 * dim, rel=0.02)
    assert layer.nbytes == held_bytes(layer)


# ---- the bias of the keys


def qwen(planted=None):
    """The KeyBias of a layer of a tiny Qwen2, a few channels of it set to `planted`."""
    model = build("qwen2")
    bias = model.model.layers[1].self_attn.k_proj.bias.detach().clone().unflatten(0, (HEADS, DIM))
    if planted is not None:
        bias = torch.zeros_like(bias)
        bias[0, 0], bias[0, 5], bias[1, 2] = planted, -planted, planted / 2
    return KeyBias(bias, model.model.rotary_emb, modeling_qwen2.apply_rotary_pos_emb)


def rotated_bias(bias, positions):
    """(H_kv, n, dim) float64, by hand."""
    half = DIM // 2
    angle = positions[:, None].double() * 10000.0 ** -(torch.arange(half).double() / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = bias.double()[:, None, :half], bias.double()[:, None, half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def test_the_rotated_bias_is_the_models():
    bias = qwen(200.0)
    positions = torch.tensor([[[3, 0, 7, 400]]])
    want = rotated_bias(bias.bias, positions[0, 0])
    assert torch.allclose(bias.at(positions[None])[0].double(), want, atol=1e-3)
    # what the projection of a hidden state of zero gives
    attention = build("qwen2").model.layers[1].self_attn
    own = KeyBias(attention.k_proj.bias.unflatten(0, (HEADS, DIM)), bias.rotary, bias.rotate)
    key = attention.k_proj(torch.zeros(1, 4, 32)).unflatten(2, (HEADS, DIM)).transpose(1, 2)
    cos, sin = bias.rotary(key, position_ids=positions[0])
    assert torch.allclose(own.at(positions[None]), bias.rotate(key, key, cos, sin)[1], atol=1e-6)


@pytest.mark.parametrize("axes", [1, 3])
def test_heads_with_the_same_positions_have_the_same_bias(axes):
    bias = qwen(5.0)
    if axes == 3:
        config = Qwen2_5_VLTextConfig(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        )
        rotary = modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding(config)
        bias = KeyBias(bias.bias, rotary, modeling_qwen2_5_vl.apply_rotary_pos_emb)
    shared = torch.randint(0, 50, (axes, 3, 1, 7), generator=torch.Generator().manual_seed(1))
    got = bias.at(shared)
    assert got.shape == (3, HEADS, 7, DIM)
    assert torch.equal(bias.at(shared.expand(-1, -1, HEADS, -1)), got)
    # every head by its own positions
    own = torch.randint(0, 50, (axes, 3, HEADS, 7), generator=torch.Generator().manual_seed(2))
    for h in range(HEADS):
        assert torch.allclose(bias.at(own)[:, h], bias.at(own[:, :, h : h + 1])[:, h], atol=1e-6)
    # every axis turns the channels that it is for
    other = shared.clone()
    other[-1] += 1
    turned = (bias.at(other) != got).flatten(0, 2).any(0)
    assert turned.any() and (axes == 1 or not turned[:1].any())
    same = shared[:1].expand(axes, -1, -1, -1)  # equal on all axes: as with one
    assert torch.allclose(bias.at(same), qwen(5.0).at(same[:1]), atol=1e-5)


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("groups", [1, HEADS])
@pytest.mark.parametrize("at_once", [1, 7, 1024])
def test_products_with_the_rotated_bias(axes, groups, at_once, monkeypatch):
    monkeypatch.setattr(key_bias, "AT_ONCE", at_once)
    bias = qwen(40.0)
    if axes == 3:
        config = Qwen2_5_VLTextConfig(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        )
        rotary = modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding(config)
        bias = KeyBias(bias.bias, rotary, modeling_qwen2_5_vl.apply_rotary_pos_emb)
    positions = torch.randint(0, 500, (axes, 3, groups, 11), generator=torch.Generator().manual_seed(3))
    query = torch.randn(3, 3 * HEADS, 1, DIM)
    want = query.double() @ bias.at(positions).double().repeat_interleave(3, 1).mT
    assert torch.allclose(bias.logits(query, positions).double(), want[:, :, 0], atol=1e-4, rtol=1e-5)
    half = bias.logits(query.bfloat16(), positions)
    assert half.dtype == torch.float32
    assert torch.allclose(half, bias.logits(query.bfloat16().float(), positions))


def test_products_where_only_some_channels_turn():
    """As in models that rotate the first channels of a head, or pairs of neighbours."""

    def rotate(query, key, cos, sin):
        cos, sin = (x[:, None, :, :2].repeat_interleave(2, -1) for x in (cos, sin))
        a, b = key[..., :4], key[..., 4:]
        turned = torch.stack([-a[..., 1::2], a[..., ::2]], -1).flatten(-2)
        return query, torch.cat([a * cos + turned * sin, b], -1)

    config = Qwen2Config(hidden_size=16, num_attention_heads=4)
    bias = KeyBias(torch.randn(HEADS, DIM), modeling_qwen2.Qwen2RotaryEmbedding(config), rotate)
    positions, query = torch.randint(0, 90, (1, 2, 1, 5)), torch.randn(2, HEADS, 1, DIM)
    assert torch.allclose(bias.logits(query, positions), (query @ bias.at(positions).mT)[:, :, 0], atol=1e-5)


def test_no_bias_gives_the_same_codes():
    keys, values = draw(5, 60)
    bits = draw_bits(5, 40)
    none = KeyBias(torch.zeros(HEADS, DIM), qwen().rotary, qwen().rotate)
    with_, without = (stream(keys, values, 40, pad(bits, (0, 20)), key_bias=b) for b in (none, None))
    assert contents(with_) == contents(without)
    assert all(torch.equal(a, b) for a, b in zip(with_.dense(), without.dense(), strict=True))
    assert with_.nbytes == without.nbytes + 60 * 4 == held_bytes(with_)


@pytest.mark.parametrize("few", [2, 4, 8])
def test_a_large_bias_costs_no_precision(few):
    keys, values = draw(5, 60)
    bits, bias = torch.full((1, 1, 60), few, dtype=torch.int8), qwen(300.0)
    biased = keys + rotated_bias(bias.bias, torch.arange(60)).float()
    options = {"default": few}
    unbiased = stream(keys, values, 40, bits, **options)
    plain = sorted_dense(unbiased)[0] - keys
    factored = stream(biased, values, 40, bits, key_bias=bias, **options)
    error = sorted_dense(factored)[0] - biased
    naive = sorted_dense(stream(biased, values, 40, bits, **options))[0] - biased
    assert error.abs().max() < plain.abs().max() + 1e-2
    assert error.norm() < 1.02 * plain.norm() + 1e-2
    assert naive.norm() > 10 * plain.norm()
    assert [quantised(factored, 0, h) for h in range(HEADS)] == [quantised(unbiased, 0, h) for h in range(HEADS)]


def test_a_large_bias_follows_entries_of_every_head():
    """Heads hold other tokens in few bits; reordering, cropping and evicting keep keys and positions together."""
    keys, values = draw(5, 80, 2)
    bias = qwen(300.0)
    biased = keys + rotated_bias(bias.bias, torch.arange(80)).float()
    layer = prefill(biased[:, :, :50], values[:, :, :50], draw_bits(5, 50, 2), key_bias=bias)
    step(layer, biased[:, :, 50:], values[:, :, 50:], 6)
    layer.update(biased[:, :, :2], values[:, :, :2])
    layer.see_positions(torch.full((1, 2, 2), 999))
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([1, 0]))
    biased, values = biased.flip(0), values.flip(0)
    step(layer, biased[:, :, 56:], values[:, :, 56:], 24)
    evict(layer, (torch.rand(2, HEADS, layer.held) < 0.7) & (layer.slots.sizes > 0))
    slots = layer.slots
    index = slots.index.expand(-1, HEADS, -1).long()[..., None].expand(-1, -1, -1, DIM)
    off = (layer.dense()[0] - biased.gather(2, index)).abs().amax(-1)
    worst = 5.0 / 3 / 2 * 1.3  # half a step of 2 bits where keys are spread over 5
    assert off[(slots.sizes > 0).expand(-1, HEADS, -1)].max() < worst
    assert len(layer.stores) == 3


def test_scales_that_float16_cannot_hold():
    keys, values = (x * 3e5 for x in draw(1, 40))
    assert scale_dtype(keys) == torch.bfloat16
    layer = prefill(keys, values, torch.full((1, 1, 40), 8, dtype=torch.int8))
    got = sorted_dense(layer)
    assert got.isfinite().all()
    assert (got[0] - keys).abs().max() < 0.02 * keys.abs().max()
