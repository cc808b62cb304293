"""Decoding over packed entries by the Triton form, against float64."""

import math

import pytest
import torch

from tests.kernels.test_mixed_decode import cache, golden
from tests.support.close import assert_close
from vlmaccel.kernels import mixed_decode
from vlmaccel.kernels.gpu.mixed_decode import CONFIGS, fits, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_good(args):
    assert fits(*args)
    assert_close(launch(*args), golden(*args), mixed_decode._torch_form(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "bias"), [(2, "none"), (4, "shared"), (8, "kv heads"), (4, "heads")])
def test_one_part(dtype, bits, bias):
    assert_good(cache(dtype=dtype, bits=[bits], lengths=[48], exact=19, bias=bias))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (7, 1), (3, 3)])
def test_heads(heads, kv_heads):
    for bits, bias in ((4, "kv heads"), (8, "heads")):
        assert_good(cache(2, heads, kv_heads, 16, bits=[bits], lengths=[32], bias=bias, exact=3))


@pytest.mark.parametrize("width", [8, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_widths(width, bits):
    assert_good(cache(1, 2, 1, width, bits=[bits], lengths=[32], group=32, exact=5, bias="heads"))


@pytest.mark.parametrize(("group", "channels"), [(16, 16), (16, 8), (48, 32), (64, 4)])
def test_groups(group, channels):
    lengths = [2 * group, group]
    assert_good(cache(1, 2, 1, bits=[2, 4], lengths=lengths, group=group, channels=channels, exact=3, bias="shared"))


def test_a_piece_that_starts_inside_of_a_group():
    assert_good(cache(1, 2, 1, 16, bits=[4], lengths=[144], group=48, exact=0, dtype=torch.bfloat16))


@pytest.mark.parametrize("exact", [0, 1, 2, 17, 129])
def test_lengths(exact):
    for parts in (), (2,), (2, 4, 8):
        if exact or parts:
            assert_good(
                cache(1, 2, 1, 16, bits=parts, lengths=[80, 16, 48][: len(parts)], exact=exact, bias="kv heads")
            )


def test_a_part_without_entries():
    assert_good(cache(bits=[2, 4], lengths=[0, 32], exact=3, bias="heads"))
    assert_good(cache(bits=[2], lengths=[0], exact=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_pieces(dtype, monkeypatch):
    monkeypatch.setitem(CONFIGS, "interpreter", CONFIGS["interpreter"]._replace(programs=200))
    args = cache(1, 2, 1, 16, bits=[4], lengths=[32 * 9], exact=131, dtype=dtype, bias="heads")
    assert_good(args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_entries(dtype):
    """Whole pieces, whole parts, and all that a head may see."""
    args = list(cache(1, 4, 2, 16, bits=[8, 4], lengths=[96, 32], exact=9, bias="heads", dtype=dtype))
    bias = args[5]
    bias[:, 0, :64] = bias[:, 1, 96:128] = bias[:, 2, 128:] = bias[:, 3] = -math.inf
    assert_good(args)
    assert (launch(*args)[:, 3] == 0).all()


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 3.0), (torch.float16, 0.5), (torch.bfloat16, 0.5)])
def test_terms_make_up_the_precision_of_the_dtype(dtype, steps):
    query, *rest = cache(1, 2, 1, bits=[8], lengths=[64], exact=0, dtype=dtype)
    assert_close(launch(query * 4, *rest), golden(query * 4, *rest), steps=steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_small_and_large_values(dtype, spread):
    """Scales times weights leave the range in which float16 is precise."""
    query, key, value, packed, bits, bias, scale = cache(1, 2, 1, bits=[8], lengths=[96], exact=4, dtype=dtype)
    packed = [*packed[:3], packed[3], *(x * spread for x in packed[4:])]
    assert_good((query, key, value * spread, packed, bits, bias, scale))


def test_strides():
    query, key, value, packed, bits, bias, scale = cache(2, 4, 2, bits=[4], lengths=[32], exact=21, bias="heads")
    room = torch.full((2, 2, 40, 64), math.nan)
    room[:, :, :21] = key
    turned = value.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 4, 100), math.nan)
    wide[..., 30:83] = bias
    assert_good((query, room[:, :, :21], turned, packed, bits, wide[..., 30:83], scale))
    packed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed]
    assert_good((query, key, value, packed, bits, bias[:, :1].expand(-1, 4, -1), scale))


def test_what_is_left_to_the_torch_form():
    assert fits(*cache(bits=[4], lengths=[32], group=16))
    assert not fits(*cache(bits=[4], lengths=[32], group=8))
    assert not fits(*cache(bits=[4], lengths=[48], group=24))
    assert not fits(*cache(bits=[4], lengths=[32], channels=1))
    assert not fits(*cache(dtype=torch.float64))
    assert not fits(*cache(width=512))
