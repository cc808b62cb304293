"""Attention over listed blocks and keys: the formula, dense attention where all is listed, padding, earlier turns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad, scaled_dot_product_attention

from tests.support.close import assert_close
from vlmaccel.kernels import block_gather
from vlmaccel.kernels import block_prefill as module
from vlmaccel.kernels.block_index import computed_share, dense_mask, vertical_slash_index
from vlmaccel.kernels.block_prefill import block_prefill, reference, where_it_pays

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.3


@pytest.fixture(autouse=True, params=[False, True], ids=["fused", "products"])
def form(request, monkeypatch):
    """What this processor is not faster with has to be right too."""
    monkeypatch.setattr(block_gather, "products_are_faster", lambda dtype, rows: request.param)


def draw(heads=(4, 2), rows=50, earlier=0, dim=16, batch=2, lines=(5, 2), block=16, padded=False, dtype=torch.float32,
         holes=False, seed=0):  # fmt: skip
    """query, key, value, blocks, columns, start, block. lines: keys and diagonals. holes: without each row's own block."""
    generator = torch.Generator().manual_seed(seed)
    keys = rows + earlier
    shapes = [(batch, heads[0], rows), (batch, heads[1], keys), (batch, heads[1], keys)]
    parts = [torch.randn(*shape, dim, generator=generator).to(dtype) for shape in shapes]
    vertical, slash = (torch.randint(-1, keys, (batch, heads[0], n), generator=generator) for n in lines)
    blocks, columns = vertical_slash_index(vertical, slash, rows, keys, block)
    if holes:
        own = (torch.arange(blocks.shape[2])[:, None] * block + earlier) // block
        blocks = blocks.masked_fill(blocks >= own, -1)
    start = torch.randint(0, keys, (batch,), generator=generator) if padded else torch.zeros(batch, dtype=torch.long)
    return *parts, blocks, columns, start, block


def golden(query, key, value, *rest):
    return reference(query.double(), key.double(), value.double(), *rest)


def all_blocks(query, key, block):
    """Lists that hold everything."""
    blocks = torch.arange(-(-key.shape[2] // block)).int()
    blocks = blocks.expand(*query.shape[:2], -(-query.shape[2] // block), -1)
    return blocks, blocks[..., :0]


cases = st.builds(
    draw,
    st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    st.integers(1, 90),
    st.sampled_from([0, 0, 5, 16, 40]),
    st.sampled_from([8, 24]),
    st.integers(1, 3),
    st.tuples(st.integers(0, 9), st.integers(0, 3)),
    st.sampled_from([16, 32]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 9),
)


@given(cases)
def test_agrees_with_the_formula(case):
    got = block_prefill(*case, SCALE)
    assert got.dtype == case[0].dtype
    assert got.transpose(1, 2).is_contiguous()
    assert_close(got, golden(*case, SCALE), steps=None if got.dtype == torch.float32 else 3)


@given(st.integers(1, 70), st.sampled_from([0, 3, 32]), st.sampled_from([16, 32]), st.booleans(), st.booleans())
def test_all_blocks_are_dense_attention(rows, earlier, block, singly, padded):
    query, key, value, *_, start, _ = draw(rows=rows, earlier=earlier, padded=padded)
    blocks, columns = all_blocks(query, key, block)
    if singly:  # each key by its own number
        blocks, columns = columns, torch.arange(rows + earlier).int().expand(*blocks.shape[:3], -1)
    mask = torch.ones(rows, rows + earlier).tril(earlier).bool() & (
        torch.arange(rows + earlier) >= start[:, None, None]
    )
    want = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=SCALE, enable_gqa=True)
    want = want.masked_fill(~mask.any(-1)[:, None, :, None], 0)
    got = block_prefill(query, key, value, blocks, columns, start, block, SCALE)
    assert torch.allclose(got, want, atol=2e-6)


@given(cases)
def test_a_batch_is_its_samples_and_padding_of_lists_is_nothing(case):
    query, key, value, blocks, columns, start, block = case
    tolerance = 1e-5 if query.dtype == torch.float32 else 4e-2
    want = block_prefill(*case, SCALE)
    longer = (pad(blocks, (0, 2), value=-1), pad(columns, (0, 3), value=-1))
    got = block_prefill(query, key, value, *longer, start, block, SCALE)
    assert torch.allclose(got, want, atol=tolerance)
    for b in range(len(query)):
        one = [x[b : b + 1] for x in case[:-1]]
        assert torch.allclose(block_prefill(*one, block, SCALE), want[b : b + 1], atol=tolerance)


@pytest.mark.parametrize("earlier", [0, 20])
def test_keys_of_padding_and_keys_that_are_not_listed_are_not_seen(earlier):
    *parts, blocks, columns, _, block = draw(rows=60, earlier=earlier)
    start = torch.tensor([0, 33])
    mask = dense_mask(blocks, columns, start, 60, 60 + earlier, block)
    want = block_prefill(*parts, blocks, columns, start, block, SCALE)
    assert torch.equal(want.abs().sum(-1) > 0, mask.any(-1))
    unseen = ~mask.unflatten(1, (2, 2)).any(2).any(2)[..., None]
    parts[1:] = [x.masked_fill(unseen, 1e4) for x in parts[1:]]
    assert torch.allclose(block_prefill(*parts, blocks, columns, start, block, SCALE), want, atol=1e-6)


def test_without_lists_all_is_zero():
    query, key, value, blocks, columns, start, block = draw()
    empty = (blocks[..., :0], columns[..., :0])
    assert not block_prefill(query, key, value, *empty, start, block, SCALE).any()


@pytest.mark.parametrize("gathered", [1, 4000, 20000])
def test_heads_go_in_parts(monkeypatch, gathered):
    monkeypatch.setattr(block_gather, "GATHERED", gathered)
    case = draw(heads=(6, 3), rows=100, batch=3, padded=True)
    assert_close(block_prefill(*case, SCALE), golden(*case, SCALE))


def test_memory_of_any_layout():
    *parts, blocks, columns, start, block = draw(rows=40)
    want = block_prefill(*parts, blocks, columns, start, block, SCALE)
    for change in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: pad(x, (1, 2))[..., 1:-2]):
        got = block_prefill(*map(change, parts), blocks, columns.long(), start, block, SCALE)
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("earlier", [0, 3])
def test_is_an_operator(dtype, earlier):
    case = draw(rows=20, earlier=earlier, dtype=dtype)
    torch.library.opcheck(block_prefill, (*case, SCALE))
    torch.library.opcheck(block_prefill, (case[0].mT.contiguous().mT, *case[1:], SCALE))


def test_compiles():
    case = draw(rows=40)
    compiled = torch.compile(lambda *args: block_prefill(*args, SCALE) * 2, fullgraph=True)
    assert torch.allclose(compiled(*case), block_prefill(*case, SCALE) * 2)


def test_what_would_be_slower_than_all_is_all(monkeypatch):
    *parts, blocks, columns, start, block = draw((4, 2), 200, lines=(20, 4), padded=True)
    share = computed_share(blocks, columns, start, 200, 200, block)
    limit = share.median().item()
    monkeypatch.setattr(block_gather, "pays_below", lambda dtype: limit)
    lists = where_it_pays(*parts[:2], blocks, columns, start, block)
    assert all(torch.equal(x, y) for x, y in zip(lists, (blocks, columns), strict=True))  # short
    monkeypatch.setattr(module, "SHORT", 200)
    lists = where_it_pays(*parts[:2], blocks, columns, start, block)
    now = computed_share(*lists, start, 200, 200, block)
    assert torch.equal(now, share.masked_fill(share > limit, 1))
    assert 0 < (now == 1).sum() < now.numel()
