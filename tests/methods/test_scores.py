"""The kept tokens of each method against scores worked out by hand from the reference decoder."""

import pytest
import torch

import vlmaccel
from tests.support.drops import policy
from tests.support.models import build, inputs
from tests.support.reference import Reference
from vlmaccel.flops import count_flops
from vlmaccel.methods import AttentionSum, FastV, Magnitude, NeighbourCosine, Pool, PyramidDrop, Random, Uniform
from vlmaccel.methods.baselines import SPREAD
from vlmaccel.methods.pool import coarse_grid

VLM = "llava-clip-llama"
KINDS = ("llava-clip-llama", "llava-clip-qwen2", "qwen2-vl", "qwen3-vl", "qwen3", "mistral-sliding")
kinds = pytest.mark.parametrize("kind", KINDS)


def stats_of(model, batch, method):
    with vlmaccel.patched(model, method), torch.no_grad():
        model(**batch)
        return vlmaccel.stats(model)


def kept_of(stats, b, mask):
    """Stages of sample b: {layer: kept indices}, counted without padding."""
    start = int((mask[b] == 0).sum())
    return {s.layer: (s.keep[b][s.size[b] > 0] - start).tolist() for s in stats.stages}


def droppable(stats, b, mask):
    """Segments of sample b as lists of indices counted without padding: its pictures, or its prompt text."""
    start, tokens = int((mask[b] == 0).sum()), stats.token_map
    pictures = int(tokens.image.max()) + 1
    if pictures:
        return [(tokens.image[b] == i).nonzero().flatten().sub(start).tolist() for i in range(pictures)]
    return [list(range(1, len(mask[b]) - start - 1))]


def best(score, rows, segments, counts):
    """What stays of `rows`: all outside the segments, and of each the best by `score` (aligned with rows)."""
    place = {row: j for j, row in enumerate(rows)}
    stays = set(rows) - {i for s in segments for i in s}
    for segment, count in zip(segments, counts, strict=True):
        left = [i for i in segment if i in place]
        stays |= set(sorted(left, key=lambda i: (-score[place[i]].item(), i))[:count])
    return sorted(stays)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@kinds
def test_pyramiddrop_ranks_by_each_stages_own_attention(kind, positions):
    model, batch, positions = build(kind), inputs(kind, 3, pad=True), policy(kind, positions)
    method = PyramidDrop(ratio=0.6, layers=(1, 3, 4), positions=positions)
    stats, reference = stats_of(model, batch, method), Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        segments = droppable(stats, b, batch["attention_mask"])
        schedule = {}
        for layer, ratio in method.stages(6).items():
            trace = reference.run(embeds, schedule, positions)
            row = reference.attention(trace, layer)[-1]
            counts = [max(1, int(len(s) * ratio)) for s in segments]
            schedule[layer] = best(row, trace.rows[layer].tolist(), segments, counts)
        assert kept_of(stats, b, batch["attention_mask"]) == schedule


@kinds
def test_fastv_ranks_by_the_layer_before(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    stats, reference = stats_of(model, batch, FastV(layer=3, ratio=0.5)), Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        segments = droppable(stats, b, batch["attention_mask"])
        row = reference.attention(reference.run(embeds), 2)[-1]
        counts = [max(1, round(len(s) * 0.5)) for s in segments]
        assert kept_of(stats, b, batch["attention_mask"])[3] == best(row, range(len(embeds)), segments, counts)


@kinds
@pytest.mark.parametrize("batch", [1, 3], ids=["without a mask", "padded"])
def test_attention_sum_is_the_mean_over_rows_that_can_see(kind, batch):
    model, batch = build(kind), inputs(kind, batch, pad=batch > 1)
    stats, reference = stats_of(model, batch, AttentionSum(layer=2, ratio=0.5)), Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        segments = droppable(stats, b, batch["attention_mask"])
        trace, n = reference.run(embeds), len(embeds)
        total = sum(reference.attention(trace, k).sum(0) for k in (0, 1)) / torch.arange(n, 0, -1)
        counts = [max(1, len(s) // 2) for s in segments]
        assert kept_of(stats, b, batch["attention_mask"])[2] == best(total, range(n), segments, counts)


@pytest.mark.parametrize("kind", ["llava-clip-llama", "qwen2-vl", "qwen3"])
@torch.no_grad()
def test_attention_sum_costs_no_more_than_one_product_of_queries_and_keys(kind):
    """What the layer's attention has worked out, projections and the rows' log-sum-exp, is not worked out again."""
    model, batch = build(kind), inputs(kind, 1)
    plain = count_flops(lambda: model(**batch))
    with vlmaccel.patched(model, AttentionSum(layer=5, ratio=0.5)):
        model(**batch)
        stats, flops = vlmaccel.stats(model), count_flops(lambda: model(**batch))
    config = model.config.get_text_config()
    n, after = stats.tokens[0], stats.tokens[5]
    heads, dim = (
        config.num_attention_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    # the sixth layer's own saving: projections, MLP and attention of the rows that are gone
    with vlmaccel.patched(model, Uniform(layer=5, ratio=0.5)):
        model(**batch)
        assert vlmaccel.stats(model).tokens[5] == after
        fewer = plain - count_flops(lambda: model(**batch))
    assert flops == plain - fewer + 5 * 2 * heads * dim * n * n


@kinds
def test_magnitude_is_the_norm_of_the_layers_input(kind):
    model, batch = build(kind), inputs(kind, 3, pad=True)
    stats, reference = stats_of(model, batch, Magnitude(layer=2, ratio=0.5)), Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        segments = droppable(stats, b, batch["attention_mask"])
        norm = reference.run(embeds).inputs[2].norm(dim=1)
        counts = [max(1, len(s) // 2) for s in segments]
        assert kept_of(stats, b, batch["attention_mask"])[2] == best(norm, range(len(embeds)), segments, counts)


def test_neighbour_cosine_is_the_mean_over_the_window():
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    stats, reference = stats_of(model, batch, NeighbourCosine(layer=1, ratio=0.5)), Reference(model)
    for b, embeds in enumerate(reference.embed(batch)):
        segments = droppable(stats, b, batch["attention_mask"])
        x = torch.nn.functional.normalize(reference.run(embeds).inputs[1], dim=1)
        redundancy = torch.zeros(len(embeds), dtype=torch.float64)
        for segment in segments:
            for j, i in enumerate(segment):
                near = [
                    segment[k] for k in range(9) if k != j and abs(k // 3 - j // 3) <= 1 and abs(k % 3 - j % 3) <= 1
                ]
                redundancy[i] = torch.stack([x[i] @ x[k] for k in near]).mean()
        counts = [max(1, len(s) // 2) for s in segments]
        want = best(-redundancy, range(len(embeds)), segments, counts)
        assert kept_of(stats, b, batch["attention_mask"])[1] == want


def test_neighbour_cosine_keeps_the_odd_one_out():
    """On text: a token unlike its neighbours outlives the ones in a run of equals."""
    model = build("llama")
    ids = torch.tensor([[1, 9, 9, 9, 9, 50, 9, 9, 9, 9, 3]])
    stats = stats_of(model, {"input_ids": ids}, NeighbourCosine(layer=0, ratio=0.12))
    assert stats.stages[0].keep.tolist() == [[0, 5, 10]]


def test_random_depends_on_the_seed_only():
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    first = [stats_of(model, batch, Random(seed=s, ratio=0.5)).stages[0].keep for s in (0, 0, 1)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_uniform_leaves_no_hole():
    """A quarter of a 24 x 24 grid: no patch is further than two from a kept one, in either direction."""
    row, column = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    places = torch.stack([row.flatten(), column.flatten()], 1)
    score = -((places[:, 0].double() * SPREAD[1] + places[:, 1].double() * SPREAD[0]) % 1)
    kept = places[score.argsort(descending=True, stable=True)[:144]]
    distance = (places[:, None] - kept[None]).abs().amax(-1).amin(1)
    assert distance.max() <= 2
    for half in (places[:, 0] < 12, places[:, 1] < 12):
        inside = (distance[half] == 0).sum()
        assert 66 <= inside <= 78


def test_uniform_over_text_is_even():
    model = build("llama")
    stats = stats_of(model, {"input_ids": torch.randint(2, 90, (1, 34))}, Uniform(ratio=0.25))
    gaps = stats.stages[0].keep[0].diff()
    assert gaps.max() <= 8


def test_pool_averages_cells_of_the_grid():
    model, batch = build(VLM), inputs(VLM, 3, pad=True)
    stats = stats_of(model, batch, Pool(layer=0, ratio=0.5))
    reduction, tokens = stats.stages[0], stats.token_map
    for b in range(3):
        for i in range(int(tokens.image[b].max()) + 1):
            here = (tokens.image[b] == i).nonzero().flatten()
            groups = reduction.group[b, here]
            cells = sorted((groups == g).nonzero().flatten().tolist() for g in groups.unique())
            assert cells == [[0, 1, 3, 4], [2, 5], [6, 7], [8]]  # 3 x 3 patches in at most 4 cells: 2 x 2


@pytest.mark.parametrize(
    ("height", "width", "kept", "grid"),
    [(24, 24, 288, (16, 18)), (24, 24, 144, (12, 12)), (24, 24, 64, (8, 8)), (1, 10, 4, (1, 4)), (3, 3, 1, (1, 1))],
)
def test_coarse_grid_is_near_in_count_and_shape(height, width, kept, grid):
    assert sorted(coarse_grid(height, width, kept)) == sorted(grid)


def test_published_counts():
    n = torch.tensor([576, 2880])
    stages = PyramidDrop().stages(32)
    assert list(stages) == [8, 16, 24]
    counts = [PyramidDrop().count(n, ratio).tolist() for ratio in stages.values()]
    assert counts == [[288, 1440], [144, 720], [72, 360]]
    kept = (288, 192, 171, 64, 30)
    assert [int(FastV().count(n[:1], k / 576)) for k in kept] == list(kept)
    means = [(2 * 576 + 30 * k) / 32 for k in kept]
    assert [round(m) for m in means] == [306, 216, 196, 96, 64]
    assert FastV().count(torch.tensor([5, 7]), 0.5).tolist() == [2, 4]  # halves go to the even neighbour


def test_pyramiddrop_in_training_averages_over_the_ends_of_all_prompts():
    """Labels mark two answers: the tokens just before them rank, each as much as the other."""
    model = build("llama")
    ids = torch.randint(2, 90, (1, 16), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :9] = labels[:, 11:13] = -100
    method = PyramidDrop(ratio=0.5, layers=(2,))
    reference = Reference(model)
    rows = reference.attention(reference.run(reference.words(ids[0])), 2)[[8, 12]].mean(0)
    want = best(rows, range(16), [list(range(1, 8))], [3])
    with vlmaccel.patched(model, method):
        loss = model(input_ids=ids, labels=labels).loss
        assert vlmaccel.stats(model).stages[0].keep[0].tolist() == want
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_a_dropped_token_with_a_label_is_an_error():
    model = build("llama")
    ids = torch.randint(2, 90, (1, 16))
    with vlmaccel.patched(model, "random", ratio=0.2), pytest.raises(ValueError, match="label"):
        model(input_ids=ids, labels=ids)
