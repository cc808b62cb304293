"""Groups of entries in few bits: streams equal blocks, ragged samples, freed groups, error, bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.memory import held_bytes
from vlmaccel.cache import Slots
from vlmaccel.cache.store import Store, channels_of
from vlmaccel.kernels.quantize_pack import scale_dtype

HEADS, DIM, GROUP = 2, 8, 4


def draw(seed, batch, n, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, HEADS, n, dim, generator=generator).unbind(0)


def queries(batch):
    """Mean and variance."""
    generator = torch.Generator().manual_seed(9)
    return 3 * torch.randn(batch, HEADS, DIM, generator=generator), torch.rand(batch, HEADS, DIM, generator=generator)


def made(keys, values, slots=None, bits=4, dtype=torch.float16, asked=None):
    batch, _, n, _ = keys.shape
    slots = Slots(torch.arange(n).expand(batch, 1, n).int()) if slots is None else slots
    return Store.make(bits, GROUP, keys, values, slots, dtype, asked)


def groups_of(store, b, h):
    """What head h of sample b holds, group by group and to the bit, without the fillers at the end."""
    g = min(h, store.slots.index.shape[1] - 1)
    out = []
    for i, (index, size) in enumerate(
        zip(store.slots.index[b, g].split(store.group), store.slots.sizes[b, g].split(store.group), strict=True)
    ):
        if bool((size > 0).any()):
            parts = tuple(str(x[b, h, i].tolist()) for x in (*store.keys, *store.values))
            out.append((tuple(index.tolist()), tuple(size.tolist()), *parts))
    return out


def all_groups(store, batch):
    return [groups_of(store, b, h) for b in range(batch) for h in range(HEADS)]


@given(st.sampled_from([2, 4, 8]), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_each_value_is_within_half_a_step(bits, groups, batch, seed):
    keys, values = draw(seed, batch, groups * GROUP)
    store = made(keys, values, bits=bits)
    got_keys, got_values = store.dense(torch.float32)
    for x, got, inner, count in ((keys, got_keys, 2, GROUP), (values, got_values, 3, channels_of(DIM, GROUP))):
        grouped = x.unflatten(inner, (-1, count))
        step = (grouped.amax(inner + 1) - grouped.amin(inner + 1)) / (2**bits - 1)
        step = step.repeat_interleave(count, inner)
        assert ((x - got).abs() <= step * 0.501 + 0.003).all()
    assert store.keys[0].shape == (batch, HEADS, groups, GROUP, DIM * bits // 8)
    assert store.keys[1].shape == (batch, HEADS, groups, 1, DIM)
    assert store.values[1].shape == (batch, HEADS, groups, GROUP, DIM // GROUP)


def test_keys_share_a_scale_along_tokens_and_values_along_channels():
    keys, values = draw(0, 1, 2 * GROUP)
    keys[..., 3] *= 1000  # one wide channel
    values[:, :, 5] *= 1000  # one wide token
    got_keys, got_values = made(keys, values, bits=8).dense(torch.float32)
    others = torch.arange(DIM) != 3
    assert (got_keys - keys)[..., others].abs().max() < 0.02
    others = torch.arange(2 * GROUP) != 5
    assert (got_values - values)[:, :, others].abs().max() < 0.02


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.sampled_from([2, 4, 8]), st.booleans())
def test_appending_is_making_all_at_once(counts, bits, by_query):
    keys, values = draw(1, 2, sum(counts) * GROUP)
    index = torch.arange(sum(counts) * GROUP).expand(2, 1, -1).int()
    asked = queries(2) if by_query else None
    whole = made(keys, values, bits=bits, asked=asked)
    parts = zip(*(x.split([c * GROUP for c in counts], 2) for x in (keys, values, index)), strict=True)
    stores = [made(k, v, Slots(i), bits, asked=asked) for k, v, i in parts]
    store = stores[0]
    for new in stores[1:]:
        before = all_groups(store, 2)
        store.append(new)
        assert [now[: len(old)] for now, old in zip(all_groups(store, 2), before, strict=True)] == before
    assert all_groups(store, 2) == all_groups(whole, 2)
    assert all(torch.equal(a, b) for a, b in zip(store.dense(torch.float), whole.dense(torch.float), strict=True))


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=2, max_size=4))
def test_ragged_samples_and_heads_are_as_if_alone(rounds):
    """counts[b * HEADS + h] groups come in for a head at every append, fillers behind them."""
    want = [[] for _ in range(4)]
    store, start = None, 0
    for number, counts in enumerate(rounds):
        most = max(counts)
        if most == 0:
            continue
        keys, values = draw(number, 2, most * GROUP)
        index = start + torch.arange(most * GROUP).expand(2, HEADS, -1)
        size = torch.arange(most * GROUP) < GROUP * torch.tensor(counts).view(2, HEADS, 1)
        new = made(keys, values, Slots(index.int(), size.int()))
        for i, mine in enumerate(all_groups(new, 2)):
            assert len(mine) == counts[i]
            want[i] += mine
        start += most * GROUP
        if store is None:
            store = new
            store.compact()
        else:
            store.append(new)
        assert all_groups(store, 2) == want
        # no more memory than the head that has most needs
        assert store.keys[0].shape[2] == store.slots.index.shape[2] // GROUP == max(map(len, want))


def test_keys_in_2_bits_are_rounded_by_the_queries():
    keys, values = draw(5, 2, 8 * GROUP)
    asked = queries(2)
    for bits in (2, 4, 8):
        plain, by_query = made(keys, values, bits=bits), made(keys, values, bits=bits, asked=asked)
        assert all(torch.equal(a, b) for a, b in zip(plain.values, by_query.values, strict=True))
        assert [x.shape for x in plain.keys] == [x.shape for x in by_query.keys]
        off = [
            ((store.dense(torch.float32)[0] - keys) * asked[0][:, :, None]).sum(-1).square().mean()
            for store in (plain, by_query)
        ]
        assert off[1] < 0.5 * off[0] if bits == 2 else off[1] == off[0]


def test_compact_frees_groups_of_which_nothing_is_left():
    keys, values = draw(2, 2, 4 * GROUP)
    size = torch.ones(2, 1, 4 * GROUP, dtype=torch.int32)
    size[0, 0, GROUP : 2 * GROUP] = 0
    size[1, 0, :GROUP] = 0
    size[1, 0, 3 * GROUP :] = 0
    size[0, 0, 1] = 0  # one gone of a group that stays
    store = made(keys, values, Slots(torch.arange(4 * GROUP).expand(2, 1, -1).int(), size))
    before, nbytes = all_groups(store, 2), store.nbytes
    store.compact()
    assert all_groups(store, 2) == before
    assert store.keys[0].shape[2] == 3
    assert store.nbytes * 4 == nbytes * 3
    assert store.slots.index[0, 0, ::GROUP].tolist() == [0, 2 * GROUP, 3 * GROUP]
    assert store.slots.index[1, 0, : 2 * GROUP : GROUP].tolist() == [GROUP, 2 * GROUP]
    store.slots = Slots(store.slots.index, torch.zeros_like(store.slots.index))
    store.compact()
    assert store.nbytes == 0 and store.dense(torch.float32)[0].shape == (2, HEADS, 0, DIM)


def test_map_moves_whole_samples():
    keys, values = draw(3, 3, 2 * GROUP)
    size = torch.ones(3, 1, 2 * GROUP, dtype=torch.int32)
    size[1, 0, GROUP:] = 0
    store = made(keys, values, Slots(torch.arange(2 * GROUP).expand(3, 1, -1).int(), size))
    before = [[groups_of(store, b, h) for h in range(HEADS)] for b in range(3)]
    store.map(lambda x: x.index_select(0, torch.tensor([1, 1, 0])))
    assert [[groups_of(store, b, h) for h in range(HEADS)] for b in range(3)] == [before[1], before[1], before[0]]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (1.0, 3e5),
        (3e5, 1.0),
    ],
)
def test_groups_of_very_different_size_in_one_store(first, then):
    """Scales that do not fit in float16 come behind ones that are in it, and the other way round."""
    store = None
    for number, spread in enumerate((first, then)):
        keys, values = (x * spread for x in draw(number, 1, GROUP))
        new = made(keys, values, Slots(number * GROUP + torch.arange(GROUP)[None, None]), 4, scale_dtype(keys))
        store = new if store is None else (store.append(new), store)[1]
    got = store.dense(torch.float32)[0]
    for number, spread in enumerate((first, then)):
        keys = draw(number, 1, GROUP)[0] * spread
        mine = got[:, :, number * GROUP : (number + 1) * GROUP]
        step = (keys.amax(2, keepdim=True) - keys.amin(2, keepdim=True)) / 15
        # a scale in bfloat16 is wrong by up to 2^-9 of itself, at most 15 times
        assert ((mine - keys).abs() <= step * (0.5 + 15 * 2**-8) + keys.abs().amax(2, keepdim=True) * 2**-8).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes(bits):
    keys, values = draw(4, 2, 6 * GROUP)
    store = made(keys, values, bits=bits)
    entries = 2 * HEADS * 6 * GROUP
    per_entry = 2 * DIM * bits / 8 + 4 * DIM / GROUP + 4 * DIM / GROUP
    assert store.nbytes == entries * per_entry + 4 * 2 * 6 * GROUP
    # the index was given for all samples at once, and is counted as if each had its own
    store.slots = store.slots.map(torch.clone)
    assert store.nbytes == held_bytes(store)


@given(st.integers(1, 300), st.integers(1, 300))
def test_channels_that_share_a_scale(dim, group):
    n = channels_of(dim, group)
    assert dim % n == 0 and n <= group
    assert not any(dim % more == 0 for more in range(n + 1, min(dim, group) + 1))
