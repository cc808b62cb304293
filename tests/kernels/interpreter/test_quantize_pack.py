"""Low-bit codes by the Triton forms: the same bits as the torch forms."""

import pytest
import torch

from vlmaccel.kernels.gpu import dequantize, quantize_pack
from vlmaccel.kernels.quantize_pack import _dequantize, _torch_form

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float32, spread=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * spread + 0.3).to(dtype)


def assert_same(x, bits, group, dim, dtype, out):
    assert quantize_pack.fits(x, bits, group, dim, dtype)
    got, want = quantize_pack.launch(x, bits, group, dim, dtype), _torch_form(x, bits, group, dim, dtype)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert dequantize.fits(*got, bits, dim, out)
    left, expected = dequantize.launch(*got, bits, dim, out), _dequantize(*want, bits, dim, out)
    assert left.dtype == out
    assert torch.equal(left, expected)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", DTYPES)
def test_the_same_bits(dim, bits, dtype, scale):
    assert_same(draw(2, 3, 16, 32, dtype=dtype), bits, 8, dim, scale, dtype)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(("n", "width", "group"), [(6, 72, 6), (5, 80, 5), (1, 8, 1), (3, 96, 3), (160, 4, 160)])
@pytest.mark.parametrize("bits", [2, 8])
def test_odd_sizes(dim, n, width, group, bits):
    group = group if dim == -2 else max(i for i in range(1, group + 1) if width % i == 0)
    assert_same(draw(2, n, width), bits, group, dim, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dim", [-1, -2])
def test_half_way_values_go_to_the_even_code(dim):
    values = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 14.5, 13.5, 15.0])  # zero 0, scale 1
    x = values.expand(8, 8) if dim == -1 else values[:, None].expand(8, 8)
    codes, scale, zero = quantize_pack.launch(x, 4, 8, dim, torch.float32)
    assert (scale == 1).all() and (zero == 0).all()
    want = torch.tensor([0, 0, 2, 2, 4, 14, 14, 15.0])
    left = dequantize.launch(codes, scale, zero, 4, dim, torch.float32)
    assert torch.equal(left, (want.expand(8, 8) if dim == -1 else want[:, None].expand(8, 8)))


@pytest.mark.parametrize("scale", DTYPES)
@pytest.mark.parametrize(("spread", "value"), [(0.0, 0.3), (1e-9, 0.0), (1e4, 0.0), (2e6, 0.0)])
def test_extremes(scale, spread, value):
    if scale == torch.float16 and spread > 1e5:
        return  # what `scale_dtype` is for
    assert_same(draw(2, 8, 16, spread=spread), 2, 4, -2, scale, torch.float32)


@pytest.mark.parametrize("dim", [-1, -2])
def test_layout_in_memory_does_not_matter(dim):
    assert_same(draw(2, 8, 3, 16).transpose(1, 2), 4, 4, dim, torch.float16, torch.float32)


def test_what_is_left_to_the_torch_form():
    x = draw(2, 8, 16)
    assert quantize_pack.fits(x, 4, 4, -1, torch.float16)
    assert not quantize_pack.fits(x.double(), 4, 4, -1, torch.float16)
    assert not quantize_pack.fits(x[:, :0], 4, 4, -1, torch.float16)
    assert not quantize_pack.fits(x, 3, 4, -1, torch.float16)
    assert not quantize_pack.fits(x[..., :7], 4, 7, -1, torch.float16)
    packed = _torch_form(x, 4, 4, -1, torch.float16)
    assert dequantize.fits(*packed, 4, -1, torch.bfloat16)
    assert not dequantize.fits(*packed, 4, -1, torch.float64)
