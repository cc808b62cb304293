"""Lists of blocks and columns against their definitions, pair by pair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.kernels.block_index import beside, computed_share, dense_mask, vertical_slash_index, with_all


@st.composite
def chosen(draw):
    """vertical, slash, rows, keys, block"""
    rows, block = draw(st.integers(1, 90)), draw(st.sampled_from([8, 16, 32]))
    keys = rows + draw(st.sampled_from([0, 0, 1, 16, 37]))
    lists = [
        torch.tensor(
            draw(st.lists(st.lists(st.integers(-1, keys - 1), min_size=n, max_size=n), min_size=6, max_size=6))
        )
        for n in (draw(st.integers(0, 8)), draw(st.integers(0, 4)))
    ]
    vertical, slash = (x.long().view(2, 3, x.shape[1]) for x in lists)
    return vertical, slash, rows, keys, block


def entries(lists):
    assert lists.dtype == torch.int32
    return [[[[x for x in one if x >= 0] for one in head] for head in sample] for sample in lists.tolist()]


def is_list(numbers):
    """Ascending, then -1."""
    there = [x for x in numbers if x >= 0]
    return there == sorted(set(there)) and numbers == there + [-1] * (len(numbers) - len(there))


@given(chosen())
def test_lists_hold_what_the_lines_cross(case):
    vertical, slash, rows, keys, block = case
    blocks, columns = vertical_slash_index(*case)
    assert blocks.shape[:3] == columns.shape[:3] == (2, 3, -(-rows // block))
    assert all(is_list(x) for lists in (blocks, columns) for x in lists.flatten(0, 2).tolist())
    listed, singles = entries(blocks), entries(columns)
    for b in range(2):
        for h in range(3):
            for i in range(-(-rows // block)):
                first = keys - rows + i * block
                last = min(first + block, keys) - 1
                met = {r - o for o in {0, *slash[b, h].tolist()} - {-1} for r in range(first, first + block)}
                want = {key // block for key in met if key >= 0 and key // block * block <= last}
                assert listed[b][h][i] == sorted(want)
                alone = {v for v in vertical[b, h].tolist() if 0 <= v <= last and v // block not in want}
                assert singles[b][h][i] == sorted(alone)
    # the widest list has no place to spare
    assert all(x.shape[3] == 0 or (x[..., -1] >= 0).any() for x in (blocks, columns))


@given(chosen())
def test_every_chosen_pair_and_every_own_key_is_seen(case):
    vertical, slash, rows, keys, block = case
    start = torch.zeros(2, dtype=torch.long)
    mask = dense_mask(*vertical_slash_index(*case), start, rows, keys, block)
    key, row = torch.arange(keys), torch.arange(keys - rows, keys)[:, None]
    causal = key <= row
    assert not (mask & ~causal).any()
    for b in range(2):
        for h in range(3):
            wanted = torch.isin(key, vertical[b, h]) | torch.isin(
                row - key, torch.cat([slash[b, h], torch.tensor([0])])
            )
            assert mask[b, h][wanted & causal].all()


def test_all_diagonals_or_all_keys_are_everything():
    for vertical, slash in ((range(50), ()), ((), range(50))):
        lines = [torch.tensor(list(x), dtype=torch.long).expand(1, 1, -1) for x in (vertical, slash)]
        lists = vertical_slash_index(*lines, 41, 50, 16)
        start = torch.zeros(1, dtype=torch.long)
        assert torch.equal(dense_mask(*lists, start, 41, 50, 16)[0, 0], torch.ones(41, 50).tril(9).bool())
        assert computed_share(*lists, start, 41, 50, 16).tolist() == [[1.0]]


@given(chosen(), st.booleans())
def test_share_counts_the_pairs_of_the_mask(case, padded):
    _, _, rows, keys, block = case
    lists = vertical_slash_index(*case)
    start = torch.tensor([keys // 3, keys - 1]) if padded else torch.zeros(2, dtype=torch.long)
    mask = dense_mask(*lists, start, rows, keys, block)
    key = torch.arange(keys)
    causal = (key <= key[keys - rows :, None]) & (key >= start[:, None, None])
    want = mask.sum((2, 3)) / causal.sum((1, 2))[:, None]
    assert torch.allclose(computed_share(*lists, start, rows, keys, block), want.float())


@given(chosen())
def test_some_heads_are_given_everything(case):
    _, _, rows, keys, block = case
    lists, start = vertical_slash_index(*case), torch.zeros(2, dtype=torch.long)
    heads = torch.tensor([[True, False, True], [False, False, True]])
    share = computed_share(*with_all(heads, *lists, keys, block), start, rows, keys, block)
    assert torch.equal(share, computed_share(*lists, start, rows, keys, block).masked_fill(heads, 1))


def test_share_of_a_long_prompt_does_not_overflow():
    n = 2**17
    blocks = torch.arange(n // 128, dtype=torch.int32).expand(1, 1, n // 128, -1)
    share = computed_share(blocks, blocks[..., :0], torch.zeros(1, dtype=torch.long), n, n, 128)
    assert share.item() == pytest.approx(1)


def test_mask_of_lists_by_hand():
    blocks = torch.tensor([[0, -1], [1, -1], [0, 2]]).int()[None, None]
    columns = torch.tensor([[-1], [1], [-1]]).int()[None, None]
    mask = dense_mask(blocks, columns, torch.tensor([0]), 5, 6, 2)[0, 0]
    assert mask.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    hidden = dense_mask(blocks, columns, torch.tensor([1]), 5, 6, 2)[0, 0]
    assert torch.equal(hidden, mask & (torch.arange(6) >= 1))


def test_what_is_beside_the_blocks():
    hit = torch.tensor([True, False, True])[None, None, None]
    columns = torch.tensor([-1, 0, 2, 2, 3, 4])[None, None, None]
    assert beside(hit, columns, 2)[0, 0, 0].tolist() == [False, False, True, False, True, False]
