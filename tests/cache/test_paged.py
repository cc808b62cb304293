"""The paged cache layer alone: its bounds, what it chooses, what that costs, and the page table under every operation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.cache import PrunedLayer, Slots
from vlmaccel.cache.paged import PagedLayer
from vlmaccel.reduction import Reduction

SCALE = 8**-0.5


def filled(n, batch=2, heads=2, dim=8, padding=None, seed=0, wide=1.0, **options):
    """A paged layer with n random entries, and its query maker."""
    generator = torch.Generator().manual_seed(seed)
    layer = PrunedLayer()
    keys, values = (torch.randn(batch, heads, n, dim, generator=generator) * wide for _ in range(2))
    layer.expect(Slots(torch.arange(n).expand(batch, 1, n)), n)
    layer.update(keys, values)
    return PagedLayer.of(layer, padding, **{"page": 4, "budget": 12, **options})


def query_of(layer, groups=2, seed=1):
    batch, heads, _, dim = layer.keys.shape
    return torch.randn(batch, heads * groups, 1, dim, generator=torch.Generator().manual_seed(seed)) * 2


def logits_of(layer, query):
    return query.reshape(*layer.keys.shape[:2], -1, query.shape[3]) @ layer.keys.mT * SCALE


@torch.no_grad()
def append(layer, seed=2, n=1):
    batch, heads, _, dim = layer.keys.shape
    x = torch.randn(2, batch, heads, n, dim, generator=torch.Generator().manual_seed(seed))
    layer.announce_attend(layer.padding)
    return layer.update(x[0], x[1])


def assert_table_is_fresh(layer):
    """The page table is what a new one would be, and the last page of it where a sample has fewer is not looked at."""
    again = PagedLayer(layer.page, layer.budget)
    again.__dict__.update({k: v for k, v in vars(layer).items() if k in vars(PrunedLayer())})
    again._room = None
    again.build()
    mine, fresh = layer.bounds(query_of(layer), SCALE), again.bounds(query_of(layer), SCALE)
    number = torch.arange(mine.shape[3])
    last = torch.as_tensor(layer._last())
    there = (number <= last[..., None, None]) if last.ndim else number <= last
    assert torch.equal(mine[there.expand_as(mine)], fresh[there.expand_as(mine)])


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 100), st.floats(0.1, 30))
def test_no_logit_is_over_the_bound_of_its_page(n, page, seed, wide):
    layer = filled(n, page=page, seed=seed, wide=wide)
    query = query_of(layer, seed=seed + 1)
    logits, bounds = logits_of(layer, query), layer.bounds(query, SCALE)
    assert bounds.shape[-1] == math.ceil(n / page)
    for p in range(bounds.shape[-1]):
        most = logits[..., p * page : (p + 1) * page].amax(-1)
        assert (bounds[..., p] >= most - 1e-5 * (1 + most.abs())).all()


def test_the_table_is_a_sixteenth_of_the_cache():
    layer = filled(64, page=16, budget=48)
    table = layer.nbytes - layer.keys.nbytes - layer.values.nbytes - layer.slots.nbytes
    assert table == (layer.keys.nbytes + layer.values.nbytes) / 16
    assert filled(64, page=16, budget=48, exact=True).nbytes == layer.nbytes - table


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("group", ["max", "union"])
def test_what_is_left_out_bounds_the_error(group, exact):
    layer = filled(50, group=group, exact=exact, budget=16)
    append(layer)
    query = query_of(layer)
    token, seen = layer.choose(query, SCALE)
    share = logits_of(layer, query).softmax(-1)
    chosen = torch.zeros(2, 2, 51, dtype=torch.int).scatter_add(2, token, seen.int()).bool()
    dropped = (share * ~chosen[:, :, None]).sum(-1)
    dense, sparse = PrunedLayer.attend(layer, query, SCALE), layer.attend(query, SCALE)
    error = (dense - sparse).view(2, 2, 2, 8).norm(dim=-1)
    assert (error <= 2 * dropped * layer.values.norm(dim=-1).amax(-1)[..., None] + 1e-5).all()
    assert chosen[..., -1].all() or exact  # the newest page
    counts = chosen.sum(2)
    assert (counts <= 16).all() if group == "max" else ((counts <= 32) & (counts > 12)).all()
    kept = torch.where(chosen[:, :, None], logits_of(layer, query), -torch.inf).softmax(-1)
    assert torch.allclose(sparse.view(2, 2, 2, 8), kept @ layer.values, atol=1e-6)


def test_exact_reads_the_highest_logits_and_pages_the_highest_bounds():
    layer, exact = filled(60), filled(60, exact=True)
    query = query_of(layer, groups=1)
    best = logits_of(layer, query)[:, :, 0].topk(12).indices.sort(2).values
    assert torch.equal(exact.choose(query, SCALE)[0].sort(2).values, best)
    bounds = layer.bounds(query, SCALE)[:, :, 0]
    bounds[..., -1] = torch.inf
    pages = bounds.topk(3).indices.sort(2).values
    token, seen = layer.choose(query, SCALE)
    assert seen.all()
    assert torch.equal(token[..., ::4].sort(2).values, pages * 4)


def test_one_vector_added_to_all_keys_changes_no_choice():
    layer, moved = filled(60), filled(60)
    moved.keys = moved.keys + torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(9))
    moved.build()
    query = query_of(layer, groups=1)  # with several heads the maximum over them need not move alike
    assert torch.equal(layer.choose(query, SCALE)[0], moved.choose(query, SCALE)[0])


@pytest.mark.parametrize("budget", [1.0, 60, 57])
def test_a_budget_for_everything_reads_as_ever(budget):
    layer = filled(60, budget=budget)
    assert not layer.reduced
    assert torch.equal(layer.attend(query_of(layer), SCALE), PrunedLayer.attend(layer, query_of(layer), SCALE))


def test_three_pages_at_least_and_ratios_grow_with_the_cache():
    assert filled(13, budget=1).reduced
    assert not filled(12, budget=1).reduced
    layer = filled(40, budget=0.5)
    assert layer.choose(query_of(layer), SCALE)[0].shape[2] == 20
    for i in range(8):
        append(layer, i)
    assert layer.choose(query_of(layer), SCALE)[0].shape[2] == 24


def test_the_page_table_follows_every_operation():
    layer = filled(18)
    for i in range(30):
        append(layer, i)
        assert_table_is_fresh(layer)
    append(layer, 40, n=6)
    assert_table_is_fresh(layer)
    layer.crop(-7)
    assert (layer.held, layer.get_seq_length()) == (47, 47)
    assert_table_is_fresh(layer)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_repeat_interleave(2)
    append(layer, 41)
    assert_table_is_fresh(layer)
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert_table_is_fresh(layer)
    layer.reset()
    assert layer.nbytes == 0
    assert layer.slots is None
    append_first = torch.zeros(1, 2, 1, 8)
    layer.update(append_first, append_first)
    assert layer.pages[0].shape == (1, 2, 1, 8)


def test_heads_that_hold_different_entries():
    layer = filled(40)
    wanted = (
        torch.rand(4, 40, generator=torch.Generator().manual_seed(3)) < torch.tensor([0.05, 0.9, 0.5, 0.7])[:, None]
    )
    layer.reduce(Reduction.select(wanted))
    for i in range(6):
        append(layer, i)
        assert_table_is_fresh(layer)
    layer.build()
    sizes = layer.slots.sizes
    assert (sizes.diff(dim=2) >= 0).all()  # fillers first
    query = query_of(layer)
    token, seen = layer.choose(query, SCALE)
    assert (sizes.gather(2, token)[seen] == 1).all()
    assert (seen.sum(2) == torch.minimum(sizes.sum(2), seen.sum(2))).all()
    every = filled(40, budget=10**6)
    every.reduce(Reduction.select(wanted))
    for i in range(6):
        append(every, i)
    few = (sizes.sum(2) <= 12).repeat_interleave(2, 1)  # heads with no more entries than are read
    assert few.any()
    assert not few.all()
    assert torch.allclose(layer.attend(query, SCALE)[few], every.attend(query, SCALE)[few], atol=1e-6)


def test_padding_does_not_move_pages():
    padding = torch.zeros(2, 47, dtype=torch.bool)
    padding[1, :7] = True
    layer = filled(47, padding=padding, budget=0.3)
    alone = filled(47, budget=0.3)
    alone.batch_select_indices(torch.tensor([1]))
    alone.reduce(Reduction.select(~padding[1:]))
    query = query_of(layer)
    for i in range(5):
        x = torch.randn(2, 2, 2, 1, 8, generator=torch.Generator().manual_seed(i))
        padding = torch.nn.functional.pad(padding, (0, 1))
        with torch.no_grad():
            layer.announce_attend(padding)
            layer.update(x[0], x[1])
            alone.announce_attend(None)
            alone.update(x[0, 1:], x[1, 1:])
        assert torch.allclose(layer.attend(query, SCALE)[1:], alone.attend(query[1:], SCALE), atol=1e-6)


def test_sizes_count_in_the_choice():
    layer = PrunedLayer()
    keys = torch.zeros(1, 1, 40, 8)
    keys[..., 0] = torch.arange(40) % 7 * 0.01
    layer.expect(Slots(torch.arange(40).expand(1, 1, 40)), 40)
    layer.update(keys, torch.randn(keys.shape, generator=torch.Generator().manual_seed(0)))
    into = torch.arange(40)
    into[4:8] = 4
    layer.reduce(Reduction.merge_into(into[None]), prop_attn=True)
    layer = PagedLayer.of(layer, None, page=4, budget=12)
    query = torch.ones(1, 1, 1, 8)
    token, _ = layer.choose(query, SCALE)
    assert 4 in token[0, 0]
    logits = logits_of(layer, query) + layer.slots.sizes.log()[:, :, None]
    most = torch.nn.functional.pad(logits, (0, 3), value=-torch.inf).unflatten(3, (10, 4)).amax(4)
    assert (layer.bounds(query, SCALE) >= most - 1e-6).all()


def test_a_step_that_reads_everything_is_said():
    layer = filled(40)
    x = torch.zeros(2, 2, 1, 8)
    with torch.no_grad(), pytest.warns(UserWarning, match="reads the whole KV cache"):
        keys, _ = layer.update(x, x)
    assert keys.shape[2] == 41


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_half_precision_and_inference_mode(dtype):
    with torch.inference_mode():
        layer = PrunedLayer()
        layer.update(*torch.randn(2, 2, 2, 40, 8, generator=torch.Generator().manual_seed(0)).to(dtype))
        layer = PagedLayer.of(layer, None, page=4, budget=12)
        layer.announce_attend(None)
        layer.update(*torch.randn(2, 2, 2, 1, 8, generator=torch.Generator().manual_seed(1)).to(dtype))
    for i in range(3):  # outside of inference mode now
        x = torch.randn(2, 2, 2, 1, 8, generator=torch.Generator().manual_seed(i)).to(dtype)
        with torch.no_grad():
            layer.announce_attend(None)
            layer.update(x[0], x[1])
    high, low = layer.pages
    assert high.dtype == dtype

    for p in range(11):
        keys = layer.keys[:, :, p * 4 : p * 4 + 4]
        assert torch.equal(high[:, :, p], keys.amax(2))
        assert torch.equal(low[:, :, p], keys.amin(2))
    query = query_of(layer).to(dtype)
    assert layer.attend(query, SCALE).dtype == dtype
