"""Keys rounded by their queries by the Triton form: the same bits as the torch form."""

import pytest
import torch

from vlmaccel.kernels.gpu import quantize_keys
from vlmaccel.kernels.quantize_keys import _torch_form

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(n=8, dim=8, batch=2, heads=2, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(n + dim)
    keys = (torch.randn(batch, heads, n, dim, generator=generator) * spread + 0.3).to(dtype)
    return keys, torch.randn(batch, heads, dim, generator=generator), torch.rand(batch, heads, dim, generator=generator)


def assert_same(keys, mean, variance, *rest):
    assert quantize_keys.fits(keys, mean, variance, *rest)
    got, want = quantize_keys.launch(keys, mean, variance, *rest), _torch_form(keys, mean, variance, *rest)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("dtype", "scale"), list(zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True)))
def test_the_same_bits(bits, dtype, scale):
    assert_same(*draw(dtype=dtype), bits, 4, scale)


@pytest.mark.parametrize(("n", "dim", "group"), [(6, 12, 6), (10, 20, 5), (2, 8, 1), (33, 8, 33)])
def test_odd_sizes(n, dim, group):
    assert_same(*draw(n, dim), 2, group, torch.float16)


@pytest.mark.parametrize(("spread", "size"), [(0.0, 1.0), (1e-9, 1.0), (1e4, 1e3), (1.0, 0.0)])
def test_extremes(spread, size):
    keys, mean, variance = draw(spread=spread)
    assert_same(keys, mean * size, variance * size, 2, 4, torch.float16)


def test_layout_in_memory_does_not_matter():
    keys, mean, variance = draw()
    assert_same(keys.transpose(1, 2).contiguous().transpose(1, 2), mean, variance, 2, 4, torch.float16)


def test_what_is_left_to_the_torch_form():
    keys, mean, variance = draw()
    assert quantize_keys.fits(keys, mean, variance, 2, 4, torch.float16)
    assert not quantize_keys.fits(keys.double(), mean, variance, 2, 4, torch.float16)
    assert not quantize_keys.fits(keys[:, :, :0], mean, variance, 2, 4, torch.float16)
    assert not quantize_keys.fits(keys, mean, variance, 3, 4, torch.float16)
    assert not quantize_keys.fits(keys[..., :6], mean[..., :6], variance[..., :6], 2, 4, torch.float16)
