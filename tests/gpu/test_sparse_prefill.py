"""Sparse prefill on a GPU against the formula in float64, at the shapes of models."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support.close import assert_close
from vlmaccel.kernels.block_index import vertical_slash_index
from vlmaccel.kernels.block_prefill import block_prefill
from vlmaccel.kernels.block_prefill import reference as block_reference
from vlmaccel.kernels.places import places
from vlmaccel.kernels.token_prefill import reference as token_reference
from vlmaccel.kernels.token_prefill import token_prefill

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, heads, key heads, rows, earlier keys, channels of a head
SHAPES = [
    (1, 12, 2, 2880, 0, 128),
    (2, 4, 4, 1501, 0, 128),
    (2, 6, 3, 577, 100, 64),
    (1, 4, 2, 700, 31, 72),
    (1, 5, 1, 333, 0, 80),
    (1, 4, 2, 640, 64, 96),
    (1, 2, 1, 300, 0, 256),
    (2, 2, 1, 1, 0, 64),
    (1, 2, 1, 1, 200, 128),
]


def draw(shape, dtype):
    """query, key, value, laid out as a model has them, and a generator for more."""
    batch, heads, kv_heads, rows, earlier, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(batch, rows, heads, dim, device="cuda", generator=generator).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, kv_heads, rows + earlier, dim, device="cuda", generator=generator).to(dtype)
    return query, key, value, generator


def golden(reference, query, key, value, *rest):
    """The formula, a few heads at a time: float64 takes room."""
    share = query.shape[1] // key.shape[1]
    out = []
    for h in range(key.shape[1]):
        heads = slice(h * share, h * share + share)
        lists = [x[:, heads] if isinstance(x, torch.Tensor) and x.ndim == 4 else x for x in rest]
        parts = (query[:, heads].double(), *(x[:, h : h + 1].double() for x in (key, value)))
        out.append(reference(*parts, *lists))
    return torch.cat(out, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_chosen_tokens(shape, dtype):
    query, key, value, generator = draw(shape, dtype)
    chosen = torch.rand(shape[0], key.shape[2], device="cuda", generator=generator) < 0.4
    chosen[-1, key.shape[2] // 3 :] = False
    args = (query, key, value, places(chosen), shape[-1] ** -0.5)
    got = token_prefill(*args)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    assert_close(got, golden(token_reference, *args), steps=None if dtype == torch.float32 else 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_listed_blocks_and_keys(shape, block, dtype):
    query, key, value, generator = draw(shape, dtype)
    batch, heads, m = shape[0], shape[1], key.shape[2]
    lines = (torch.randint(-1, m, (batch, heads, n), device="cuda", generator=generator) for n in (100, 3))
    blocks, columns = vertical_slash_index(*lines, shape[3], m, block)
    start = torch.arange(batch, device="cuda") * (m // 3)
    args = (query, key, value, blocks, columns, start, block, shape[-1] ** -0.5)
    got = block_prefill(*args)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    assert_close(got, golden(block_reference, *args), steps=None if dtype == torch.float32 else 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_is_dense_attention(dtype):
    query, key, value, _ = draw((1, 8, 2, 2000, 0, 128), dtype)
    repeated = (x.double().repeat_interleave(4, 1) for x in (key, value))
    want = scaled_dot_product_attention(query.double(), *repeated, is_causal=True, scale=0.1)
    steps = None if dtype == torch.float32 else 3
    tokens = torch.arange(2000, device="cuda")[None]
    assert_close(token_prefill(query, key, value, tokens, 0.1), want, steps=steps)
    blocks = torch.arange(32, device="cuda", dtype=torch.int32).expand(1, 8, 32, -1)
    start = torch.zeros(1, dtype=torch.long, device="cuda")
    got = block_prefill(query, key, value, blocks, blocks[..., :0], start, 64, 0.1)
    assert_close(got, want, steps=steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_left_to_torch(dtype):
    query, key, value, generator = draw((2, 4, 2, 130, 20, 160 if dtype == torch.float32 else 64), dtype)
    chosen = torch.rand(2, 150, device="cuda", generator=generator) < 0.4
    args = (query, key, value, places(chosen), 0.1)
    assert_close(token_prefill(*args), golden(token_reference, *args))
    args = (query, key, value, places(chosen)[:, :0], 0.1)
    assert not token_prefill(*args).any()
    lines = (torch.randint(-1, 150, (2, 4, n), device="cuda", generator=generator) for n in (9, 1))
    lists = vertical_slash_index(*lines, 130, 150, 32)
    args = (query, key, value, *lists, torch.tensor([0, 40], device="cuda"), 32, 0.1)
    assert_close(block_prefill(*args), golden(block_reference, *args))


def test_are_operators_and_always_the_same():
    query, key, value, generator = draw((2, 4, 2, 300, 20, 64), torch.bfloat16)
    tokens = places(torch.rand(2, 320, device="cuda", generator=generator) < 0.4)
    lines = (torch.randint(-1, 320, (2, 4, n), device="cuda", generator=generator) for n in (50, 2))
    lists = (*vertical_slash_index(*lines, 300, 320, 64), torch.zeros(2, dtype=torch.long, device="cuda"))
    for operator, args in ((token_prefill, (tokens, 0.1)), (block_prefill, (*lists, 64, 0.1))):
        torch.library.opcheck(operator, (query, key, value, *args))
        first = operator(query, key, value, *args)
        assert all(torch.equal(operator(query, key, value, *args), first) for _ in range(3))
