"""Attention with a bias on the keys: the published values, duplicated keys, causality, shared heads, precisions, chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmaccel.kernels.key_bias_attention as module
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


@pytest.fixture(params=[True, False], ids=["products", "fused"])
def products(request, monkeypatch):
    """Both forms of full attention, whatever this processor is faster with."""
    monkeypatch.setattr(module, "products_are_faster", lambda dtype: request.param and dtype != torch.half)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_agrees_with_the_formula(dtype):
    @given(
        st.integers(1, 3),
        st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
        st.integers(1, 19),
        st.integers(1, 19),
        st.booleans(),
        st.sampled_from([4, 8, 72]),
        st.booleans(),
        st.booleans(),
    )
    def agrees(batch, heads, rows, keys, square, dim, biased, causal):
        rows = keys if square else rows
        generator = torch.Generator().manual_seed(batch + 3 * heads[0] + 11 * rows + 101 * keys)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        query, key, value = (
            draw(batch, heads[0], rows, dim),
            draw(batch, keys, heads[1], dim).transpose(1, 2),
            draw(batch, heads[1], keys, dim),
        )
        # of size 0: hidden
        bias = torch.randint(0, 9, (batch, keys), generator=generator).float().log() if biased else None
        got = key_bias_attention(query, key, value, bias, dim**-0.5, causal)
        want = reference(query.double(), key.double(), value.double(), bias, dim**-0.5, causal)
        assert got.dtype == dtype
        assert got.transpose(1, 2).is_contiguous()
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * max(1, want.abs().max())

    agrees()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_of_size_s_is_s_keys(dtype, causal):
    size = torch.tensor([1, 2, 4, 1, 1, 8])
    copies = torch.arange(6).repeat_interleave(size)
    last = size.cumsum(0) - 1  # the row of the last copy sees all of them
    query, key, value = (torch.randn(2, 3, 6, 8).to(dtype) for _ in range(3))
    got = key_bias_attention(query, key, value, size.float().log().expand(2, -1), 0.3, causal)
    want = key_bias_attention(query[:, :, copies], key[:, :, copies], value[:, :, copies], None, 0.3, causal)
    assert torch.allclose(got, want[:, :, last], atol=1e-6 if dtype == torch.float32 else 3e-2)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_sees_hidden_keys_only_is_zero(dtype, causal):
    query, key, value = (torch.randn(2, 3, 6, 8).to(dtype) for _ in range(3))
    bias = torch.zeros(2, 6)
    bias[0, :2], bias[1] = -torch.inf, -torch.inf
    got = key_bias_attention(query, key, value, bias, 0.3, causal)
    assert torch.isfinite(got).all()
    assert not got[1].any()
    assert got[0, :, :2].any() != causal
    assert got[0, :, 2:].any(-1).all()


def test_more_rows_than_keys():
    query, key, value = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    for bias in (None, torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])):
        got = key_bias_attention(query, key, value, bias, 0.3, True)
        assert not got[:, :, :3].any()
        assert torch.allclose(got[:, :, 3], value[:, :, 0])
        assert torch.allclose(got, reference(query, key, value, bias, 0.3, True), atol=1e-6)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_go_in_chunks_of_heads(dtype):
    query, key, value = (torch.randn(1, 5, 700, 16).to(dtype) for _ in range(3))
    assert CHUNK < 5 * 700 * 700
    bias = torch.rand(1, 700)
    got, want = key_bias_attention(query, key, value, bias, 0.25), reference(query, key, value, bias, 0.25)
    assert torch.allclose(got, want, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_is_an_operator(dtype, biased, causal):
    query, key, value = (torch.randn(2, 6, 4, 8).transpose(1, 2).to(dtype) for _ in range(3))
    bias = torch.rand(2, 6) if biased else None
    torch._dynamo.reset()
    for heads in (2, 4):
        args = (query, key[:, :heads], value[:, :heads], bias, 0.3, causal)
        torch.library.opcheck(key_bias_attention, args)
        compiled = torch.compile(lambda *x: key_bias_attention(*x, 0.3, causal), fullgraph=True, backend="eager")
        assert torch.equal(compiled(*args[:4]), key_bias_attention(*args))
