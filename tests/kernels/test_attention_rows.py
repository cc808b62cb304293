"""Rows of attention against the plain formula, for grouped heads, both kinds of mask, and all dtypes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.kernels.attention_rows import attention_rows


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_rows_are_the_softmax_of_the_repeated_keys(batch, kv_heads, share, rows, keys, additive):
    generator = torch.Generator().manual_seed(keys)
    query = torch.randn(batch, kv_heads * share, rows, 4, generator=generator)
    key = torch.randn(batch, kv_heads, keys, 4, generator=generator)
    allowed = torch.rand(batch, 1, rows, keys, generator=generator) > 0.3
    mask = torch.where(allowed, 0.5, torch.finfo(torch.float32).min) if additive else allowed
    got = attention_rows(query, key, mask, 0.7)
    for b in range(batch):
        for h in range(kv_heads * share):
            for r in range(rows):
                seen = allowed[b, 0, r]
                logits = (key[b, h // share] @ query[b, h, r]) * 0.7
                want = torch.zeros(keys)
                want[seen] = logits[seen].softmax(0)
                assert torch.allclose(got[b, h, r], want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_additive_bias_counts_and_the_result_is_float32(dtype):
    query, key = torch.zeros(1, 1, 1, 4, dtype=dtype), torch.zeros(1, 1, 2, 4, dtype=dtype)
    got = attention_rows(query, key, torch.tensor([[[[0.0, 2.0]]]]).log().clamp(min=-1e4).to(dtype), 1.0)
    assert got.dtype == torch.float32
    assert torch.allclose(got.flatten(), torch.tensor([0.0, 1.0]), atol=1e-3)
