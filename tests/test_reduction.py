"""Reduction against an obvious loop, and its invariants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.reduction import Insertion, Reduction, top_per_segment


@st.composite
def masks(draw):
    batch, n = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    rows = st.lists(st.booleans(), min_size=n, max_size=n)
    return torch.tensor([draw(rows) for _ in range(batch)])


@st.composite
def representatives(draw):
    """Every token points to a token that stands for itself, or is dropped."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    out = []
    for _ in range(batch):
        heads = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1)))
        choice = draw(st.lists(st.sampled_from([-1, *heads]), min_size=n, max_size=n))
        out.append([i if i in heads else choice[i] for i in range(n)])
    return torch.tensor(out)


@given(masks())
def test_select_keeps_what_is_wanted_in_order(wanted):
    reduction = Reduction.select(wanted)
    assert reduction.keep.shape[1] == int(wanted.sum(1).max())
    for b, row in enumerate(wanted):
        kept = reduction.keep[b][reduction.size[b] == 1].tolist()
        assert kept == row.nonzero().flatten().tolist()
        assert (reduction.keep[b].diff() > 0).all()
        for slot, token in enumerate(reduction.keep[b].tolist()):
            assert reduction.group[b, token] == (slot if row[token] else -1)
    assert ((reduction.group >= 0) == wanted).all()
    assert (reduction.size.sum(1) == wanted.sum(1)).all()


@given(representatives(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_merge_is_the_mean_of_its_members(representative, dtype):
    reduction = Reduction.merge_into(representative)
    x = torch.randn(*representative.shape, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    merged = reduction.apply(x)
    assert merged.dtype == dtype
    for b, row in enumerate(representative.tolist()):
        for slot, (token, size) in enumerate(zip(reduction.keep[b].tolist(), reduction.size[b].tolist(), strict=True)):
            members = [i for i, r in enumerate(row) if r == token]
            assert len(members) == size
            if size:
                assert torch.equal(reduction.group[b, members], torch.full((size,), slot))
                mean = x[b, members].float().mean(0)
                tolerance = 1e-6 if dtype == torch.float32 else 2e-2
                assert torch.allclose(merged[b, slot].float(), mean, atol=tolerance, rtol=tolerance)
            if size == 1:
                assert torch.equal(merged[b, slot], x[b, token])
    # sizes count every token that was not dropped, exactly once
    assert (reduction.size.sum(1) == (representative >= 0).sum(1)).all()


@given(representatives())
def test_unmerge_gives_members_their_group(representative):
    reduction = Reduction.merge_into(representative)
    slots = torch.arange(reduction.keep.shape[1]).float().expand(len(representative), -1)[..., None]
    spread = reduction.unmerge(slots)[..., 0]
    assert torch.equal(spread, torch.where(reduction.group >= 0, reduction.group, 0).float())


@given(masks(), st.data())
def test_then_is_one_after_the_other(wanted, data):
    first = Reduction.select(wanted)
    if first.keep.shape[1] == 0:
        return
    flags = st.lists(st.booleans(), min_size=first.keep.shape[1], max_size=first.keep.shape[1])
    second = Reduction.select(torch.tensor([data.draw(flags) for _ in wanted]) & (first.size > 0))
    both = first.then(second)
    x = torch.randn(*wanted.shape, 2)
    assert torch.equal(both.apply(x), second.apply(first.apply(x)))
    for b in range(len(wanted)):
        for token, slot in enumerate(both.group[b].tolist()):
            if slot >= 0:
                assert both.keep[b, slot] == token
    assert (both.size.sum(1) == (both.group >= 0).sum(1)).all()


def test_then_weighs_merges_by_size():
    first = Reduction.merge_into(torch.tensor([[0, 0, 0, 3]]))
    second = Reduction.merge_into(torch.tensor([[0, 0]]))
    both = first.then(second)
    assert both.size.tolist() == [[4]]
    assert both.group.tolist() == [[0, 0, 0, 0]]
    x = torch.tensor([[[1.0], [2.0], [3.0], [10.0]]])
    assert second.apply(first.apply(x), first.size).item() == pytest.approx(4.0)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 30), st.data())
def test_inserted_rows_come_behind_their_tokens(batch, n, count, seed, data):
    generator = torch.Generator().manual_seed(seed)
    behind = torch.randint(-1, n, (batch, count), generator=generator)
    x, rows = torch.randn(batch, n, 2, generator=generator), torch.randn(batch, count, 2, generator=generator)
    hidden, reduction = Insertion(behind, rows).into(x)
    for b in range(batch):
        expected, keep = [], []
        for token in range(n):
            expected += [x[b, token], *(rows[b, r] for r in range(count) if behind[b, r] == token)]
            keep += [token] * (len(expected) - len(keep))
        fillers = int((behind[b] < 0).sum())
        assert torch.equal(hidden[b, fillers:], torch.stack(expected))
        assert reduction.keep[b, fillers:].tolist() == keep
        assert reduction.size[b].tolist() == [0] * fillers + [1] * len(keep)
        assert torch.equal(hidden[b, reduction.group[b]], x[b])
    assert (reduction.inserted.sum(1) == (behind >= 0).sum(1)).all()
    assert (reduction.keep.diff() >= 0).all()
    flags = st.lists(st.booleans(), min_size=n + count, max_size=n + count)
    wanted = torch.tensor([data.draw(flags) for _ in range(batch)]) & (reduction.size > 0)
    left = reduction.then(Reduction.select(wanted))
    for b in range(batch):
        mine = left.size[b] > 0
        assert left.keep[b, mine].tolist() == reduction.keep[b, wanted[b]].tolist()
        assert left.inserted[b, mine].tolist() == reduction.inserted[b, wanted[b]].tolist()
        assert (left.own[b] | left.inserted[b]).tolist() == mine.tolist()
        for token, slot in enumerate(reduction.group[b].tolist()):
            assert (left.group[b, token] >= 0) == wanted[b, slot]
    assert torch.equal(left.size.sum(1), wanted.sum(1))


def test_identity_changes_nothing():
    x = torch.randn(2, 5, 3)
    identity = Reduction.identity(2, 5)
    assert torch.equal(identity.apply(x), x)
    assert torch.equal(identity.unmerge(x), x)


@given(st.integers(1, 3), st.integers(0, 12), st.integers(1, 3), st.integers(0, 4), st.integers(0, 3))
def test_top_per_segment_is_a_sort_by_hand(batch, n, segments, budget, ties):
    generator = torch.Generator().manual_seed(n + 7 * ties)
    score = torch.randint(0, 4, (batch, n), generator=generator).float()  # many ties on purpose
    segment = torch.randint(-1, segments, (batch, n), generator=generator)
    marked = top_per_segment(score, segment, torch.full((batch, segments), budget))
    for b in range(batch):
        for s in range(segments):
            mine = [i for i in range(n) if segment[b, i] == s]
            best = sorted(mine, key=lambda i: (-score[b, i].item(), i))[:budget]
            assert [i for i in mine if marked[b, i]] == sorted(best)
    assert not (marked & (segment < 0)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_per_segment_is_the_same_in_every_precision(dtype):
    score = (torch.randperm(64, generator=torch.Generator().manual_seed(0)) / 64).expand(2, -1)
    segment = torch.arange(64).div(32, rounding_mode="floor").expand(2, -1)
    budget = torch.tensor([[5, 9], [1, 0]])
    assert torch.equal(top_per_segment(score.to(dtype), segment, budget), top_per_segment(score, segment, budget))
