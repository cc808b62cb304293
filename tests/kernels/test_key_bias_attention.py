"""Attention with a bias on the keys: the published values, duplicated keys, precisions, chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmaccel.kernels.key_bias_attention  # noqa: F401
from tests.kernels.test_bipartite_match import published
from vlmaccel.kernels.key_bias_attention import CHUNK, key_bias_attention, reference

# largest error allowed, in units of the largest output; bfloat16 rounds the logits themselves
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def test_published_values():
    query, value = published(3, 4)[None, None], torch.eye(3, dtype=torch.double)[None, None]
    key, size = 0.5 * query + 0.1, torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.double)
    want = [[0.274143, 0.524829, 0.201028], [0.131593, 0.600393, 0.268014], [0.086364, 0.459220, 0.454416]]
    plain = [[0.498805, 0.318310, 0.182886], [0.282551, 0.429714, 0.287734], [0.185075, 0.328029, 0.486896]]
    got = key_bias_attention(query, key, value, size.log(), 0.5)[0, 0]
    assert torch.allclose(got, torch.tensor(want, dtype=torch.double), atol=1e-6)
    got = key_bias_attention(query, key, value, None, 0.5)[0, 0]
    assert torch.allclose(got, torch.tensor(plain, dtype=torch.double), atol=1e-6)


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 19),
    st.integers(1, 19),
    st.sampled_from([4, 8, 72]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
)
def test_agrees_with_the_formula(batch, heads, rows, keys, dim, dtype, biased):
    generator = torch.Generator().manual_seed(batch + 3 * heads + 11 * rows + 101 * keys)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    query, key, value = (
        draw(batch, heads, rows, dim),
        draw(batch, keys, heads, dim).transpose(1, 2),
        draw(batch, heads, keys, dim),
    )
    bias = torch.randint(1, 9, (batch, keys), generator=generator).float().log() if biased else None
    got = key_bias_attention(query, key, value, bias, dim**-0.5)
    want = reference(query.double(), key.double(), value.double(), bias, dim**-0.5)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * max(1, want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_of_size_s_is_s_keys(dtype):
    query, key, value = (torch.randn(2, 3, 6, 8).to(dtype) for _ in range(3))
    size = torch.tensor([1, 2, 4, 1, 1, 8])
    copies = torch.arange(6).repeat_interleave(size)
    got = key_bias_attention(query, key, value, size.float().log().expand(2, -1), 0.3)
    want = key_bias_attention(query, key[:, :, copies], value[:, :, copies], None, 0.3)
    assert torch.allclose(got, want, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_go_in_chunks_of_heads(dtype):
    query, key, value = (torch.randn(1, 5, 700, 16).to(dtype) for _ in range(3))
    assert CHUNK < 5 * 700 * 700
    bias = torch.rand(1, 700)
    got, want = key_bias_attention(query, key, value, bias, 0.25), reference(query, key, value, bias, 0.25)
    assert torch.allclose(got, want, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_is_an_operator(dtype, biased):
    query, key, value = (torch.randn(2, 6, 3, 8).transpose(1, 2).to(dtype) for _ in range(3))
    bias = torch.rand(2, 6) if biased else None
    torch.library.opcheck(key_bias_attention, (query, key, value, bias, 0.3))
