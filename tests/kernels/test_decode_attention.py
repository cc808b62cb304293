"""Attention of one new token over a cache: the formula, grouped heads, biases, hidden keys."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.kernels.decode_attention import decode_attention, reference

# largest error allowed, in units of the largest output
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))


@pytest.fixture(autouse=True, params=[False, True], ids=["no tiles", "tiles"])
def processor(request, monkeypatch):
    """The form for the other kind of processor has to be right too."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param)


def draw(seed, batch, kv_heads, ratio, m, dim, dtype):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * ratio, 1, dim, generator=generator)
    key, value = torch.randn(2, batch, kv_heads, m, dim, generator=generator)
    return [x.to(dtype) for x in (query, key, value)]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 7]),
    st.integers(1, 40),
    st.sampled_from([4, 8, 64]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from(["none", "shared", "per head"]),
)
def test_agrees_with_the_formula(batch, kv_heads, ratio, m, dim, dtype, kind):
    query, key, value = draw(m + 50 * batch, batch, kv_heads, ratio, m, dim, dtype)
    bias = None
    if kind != "none":
        groups = 1 if kind == "shared" else kv_heads
        generator = torch.Generator().manual_seed(m)
        bias = torch.randint(1, 9, (batch, groups, m), generator=generator).float().log()
        hidden = torch.rand(bias.shape, generator=generator) < 0.3
        hidden[..., -1] = False  # the new token sees itself
        bias = bias.masked_fill(hidden, -math.inf)
    got = decode_attention(query, key, value, bias, dim**-0.5)
    want = reference(query.double(), key.double(), value.double(), bias, dim**-0.5)
    assert got.shape == query.shape and got.dtype == dtype
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * max(1, want.abs().max())


def test_the_formula_by_hand():
    query, key = torch.tensor([[[[1.0]], [[2.0]]]]), torch.tensor([[[[0.0], [math.log(3)]]]])
    value = torch.tensor([[[[1.0], [5.0]]]])
    out = decode_attention(query, key, value, torch.tensor([[[math.log(3), 0.0]]]), 1.0)
    # weights 3 and 3; then 3 and 9
    assert out.flatten().tolist() == pytest.approx([3.0, 4.0])


@dtypes
@pytest.mark.parametrize("groups", [1, 2])
def test_a_hidden_key_has_no_influence(dtype, groups):
    query, key, value = draw(1, 2, 2, 3, 9, 8, dtype)
    bias = torch.zeros(2, groups, 9)
    bias[0, -1, 4] = bias[1, 0, 0] = -math.inf
    before = decode_attention(query, key, value, bias, 0.4)
    heads = slice(None) if groups == 1 else 1
    key[0, heads, 4], value[0, heads, 4] = 50, -70
    heads = slice(None) if groups == 1 else 0
    key[1, heads, 0], value[1, heads, 0] = -30, 1e4
    assert torch.equal(decode_attention(query, key, value, bias, 0.4), before)
    assert before.isfinite().all()
    # the same change without the bias is not overlooked
    assert not torch.allclose(decode_attention(query, key, value, None, 0.4), before, atol=0.1)


@dtypes
def test_hidden_space_behind_the_keys_is_like_none(dtype):
    query, key, value = draw(2, 2, 2, 2, 30, 8, dtype)
    bias = torch.zeros(2, 1, 30)
    bias[..., 17:] = -math.inf
    got = decode_attention(query, key, value, bias, 0.3)
    want = decode_attention(query, key[:, :, :17], value[:, :, :17], None, 0.3)
    assert torch.allclose(got, want, atol=TOLERANCE[dtype])


@dtypes
def test_heads_of_a_group_share_their_keys(dtype):
    query, key, value = draw(3, 1, 2, 4, 11, 8, dtype)
    got = decode_attention(query, key, value, None, 0.3)
    wide = decode_attention(query, key.repeat_interleave(4, 1), value.repeat_interleave(4, 1), None, 0.3)
    assert torch.allclose(got, wide, atol=TOLERANCE[dtype])
    swapped = decode_attention(query, key.flip(1), value.flip(1), None, 0.3)
    assert not torch.allclose(swapped, got, atol=0.1)


@dtypes
def test_a_key_of_size_s_is_s_keys(dtype):
    query, key, value = draw(4, 2, 2, 2, 6, 8, dtype)
    size = torch.tensor([1, 2, 4, 1, 1, 8])
    copies = torch.arange(6).repeat_interleave(size)
    got = decode_attention(query, key, value, size.float().log().expand(2, 1, -1), 0.3)
    want = decode_attention(query, key[:, :, copies], value[:, :, copies], None, 0.3)
    assert torch.allclose(got, want, atol=2 * TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_is_an_operator(dtype, groups):
    query, key, value = draw(5, 2, 2, 3, 7, 8, dtype)
    bias = torch.rand(2, groups, 7) if groups else None
    torch.library.opcheck(decode_attention, (query, key, value, bias, 0.3))
    strided = key.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        decode_attention(query, strided, value, bias, 0.3), decode_attention(query, key, value, bias, 0.3)
    )
