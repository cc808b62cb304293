"""Decoding over packed entries on a GPU, at the shapes of models, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.test_mixed_decode import by_copies, cache, golden
from tests.support.close import assert_close
from vlmaccel.kernels.gpu.mixed_decode import fits
from vlmaccel.kernels.mixed_decode import mixed_decode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_good(*args, **kwargs):
    args = cache(*args, **kwargs, device="cuda")
    assert fits(*args)
    got = mixed_decode(*args)
    assert_close(got, golden(*args), by_copies(*args))
    assert torch.equal(mixed_decode(*args), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 2, 128), (28, 4, 128), (32, 32, 128), (14, 2, 64)])
def test_long_caches(heads, kv_heads, width, bits, dtype):
    n = 16384 if heads == 32 else 32768
    assert_good(1, heads, kv_heads, width, bits=[bits], lengths=[n], group=32, exact=157, dtype=dtype, bias="kv heads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "shared", "kv heads", "heads"])
def test_all_precisions_in_a_batch(bias, dtype):
    lengths, bits = [2048, 992, 320], [2, 4, 8]
    assert_good(3, 12, 2, 128, bits=bits, lengths=lengths, group=32, exact=131, dtype=dtype, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 64, 72, 80, 96, 128, 256])
def test_widths(width, dtype):
    for bits in (2, 4, 8):
        assert_good(2, 8, 4, width, bits=[bits], lengths=[608], group=32, exact=33, dtype=dtype, bias="heads")


@pytest.mark.parametrize(("group", "channels"), [(16, 16), (16, 4), (48, 32), (64, 64), (128, 8)])
def test_groups(group, channels):
    for bits in (2, 4, 8):
        assert_good(1, 8, 2, bits=[bits], lengths=[6 * group], group=group, channels=channels, dtype=torch.bfloat16)


@pytest.mark.parametrize("exact", [0, 1, 2, 17, 129, 5001])
def test_lengths(exact):
    for bits, lengths in (([], []), ([2], [32]), ([2, 4, 8], [32, 0, 1600])):
        if exact or bits:
            assert_good(1, 8, 2, bits=bits, lengths=lengths, group=32, exact=exact, dtype=torch.bfloat16, bias="heads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_entries(dtype):
    args = list(cache(1, 4, 2, bits=[2, 4], lengths=[4096, 1024], group=32, bias="heads", dtype=dtype, device="cuda"))
    bias = args[5]
    bias[:, 0, :3000] = bias[:, 1, 4096:5120] = bias[:, 2, 5120:] = bias[:, 3] = -math.inf
    got = mixed_decode(*args)
    assert_close(got, golden(*args))
    assert (got[:, 3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_query_heads(dtype):
    assert_good(1, 40, 1, 128, bits=[4], lengths=[512], group=32, dtype=dtype, bias="heads")


def test_what_the_kernel_does_not_take_is_as_good():
    for kwargs in ({"group": 8}, {"channels": 1}, {"dtype": torch.float64}):
        args = cache(2, bias="heads", **kwargs, device="cuda")
        assert not fits(*args)
        assert_close(mixed_decode(*args), golden(*args), by_copies(*args))
