"""`key_bias_attention` on a GPU, at the sizes of real models."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support.close import assert_close
from vlmaccel.kernels.key_bias_attention import key_bias_attention, reference


def draw(heads, rows, keys, dim, dtype, biased=True, batch=2):
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(batch, n, h, dim, generator=generator, device="cuda", dtype=dtype).transpose(1, 2)
        for n, h in ((rows, heads[0]), (keys, heads[1]), (keys, heads[1]))
    )
    bias = torch.randint(0, 9, (batch, keys), generator=generator, device="cuda").float().log() if biased else None
    return query, key, value, bias


def golden(query, key, value, *rest):
    """In float64, a KV head at a time."""
    share = query.shape[1] // key.shape[1]
    parts = (
        reference(
            query[:, h * share : (h + 1) * share].double(), *(x[:, h : h + 1].double() for x in (key, value)), *rest
        )
        for h in range(key.shape[1])
    )
    return torch.cat(list(parts), 1)


def torchs(query, key, value, bias, scale, causal):
    """torch's fused attention, with everything in a mask."""
    mask = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], device="cuda", dtype=query.dtype)
    if bias is not None:
        mask += bias.to(query.dtype)[:, None, None]
    if causal:
        after = torch.ones(mask.shape[2:], dtype=torch.bool, device="cuda").triu(key.shape[2] - query.shape[2] + 1)
        mask = mask.masked_fill(after, -torch.inf)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def check(*args):
    got = key_bias_attention(*args)
    assert got.dtype == args[0].dtype
    assert got.transpose(1, 2).is_contiguous()
    assert_close(got, golden(*args), torchs(*args))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_the_formula(dtype, causal, biased):
    check(*draw((12, 2), 2501, 2501, 128, dtype, biased), 128**-0.5, causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim"), [(577, 64), (729, 72), (1024, 80), (300, 96), (300, 256)])
def test_full_attention_of_vision_towers(tokens, dim, dtype):
    check(*draw((16, 16), tokens, tokens, dim, dtype), dim**-0.5, False)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 1000), (17, 1000), (300, 2000), (129, 64)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(rows, keys, causal):
    args = (*draw((4, 2), rows, keys, 64, torch.bfloat16, biased=False), 0.125, causal)
    seen = slice(max(0, rows - keys) if causal else 0, None)
    got = key_bias_attention(*args)
    assert_close(got[:, :, seen], golden(*args)[:, :, seen], torchs(*args)[:, :, seen])
    assert not got[:, :, : seen.start].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
def test_a_row_that_sees_hidden_keys_only_is_zero(dtype, causal):
    query, key, value, _ = draw((4, 4), 300, 300, 64, dtype)
    bias = torch.zeros(2, 300, device="cuda")
    bias[0, :100], bias[1] = -torch.inf, -torch.inf
    got = key_bias_attention(query, key, value, bias, 0.125, causal)
    assert torch.isfinite(got).all()
    assert not got[1].any()
    assert got[0, :, :100].any() != causal
    assert_close(got, golden(query, key, value, bias, 0.125, causal))


def test_no_rows_or_keys():
    query, key, value, bias = draw((4, 2), 5, 7, 64, torch.bfloat16)
    assert key_bias_attention(query[:, :, :0], key, value, bias, 0.125, False).shape == (2, 4, 0, 64)


def test_is_the_same_every_time():
    args = (*draw((12, 2), 700, 1500, 128, torch.bfloat16), 128**-0.5, True)
    assert torch.equal(key_bias_attention(*args), key_bias_attention(*args))


def test_compiles():
    args = draw((4, 2), 300, 300, 64, torch.bfloat16)
    compiled = torch.compile(lambda *x: key_bias_attention(*x, 0.125, True), fullgraph=True)
    assert torch.equal(compiled(*args), key_bias_attention(*args, 0.125, True))
