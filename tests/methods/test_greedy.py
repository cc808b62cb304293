"""Methods that pick tokens one after the other before the decoder, and EVS for videos."""

import itertools

import pytest
import torch

import vlmaccel
from tests.support import models
from vlmaccel.methods import EVS, CDPruner, DivPrune, VisPruner, cdpruner
from vlmaccel.methods.cdpruner import from_0_to_1, largest_determinant
from vlmaccel.methods.divprune import most_unlike
from vlmaccel.methods.evs import change
from vlmaccel.methods.greedy import cosines
from vlmaccel.run import Modality


def waves(tokens, channels=4):
    """G(t, c) of the original code's golden values."""
    i, j = torch.arange(tokens)[:, None].double(), torch.arange(channels).double()
    return torch.sin(1.3 * i + 0.7 * j + 0.1 * i * j)


@pytest.mark.parametrize(
    ("tokens", "kept", "order"),
    [(8, 4, [3, 1, 0, 2]), (8, 8, [3, 1, 0, 2, 7, 4, 5, 6]), (12, 3, [3, 1, 0])],
)
def test_divprune_picks_what_the_original_code_picks(tokens, kept, order):
    assert most_unlike(waves(tokens), kept).tolist() == order


def test_divprune_counts_like_the_original_code():
    counts = [int(DivPrune().count(torch.tensor([n]), ratio)) for n, ratio in ((576, 0.098), (2880, 0.098), (5, 0.5))]
    assert counts == [56, 282, 2]
    assert int(DivPrune().count(torch.tensor([5]), 0.1)) == 1  # where it would keep nothing


@pytest.mark.parametrize("x", [torch.ones(6, 3), torch.zeros(6, 3), torch.eye(6)[[0, 0, 1, 1, 2, 2]]])
@pytest.mark.parametrize("kept", [1, 3, 6])
def test_nothing_is_picked_twice(x, kept):
    for order in (most_unlike(x, kept), largest_determinant(cosines(x), kept, torch.ones(6))):
        assert len(set(order.tolist())) == kept


def test_cdpruner_picks_greedily_the_largest_determinant():
    kernel = cosines(waves(7, 5)).double() + 1e-3 * torch.eye(7).double()
    order: list[int] = []
    for _ in range(4):
        worth = {i: torch.linalg.det(kernel[[*order, i]][:, [*order, i]]) for i in range(7) if i not in order}
        order.append(max(worth, key=worth.get))
    assert largest_determinant(kernel, 4, torch.ones(7)).tolist() == order


@pytest.mark.parametrize("candidates", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("rank", [5, 300])
def test_cdpruner_picks_the_same_from_few_candidates(monkeypatch, candidates, rank):
    """As one pick after the other, each with the rows of all tokens, would."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(90, rank, generator=generator).double() @ torch.randn(rank, 300, generator=generator).double()
    x[40:50] = x[30:40]
    r = torch.rand(90, generator=generator).double()
    kernel, gain, order = r[:, None] * cosines(x).double() * r, r.square(), []
    for _ in range(min(rank, 60)):
        order.append(int(gain.argmax()))
        chosen = kernel[order]
        gain = r.square() - (chosen * torch.linalg.solve(chosen[:, order], chosen)).sum(0)
        gain[order] = -torch.inf
    monkeypatch.setattr(cdpruner, "CANDIDATES", candidates)
    assert largest_determinant(kernel, 60, r).tolist()[: len(order)] == order


@pytest.mark.parametrize("candidates", [1, 2, 3, 9])
def test_cdpruner_breaks_ties_by_index_among_few_candidates_too(monkeypatch, candidates):
    monkeypatch.setattr(cdpruner, "CANDIDATES", candidates)
    assert largest_determinant(torch.eye(9), 7, torch.ones(9)).tolist() == list(range(7))
    gain = torch.tensor([1.0, 2, 1, 2, 2, 1, 2, 1, 2])
    assert largest_determinant(gain.diag(), 9, gain).tolist() == [1, 3, 4, 6, 8, 0, 2, 5, 7]


@pytest.mark.parametrize("candidates", [1, 2, 256])
def test_cdpruner_goes_on_by_relevance_where_the_rank_ends(monkeypatch, candidates):
    monkeypatch.setattr(cdpruner, "CANDIDATES", candidates)
    kernel = cosines(torch.eye(3).repeat(2, 1))  # rank 3 of 6
    order = largest_determinant(kernel, 5, torch.tensor([0.0, 0, 0, 1, 3, 2])).tolist()
    assert sorted(order[:3]) == [0, 1, 2] and order[3:] == [4, 5]


def test_relevance_is_from_0_to_1_within_an_image():
    assert from_0_to_1(torch.tensor([-3.0, 1, 5])).tolist() == pytest.approx([0, 0.5, 1], abs=1e-5)
    assert from_0_to_1(torch.full((3,), 2.0)).tolist() == [1, 1, 1]


def test_relevance_moves_the_choice_towards_the_text():
    kind = "llava-clip-llama"
    model, batch, kept = models.build(kind), models.inputs(kind, 1), {}
    for relevance in ("like", "unlike", "none"):
        with vlmaccel.patched(model, CDPruner(ratio=0.3, relevance=relevance)), torch.no_grad():
            model(**batch)
            kept[relevance] = tuple(vlmaccel.stats(model).stages[0].keep[0].tolist())
    assert len(set(kept.values())) > 1


def test_evs_ranks_by_the_change_since_the_frame_before():
    frames = torch.randn(3, 4, 8)
    frames[1, 2] = frames[0, 2]
    frames[2, 1] = -frames[1, 1]
    grid = torch.tensor(list(itertools.product(range(3), range(2), range(2))))
    unlike = change(frames.flatten(0, 1), grid)
    assert bool(unlike[:4].isinf().all())
    assert float(unlike[6]) == pytest.approx(0, abs=1e-6) and float(unlike[9]) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.7, 1.0])
@torch.no_grad()
def test_evs_keeps_the_first_frame_and_drops_from_videos_only(ratio):
    kind = "qwen2-vl"
    model, batch = models.build(kind), models.inputs(kind, 3, pad=True, video=True)
    plain = model(**batch).logits
    with vlmaccel.patched(model, EVS(ratio=ratio)):
        logits, stats = model(**batch).logits, vlmaccel.stats(model)
    tokens = stats.token_map
    video = tokens.modality == Modality.VIDEO
    assert bool(video.any())
    if ratio == 1:
        assert torch.equal(logits, plain) and not stats.stages
        return
    keep, size = stats.stages[0].keep, stats.stages[0].size
    left = torch.zeros_like(video).scatter(1, keep, size > 0)
    assert bool(left[(tokens.modality != Modality.PAD) & ~video].all())
    assert bool(left[video & (tokens.grid[..., 0] == 0)].all())
    n, first = int(video.sum()), int((video & (tokens.grid[..., 0] == 0)).sum())
    assert int((left & video).sum()) == max(first, int(n * ratio))


@pytest.mark.parametrize("ratio", [0.2, 0.6])
@pytest.mark.parametrize("method", [DivPrune, CDPruner, VisPruner])
@torch.no_grad()
def test_frames_of_a_video_are_picked_from_one_by_one(method, ratio):
    model, batch = models.build("qwen2-vl"), models.inputs("qwen2-vl", 3, pad=True, video=True)
    picks, pick = [], method.pick

    class Watched(method):
        def pick(self, at, sample, index, kept):
            order = pick(self, at, sample, index, kept)
            picks.append((sample, index.tolist(), order.tolist()))
            return order

    with vlmaccel.patched(model, Watched(ratio=ratio)):
        model(**batch)
        stats = vlmaccel.stats(model)
    tokens, stage = stats.token_map, stats.stages[0]
    video = tokens.modality == Modality.VIDEO
    (sample,) = video.any(1).nonzero().flatten().tolist()
    kept = set(stage.keep[sample][stage.size[sample] > 0].tolist())
    frame = tokens.grid[sample, :, 0]
    mine = [(index, order) for which, index, order in picks if which == sample and bool(video[sample][index].all())]
    assert len(mine) == frame[video[sample]].unique().numel() > 1
    assert all(frame[index].unique().numel() == 1 for index, _ in mine)
    assert sorted(itertools.chain(*(index for index, _ in mine))) == video[sample].nonzero().flatten().tolist()
    counts = [len(kept & set(index)) for index, _ in mine]
    assert sum(counts) == int(method(ratio=ratio).count(video.sum(), ratio)) and max(counts) - min(counts) <= 1
    for (index, order), count in zip(mine, counts, strict=True):
        assert kept & set(index) == {index[i] for i in order[:count]}  # the first that were picked


@pytest.mark.parametrize(
    ("method", "options", "allowed"),
    [
        (CDPruner, {"relevance": "some"}, "relevance must be one of 'like', 'unlike', 'none'"),
        (EVS, {"target": "text"}, "ranks the tokens of videos"),
        (DivPrune, {"ratio": 2}, "a number from 0 to 1, not 2"),
    ],
)
def test_bad_options_are_refused(method, options, allowed):
    with pytest.raises(ValueError, match=allowed):
        method(**options)
