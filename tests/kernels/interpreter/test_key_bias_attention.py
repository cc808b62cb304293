"""The Triton form of `key_bias_attention` against the formula in float64."""

import numpy as np
import pytest
import torch

from tests.support.close import assert_close
from vlmaccel.kernels.gpu import key_bias_attention as module
from vlmaccel.kernels.gpu.key_bias_attention import fits, launch
from vlmaccel.kernels.key_bias_attention import reference

ROWS, KEYS = module.CONFIGS["interpreter"][4, 128][:2]


def draw(heads=(2, 2), rows=40, keys=40, dim=16, batch=1, biased=True, dtype=torch.float32, seed=0):
    """Arguments up to the bias, in which some keys are hidden."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, rows, heads[0], dim, generator=generator).transpose(1, 2)
    key, value = (torch.randn(batch, heads[1], keys, dim, generator=generator) for _ in range(2))
    bias = torch.randint(0, 6, (batch, keys), generator=generator).float().log() if biased else None
    return (*(x.to(dtype) for x in (query, key, value)), bias)


def check(*args):
    assert fits(*args)
    got = launch(*args)
    assert got.dtype == args[0].dtype
    assert got.transpose(1, 2).is_contiguous()
    query, key, value, *rest = args
    want = reference(query.double(), key.double(), value.double(), *rest)
    # products of probabilities in half precision with values are as torch makes them
    assert_close(got, want, reference(*args) if got.dtype == torch.float32 else _as_torch(*args))


def _as_torch(query, key, value, bias, scale, causal=False):
    """With probabilities in the dtype of the values."""
    eye = torch.eye(key.shape[2], dtype=torch.double).expand(*key.shape[:2], -1, -1)
    probabilities = reference(query.double(), key.double(), eye, bias, scale, causal).to(value.dtype)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (probabilities.double() @ value.double()).to(value.dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_the_formula(dtype, biased, causal):
    check(*draw((4, 2), 77, 77, 24, 2, biased, dtype), 24**-0.5, causal)


@pytest.mark.parametrize("dim", [16, 64, 72, 80, 96, 128])
def test_widths_of_heads(dim):
    check(*draw(rows=33, keys=45, dim=dim, dtype=torch.bfloat16), dim**-0.5, True)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (6, 2), (5, 1)])
def test_shared_keys(heads):
    check(*draw(heads, 20, 20, batch=2), 0.3, True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3])
@pytest.mark.parametrize("keys", [1, KEYS - 1, KEYS, KEYS + 1, 4 * KEYS, 5 * KEYS + 3])
def test_lengths(rows, keys, causal):
    """The last rows of a sequence, and rows from before the first key."""
    check(*draw((1, 1), rows, keys, biased=keys % 2 == 0), 0.3, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_hidden_keys_only_is_zero(dtype, causal):
    query, key, value, _ = draw(batch=2, dtype=dtype)
    bias = torch.zeros(2, 40)
    bias[0, : KEYS + 4], bias[1] = -torch.inf, -torch.inf
    got = launch(query, key, value, bias, 0.3, causal)
    assert not got[1].any()
    assert got[0, :, : KEYS + 4].any() != causal
    check(query, key, value, bias, 0.3, causal)


def test_large_logits():
    query, key, value, bias = draw()
    check(30 * query, 30 * key, value, bias, 1.0, True)


def test_causality_leaves_out_what_comes_later():
    query, key, value, bias = draw((1, 1), 70, 70)
    want = launch(query, key, value, bias, 0.3, True)
    for start in (1, KEYS, 50):
        others, later = key.clone(), value.clone()
        others[:, :, start:], later[:, :, start:] = 1e4, 1e4
        assert torch.equal(launch(query, others, later, bias, 0.3, True)[:, :, :start], want[:, :, :start])


def test_layouts():
    query, key, value, bias = draw(batch=2)
    want = launch(query, key, value, bias, 0.3, True)
    wide = torch.empty(2, 2, 50, 17)[:, :, 3:43, :16]  # rows of odd length, as of a cache with room
    apart = torch.empty(2, 40, 16, 2).permute(0, 3, 1, 2)  # channels far apart
    for other in (wide, apart, torch.empty(2, 40, 2, 16).transpose(1, 2)):
        assert torch.equal(launch(query, other.copy_(key), value, bias, 0.3, True), want)
        assert torch.equal(launch(query, key, other.copy_(value), bias, 0.3, True), want)
        assert torch.equal(launch(other.copy_(query), key, value, bias, 0.3, True), want)
    for column in (bias.double(), bias.T.contiguous().T):
        assert torch.equal(launch(query, key, value, column, 0.3, True), want)
    one = bias[:1].expand(2, -1)
    assert torch.equal(launch(query, key, value, one, 0.3), launch(query, key, value, one.contiguous(), 0.3))


def test_offsets_beyond_32_bits():
    stride = 2**31 // 3 + 8
    query, key, value, bias = draw((1, 1), 4, 4, dtype=torch.bfloat16)
    want = launch(query, key, value, bias, 0.3)
    # takes room only where it is written to
    memory = torch.from_numpy(np.empty(3 * stride + 16, np.int16)).view(torch.bfloat16)
    far = memory.as_strided((1, 1, 4, 16), (0, 0, stride, 1))
    assert torch.equal(launch(far.copy_(query), key, value, bias, 0.3), want)
    assert torch.equal(launch(query, far.copy_(key), value, bias, 0.3), want)
    assert torch.equal(launch(query, key, far.copy_(value), bias, 0.3), want)


def test_what_it_does_not_take():
    args = draw(dim=8)
    assert fits(*args, 0.3)
    assert not fits(*(x.double() for x in args), 0.3)
    assert not fits(args[0].bfloat16(), *args[1:], 0.3)
    assert not fits(*args[:2], args[2][..., :4], args[3], 0.3)
    for odd in ({"rows": 0}, {"keys": 0}, {"dim": 129}, {"batch": 0}):
        assert not fits(*draw(**odd), 0.3)
