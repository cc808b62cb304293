"""Attention among chosen tokens: the formula, plain attention where all are chosen, ragged batches, earlier turns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad, scaled_dot_product_attention

from tests.support.close import assert_close
from vlmaccel.kernels.places import places
from vlmaccel.kernels.token_prefill import CHUNK, reference, token_prefill

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.3


def draw(heads=(4, 2), rows=19, earlier=0, dim=16, batch=2, share=0.5, dtype=torch.float32, seed=0):
    """query, key, value, tokens"""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads[0], rows), (batch, heads[1], rows + earlier), (batch, heads[1], rows + earlier)]
    parts = [torch.randn(*shape, dim, generator=generator).to(dtype) for shape in shapes]
    return *parts, places(torch.rand(batch, rows + earlier, generator=generator) < share)


def golden(query, key, value, *rest):
    return reference(query.double(), key.double(), value.double(), *rest)


cases = st.builds(
    draw,
    st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    st.integers(1, 40),
    st.sampled_from([0, 0, 5, 2 * CHUNK]),
    st.sampled_from([8, 24]),
    st.integers(1, 3),
    st.sampled_from([0, 0.1, 0.5, 1]),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)


@given(cases)
def test_agrees_with_the_formula(case):
    got = token_prefill(*case, SCALE)
    assert got.dtype == case[0].dtype
    assert got.transpose(1, 2).is_contiguous()
    assert_close(got, golden(*case, SCALE), steps=None if got.dtype == torch.float32 else 3)


def test_by_hand():
    query = torch.zeros(1, 1, 3, 2)
    value = torch.tensor([[1.0, 0], [5, 5], [0, 1], [0, 3]])[None, None]
    out = token_prefill(query, torch.zeros(1, 1, 4, 2), value, torch.tensor([[0, 2, 3]]), SCALE)
    assert torch.allclose(out[0, 0], torch.tensor([[0, 0], [1 / 2, 1 / 2], [1 / 3, 4 / 3]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_tokens_are_plain_attention_to_the_bit(dtype):
    query, key, value, tokens = draw(rows=300, share=1, dtype=dtype)
    want = scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
    assert torch.equal(token_prefill(query, key, value, tokens, SCALE), want)
    tokens[1, 200:] = -1
    got = token_prefill(query, key, value, tokens, SCALE)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :, 200:], torch.zeros_like(got[1, :, 200:]))


@pytest.mark.parametrize("rows", [1, CHUNK, 2 * CHUNK + 1])
def test_all_tokens_with_earlier_ones(rows):
    query, key, value, tokens = draw(rows=rows, earlier=7, share=1)
    mask = torch.ones(rows, rows + 7).tril(7).bool()
    want = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True)
    assert torch.allclose(token_prefill(query, key, value, tokens, SCALE), want, atol=2e-6)


@given(cases)
def test_a_batch_is_its_samples_and_padding_is_nothing(case):
    *parts, tokens = case
    want = token_prefill(*case, SCALE)
    assert torch.equal(token_prefill(*parts, pad(tokens, (0, 3), value=-1), SCALE), want)
    for b in range(len(tokens)):
        one = [x[b : b + 1] for x in parts]
        assert torch.equal(token_prefill(*one, tokens[b : b + 1], SCALE), want[b : b + 1])


def test_what_is_not_chosen_is_not_read():
    query, key, value, tokens = draw(rows=30, share=0.5)
    left_out = torch.ones(2, 30, dtype=torch.bool)
    for b in range(2):
        left_out[b, tokens[b][tokens[b] >= 0]] = False
    hole = left_out[:, None, :, None]
    poisoned = [x.masked_fill(hole, torch.nan) for x in (query, key, value)]
    assert torch.equal(token_prefill(*poisoned, tokens, SCALE), token_prefill(query, key, value, tokens, SCALE))


@pytest.mark.parametrize("earlier", [0, 9])
def test_memory_of_any_layout(earlier):
    case = draw(rows=21, earlier=earlier)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case[:3]]
    want = token_prefill(*case, SCALE)
    assert torch.allclose(token_prefill(*by_token, case[3], SCALE), want, atol=1e-6)
    wider = [pad(x, (1, 2))[..., 1:-2] for x in case[:3]]
    assert torch.allclose(token_prefill(*wider, case[3], SCALE), want, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("earlier", [0, 3])
def test_is_an_operator(dtype, earlier):
    torch.library.opcheck(token_prefill, (*draw(rows=5, earlier=earlier, dtype=dtype), SCALE))
    query, key, value, tokens = draw(rows=5, earlier=earlier, dtype=dtype)
    torch.library.opcheck(token_prefill, (query.mT.contiguous().mT, key, value, tokens, SCALE))


def test_compiles():
    case = draw(rows=11)
    compiled = torch.compile(lambda *args: token_prefill(*args, SCALE) * 2, fullgraph=True)
    assert torch.allclose(compiled(*case), token_prefill(*case, SCALE) * 2)
