"""`score_rows` on a GPU, at the sizes of real models."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support.close import assert_close
from vlmaccel.kernels.attention_lse import attention_lse
from vlmaccel.kernels.score_rows import REDUCTIONS, reference, score_rows


def draw(heads, rows, keys, dim, dtype, groups=1, batch=2):
    """The last `rows` rows of a sequence with padding on the left, and hidden keys in it."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key = (
        torch.randn(batch, n, h, dim, generator=generator, device="cuda", dtype=dtype).transpose(1, 2)
        for n, h in ((rows, heads[0]), (keys, heads[1]))
    )
    row = torch.arange(keys - rows, keys, device="cuda").repeat(batch, 1)
    index = torch.arange(keys, device="cuda", dtype=torch.int32).repeat(batch, groups, 1)
    bias = torch.randint(0, 9, (batch, groups, keys), generator=generator, device="cuda").float().log()
    row[-1, :7], bias[-1, :, :7] = -1, -torch.inf
    return query, key, row, index, bias


def golden(query, key, *rest):
    """In float64, a KV head at a time."""
    row, index, bias, *others = rest
    share, kv_heads = query.shape[1] // key.shape[1], key.shape[1]
    found = []
    for h in range(kv_heads):
        place, weight = (x if x is None or x.shape[1] == 1 else x[:, h : h + 1] for x in (index, bias))
        found.append(reference(query[:, h * share : (h + 1) * share], key[:, h : h + 1], row, place, weight, *others))
    return torch.cat(found, 1)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_few_rows(dtype, reduce):
    args = (*draw((32, 32), 64, 2900, 128, dtype), 128**-0.5, 0, reduce)
    assert_close(score_rows(*args), golden(*args))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("window", [0, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows(dtype, window, reduce):
    args = (*draw((12, 2), 2500, 2500, 128, dtype, groups=2), 128**-0.5, window, reduce)
    assert_close(score_rows(*args), golden(*args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_what_fused_attention_knows_of_its_rows(dtype, causal):
    query, key, row, index, _ = draw((12, 2), 2500, 2500, 128, dtype)
    row[:] = torch.arange(2500, device="cuda") if causal else 2499
    out, lse = attention_lse(query, key, key, is_causal=causal, enable_gqa=True)
    assert torch.equal(out, scaled_dot_product_attention(query, key, key, is_causal=causal, enable_gqa=True))
    assert lse is not None
    args = (query, key, row, index, None, 128**-0.5, 0, "sum")
    assert_close(score_rows(*args, lse), golden(*args))


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 256])
def test_widths_of_heads(dim):
    args = (*draw((4, 2), 333, 1001, dim, torch.bfloat16), dim**-0.5, 0, "sum")
    assert_close(score_rows(*args), golden(*args))


@pytest.mark.parametrize("rows", [0, 1, 16, 130])
@pytest.mark.parametrize("keys", [1, 131])
def test_lengths(rows, keys):
    query, key, _, _, bias = draw((4, 2), max(rows, keys), keys, 64, torch.float16)
    query, row = query[:, :, :rows], torch.arange(rows, device="cuda").repeat(2, 1)
    index = torch.arange(keys, device="cuda").repeat(2, 1, 1)
    args = (query, key, row, index, bias, 0.125, 0, "max")
    assert_close(score_rows(*args), golden(*args))


def test_what_has_no_triton_form():
    args = (*draw((4, 2), 100, 300, 64, torch.float64), 0.125, 30, "mean")
    assert_close(score_rows(*args), golden(*args))


def test_is_the_same_every_time():
    args = (*draw((12, 2), 700, 1500, 128, torch.bfloat16), 128**-0.5, 0, "sum")
    assert torch.equal(score_rows(*args), score_rows(*args))


def test_memory_is_that_of_rows_and_keys():
    n = 16384
    args = (*draw((4, 4), n, n, 64, torch.bfloat16, batch=2), 0.125, 0, "sum")
    score_rows(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    score_rows(*args)
    assert torch.cuda.max_memory_allocated() - before < 16 * 2 * 4 * n


def test_compiles():
    args = draw((4, 2), 64, 300, 64, torch.bfloat16)
    compiled = torch.compile(lambda *x: score_rows(*x, 0.125, 0, "sum"), fullgraph=True)
    assert torch.equal(compiled(*args), score_rows(*args, 0.125, 0, "sum"))
