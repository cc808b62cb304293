"""The low-rank cache layer alone: errors against theory, bytes, appending, and what happens to it in a cache's life."""

import pytest
import torch
from torch.nn.functional import pad

from vlmaccel.cache import PrunedLayer, Slots
from vlmaccel.cache.low_rank import BLOCK, Factor, LowRankLayer
from vlmaccel.reduction import Reduction

SCALE = 8**-0.5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(n, rank_keys=None, rank_values=4, batch=2, heads=2, window=8, behind=0, real=None, seed=0, **options):
    """A layer of n random entries of 8 channels, some of which hold most; with its plain twin."""
    layer, twin = PrunedLayer(), PrunedLayer()
    channels = torch.logspace(0, -1, 8)
    keys, values = (random(batch, heads, n, 8, seed=seed + i) * channels for i in range(2))
    for each in (layer, twin):
        each.expect(Slots(torch.arange(n).expand(batch, 1, n)), n)
        each.update(keys, values)
    real = torch.ones(batch, 1, n, dtype=torch.bool) if real is None else real
    layer = LowRankLayer.of(layer, window)
    layer.fit(rank_keys, rank_values, real, behind, **options)
    return layer, twin


@torch.no_grad()
def append(layers, seed, n=1, attending=True):
    for layer in layers:
        if attending:
            layer.announce_attend(layer.padding)
        x = random(2, *layer.keys.shape[:2], n, 8, seed=100 + seed)
        layer.update(x[0], x[1])


def attention(layer, query):
    """From `dense`, in plain words."""
    keys, values = layer.dense()
    sizes = layer.slots.sizes
    logits = query.unflatten(1, (keys.shape[1], -1)).squeeze(3) @ keys.mT * SCALE
    logits = logits.masked_fill((sizes == 0)[:, :, None], -torch.inf)
    return (logits.softmax(-1) @ values).flatten(1, 2)[:, :, None]


def test_the_error_is_that_of_eckart_and_young():
    x = random(2, 3, 30, 8).double()
    real = torch.ones(2, 1, 30, dtype=torch.bool)
    singular = torch.linalg.svdvals(x)
    errors = [float((Factor.fit(x, real, r).dense() - x).square().sum()) for r in range(1, 9)]
    best = [float(singular[..., r:].square().sum()) for r in range(1, 9)]
    assert errors == pytest.approx(best, rel=1e-4, abs=1e-8)
    assert errors == sorted(errors, reverse=True)


def test_a_metric_makes_the_least_error_in_it():
    x = random(1, 2, 50, 8).double()
    real = torch.ones(1, 1, 50, dtype=torch.bool)
    query = random(1, 2, 40, 8, seed=3).double() * torch.logspace(-1, 1, 8)

    def error(factor):
        return float((query @ (factor.dense() - x).mT).square().sum())

    metric = query.mT @ query
    plain, aware = Factor.fit(x, real, 3), Factor.fit(x, real, 3, metric)
    half = torch.linalg.cholesky(metric)
    best = float(torch.linalg.svdvals(x @ half)[..., 3:].square().sum())
    assert best * 0.999 <= error(aware) < 1.05 * best
    assert error(aware) < 0.5 * error(plain)
    again = aware.latent.shape[2]
    aware.append(x[:, :, :5])
    assert torch.allclose(aware.latent[:, :, again:], aware.latent[:, :, :5])


def test_padding_does_not_bend_the_basis():
    x = random(2, 2, 30, 8)
    x[1, :, :7] = 1e4
    real = torch.ones(2, 1, 30, dtype=torch.bool)
    real[1, :, :7] = False
    together = Factor.fit(x, real, 4).dense()[1:, :, 7:]
    alone = Factor.fit(x[1:, :, 7:], torch.ones(1, 1, 23, dtype=torch.bool), 4).dense()
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("ranks", [(8, 8), (None, 8), (8, None)])
def test_full_rank_is_exact(ranks):
    layer, twin = filled(40, *ranks)
    for i in range(40):
        append((layer, twin), i)
        query = random(2, 4, 1, 8, seed=i)
        assert torch.allclose(layer.attend(query, SCALE), twin.attend(query, SCALE), atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(layer.dense(), twin.dense(), strict=True))
    assert torch.equal(layer.slots.index, twin.slots.index)


@pytest.mark.parametrize("ranks", [(3, 4), (None, 4), (3, None)])
def test_attention_in_coordinates_is_that_of_what_they_stand_for(ranks):
    layer, _ = filled(40, *ranks, gain=1.5 if ranks[0] else 1.0)
    for i in range(30):
        append((layer,), i)
        query = random(2, 4, 1, 8, seed=i)
        assert torch.allclose(layer.attend(query, SCALE), attention(layer, query), atol=1e-5)


def test_new_entries_are_exact_in_the_window_and_then_projected():
    layer, twin = filled(20, 4, 4, window=8)
    for i in range(8 + BLOCK):
        append((layer, twin), i)
    latent = {name: factor.latent.clone() for name, factor in layer.factors.items()}
    assert all(torch.equal(a[:, :, 20:], b[:, :, 20:]) for a, b in zip(layer.dense(), twin.dense(), strict=True))
    append((layer, twin), 99)
    assert layer.keys.shape[2] == layer.values.shape[2] == 9
    for name, exact in (("keys", twin.keys), ("values", twin.values)):
        factor = layer.factors[name]
        assert factor.latent.shape[2] == 20 + BLOCK
        assert torch.equal(factor.latent[:, :, :20], latent[name])  # what was in coordinates is not touched
        old = exact[:, :, 20 : 20 + BLOCK]
        assert torch.allclose(factor.dense()[:, :, 20:], old @ factor.into @ factor.into.mT, atol=1e-5)
        assert torch.equal(getattr(layer, name), exact[:, :, 20 + BLOCK :])


def test_without_attend_everything_comes_back():
    layer, twin = filled(20, 8, 8)
    x = random(2, 2, 2, 5, 8)
    for tokens in (x[:, :, :, :1], x):
        mine, other = layer.update(tokens[0], tokens[1]), twin.update(tokens[0], tokens[1])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, other, strict=True))
    assert layer.get_seq_length() == 26


def held(layer):
    """Every tensor of numbers in it."""
    seen = {layer.keys.data_ptr(): layer.keys.nbytes, layer.values.data_ptr(): layer.values.nbytes}
    for space in layer._space.values():
        seen[space.data_ptr()] = space.nbytes
    for factor in layer.factors.values():
        seen |= {x.data_ptr(): x.nbytes for x in (factor.latent, factor.into, factor.out)}
    return sum(seen.values())


def test_bytes_are_those_of_the_formula():
    layer, twin = filled(100, 3, 2)
    index = layer.slots.nbytes
    assert layer.nbytes == held(layer) + index == 4 * 2 * 2 * (3 + 2) * (100 + 8) + index
    assert filled(100, None, 4)[0].nbytes == 4 * 2 * 2 * (100 * 8 + 4 * (100 + 8)) + index
    assert twin.nbytes == 4 * 2 * 2 * 2 * 100 * 8 + index
    eye = torch.eye(8).expand(1, 2, 8, 8)
    assert filled(100, None, 4, metrics=(eye, eye))[0].nbytes == 4 * 2 * 2 * (100 * 8 + 4 * (100 + 16)) + index
    for i in range(40):
        append((layer,), i)
    assert layer.nbytes == held(layer) + layer.slots.nbytes


def test_batch_operations_and_reset():
    layer, twin = filled(20, 8, 8)
    for i in range(30):
        append((layer, twin), i)
    for each in (layer, twin):
        each.reorder_cache(torch.tensor([1, 0]))
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([3, 0, 1]))
    append((layer, twin), 31)
    query = random(3, 4, 1, 8)
    assert torch.allclose(layer.attend(query, SCALE), twin.attend(query, SCALE), atol=1e-5)
    assert layer.factors["keys"].out is layer.factors["keys"].into
    layer.reset()
    assert (layer.slots, layer.nbytes, layer.held, layer.reduced) == (None, 0, 0, False)
    x = random(1, 2, 4, 8)
    assert torch.equal(layer.update(x, x)[0], x)


@pytest.mark.parametrize("ranks", [(8, 8), (None, 8), (8, None)])
def test_crop_within_the_window(ranks):
    layer, twin = filled(20, *ranks)
    for i in range(8 + BLOCK + 3):
        append((layer, twin), i)
    for each in (layer, twin):
        each.crop(-6)
    append((layer, twin), 50)
    query = random(2, 4, 1, 8)
    assert torch.allclose(layer.attend(query, SCALE), twin.attend(query, SCALE), atol=1e-5)
    assert layer.get_seq_length() == twin.get_seq_length() == 20 + 8 + BLOCK - 2
    with pytest.raises(ValueError, match="larger window"):
        layer.crop(-10)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)


def test_what_is_behind_the_prompt_can_be_taken_back():
    layer, _ = filled(20, 4, 4, behind=3)
    layer.crop(-3)
    assert layer.held == layer.factors["keys"].latent.shape[2] == 17


@pytest.mark.parametrize("ranks", [(8, 8), (None, 8), (8, None)])
@pytest.mark.parametrize("heads", [1, 2])
def test_eviction_from_coordinates_and_window(ranks, heads):
    layer, twin = filled(20, *ranks)
    for i in range(5):
        append((layer, twin), i)
    wanted = torch.rand(2 * heads, 25, generator=torch.Generator().manual_seed(3)) < 0.5
    for each in (layer, twin):
        each.notes["index"] = each.slots.index.clone()
        each.reduce(Reduction.select(wanted))
    append((layer, twin), 9)
    sizes, index = layer.slots.sizes, layer.slots.index
    assert torch.equal(sizes.sum(2), twin.slots.sizes.sum(2))
    assert torch.equal(layer.notes["index"], index[:, :, :-1])
    for row in range(2 * heads):
        b, h = divmod(row, heads)
        assert index[b, h][sizes[b, h] > 0].tolist() == [*wanted[row].nonzero().flatten().tolist(), 25]
    query = random(2, 4, 1, 8)
    assert torch.allclose(layer.attend(query, SCALE), twin.attend(query, SCALE), atol=1e-5)
    assert torch.allclose(layer.attend(query, SCALE), attention(layer, query), atol=1e-5)


def test_entries_of_reduced_rank_do_not_merge():
    layer, _ = filled(4, 4, 4)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        layer.reduce(Reduction.merge_into(torch.tensor([[0, 0, 2, 3]] * 2)))


def test_left_padding_is_not_seen():
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[1, :6] = True
    layer, twin = filled(20, 4, 4, real=~padding[:, None])
    other, _ = filled(20, 4, 4, real=~padding[:, None])
    other.reduce(Reduction.select(~padding))
    query = random(2, 4, 1, 8)
    for i in range(3):
        padding = pad(padding, (0, 1))
        layer.padding = twin.padding = padding
        append((layer, other), i)
        assert torch.allclose(layer.attend(query, SCALE), other.attend(query, SCALE), atol=1e-5)


def test_a_second_fit_takes_what_there_is():
    layer, twin = filled(20, 8, 4)
    append((layer, twin), 0, n=12, attending=False)
    before = layer.dense()
    layer.fit(8, 4, torch.ones(2, 1, 32, dtype=torch.bool))
    assert torch.allclose(layer.dense()[0], before[0], atol=1e-5)
    value = torch.linalg.svdvals(before[1])[..., 4:].square().sum()
    assert float((layer.dense()[1] - before[1]).square().sum()) == pytest.approx(float(value), rel=1e-3)
    assert (layer.held, layer.keys.shape[2]) == (32, 0)


def test_half_precision_and_inference_mode():
    with torch.inference_mode():
        layer, twin = filled(40, 5, 5)
        half = LowRankLayer.of(PrunedLayer(), 8)
        half.update(*(x.bfloat16() for x in (twin.keys, twin.values)))
        half.fit(5, 5, torch.ones(2, 1, 40, dtype=torch.bool))
        append((layer,), 0)
        x = random(2, 2, 2, 1, 8, seed=100).bfloat16()
        half.announce_attend(None)
        half.update(x[0], x[1])
    append((layer,), 1)  # outside of inference mode now
    with torch.no_grad():
        x = random(2, 2, 2, 1, 8, seed=101).bfloat16()
        half.announce_attend(None)
        half.update(x[0], x[1])
        query = random(2, 4, 1, 8)
        assert torch.allclose(half.attend(query.bfloat16(), SCALE).float(), layer.attend(query, SCALE), atol=0.03)
