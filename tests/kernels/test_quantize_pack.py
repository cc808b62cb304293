"""Low-bit codes: the layout of the bytes, the error bound, extremes, agreement with the exact grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.kernels.quantize_pack import dequantize, quantize_pack, reference, scale_dtype

BITS = (2, 4, 8)
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def draw(seed, *shape, spread=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def unpacked(codes, bits):
    """(..., d) int64 codes by the documented layout: byte j holds channels j, j + w, j + 2w, ..., lowest bits first."""
    *outer, w = codes.shape
    out = torch.zeros(*outer, w * (8 // bits), dtype=torch.long)
    for j in range(w):
        for part in range(8 // bits):
            out[..., j + part * w] = (codes[..., j].long() // 2 ** (bits * part)) % 2**bits
    return out


def spread_over(x, group, dim):
    return x.double().repeat_interleave(group, dim)


@given(
    st.sampled_from(BITS),
    st.sampled_from([-1, -2]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(1, 4),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([1e-6, 1e-2, 1.0, 300.0]),
    st.floats(-50, 50),
)
def test_error_is_at_most_half_a_step(bits, dim, dtype, scale, n, group, spread, offset):
    x = (draw(n + group, 2, 3, n * group, 16).double() * spread + offset).to(dtype)
    codes, s, z = quantize_pack(x, bits, group, dim, scale)
    assert s.dtype == z.dtype == scale
    left = dequantize(codes, s, z, bits, dim, torch.float32).double()
    step, zero = spread_over(s, group, dim), spread_over(z, group, dim)
    top = 2**bits - 1
    # zero may be rounded above the smallest value, scale below what reaches the largest
    cut = (zero - x.double()).clamp(min=0) + step * top * EPS[scale]
    work = (zero.abs() + step * top) * 2**-20  # float32
    assert ((x.double() - left).abs() <= step / 2 + cut + work).all()
    # and the step is no wider than it must be
    grouped = x.double().unflatten(dim, (-1, group))
    inner = dim if dim == -1 else -2
    width = (grouped.amax(inner) - grouped.amin(inner)) / top
    tiny = 2.0**-20 if scale == torch.float16 else 1e-30
    assert (s.double() <= width * (1 + 4 * EPS[scale]) + z.double().abs() * EPS[scale] * 2 / top + 2 * tiny).all()


@given(
    st.sampled_from(BITS),
    st.sampled_from([-1, -2]),
    st.integers(1, 3),
    st.sampled_from([2, 4, 8]),
)
def test_agrees_with_the_exact_grid(bits, dim, n, group):
    x = draw(n * group, 2, n * group, 8)
    codes, s, z = quantize_pack(x, bits, group, dim, torch.float32)
    assert codes.shape == (2, n * group, bits) and codes.dtype == torch.uint8
    left, want = dequantize(codes, s, z, bits, dim, torch.float64), reference(x, bits, group, dim)
    step = spread_over(s, group, dim)
    off = (left - want).abs()
    near = off < 1e-5
    # a value half-way between two codes may go to either; nothing else may differ
    half = ((x.double() - want).abs() - step / 2).abs() < 1e-5
    assert (near | (half & ((off - step).abs() < 1e-5))).all()
    assert near.double().mean() > 0.95


def test_published_example():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 10.0, 40.0, 20.0, 30.0]])
    codes, s, z = quantize_pack(x, 2, 4, -1, torch.float16)
    assert s.tolist() == [[1.0, 10.0]] and z.tolist() == [[0.0, 10.0]]
    # channels 0, 2, 4, 6 in byte 0 and 1, 3, 5, 7 in byte 1: codes 0 2 0 1 and 1 3 3 2
    assert codes.tolist() == [[0 + (2 << 2) + (0 << 4) + (1 << 6), 1 + (3 << 2) + (3 << 4) + (2 << 6)]]
    assert torch.equal(dequantize(codes, s, z, 2, -1, torch.float32), x)


@given(st.sampled_from(BITS), st.sampled_from([-1, -2]), st.integers(1, 3), st.sampled_from([8, 24]))
def test_bytes_hold_codes_as_documented(bits, dim, n, width):
    generator = torch.Generator().manual_seed(n + width)
    want = torch.randint(0, 2**bits, (2, 4 * n, width), generator=generator)
    # both ends of the range in every group of either kind: zero 0 and scale 1, so that codes are the values
    want[:, ::4, :], want[:, 1::4, :] = 0, 2**bits - 1
    if dim == -1:
        want[..., ::4], want[..., 1::4] = 0, 2**bits - 1
    codes, s, z = quantize_pack(want.float(), bits, 4, dim, torch.float16)
    assert (s == 1).all() and (z == 0).all()
    assert torch.equal(unpacked(codes, bits), want)
    assert torch.equal(dequantize(codes, s, z, bits, dim, torch.float32), want.float())


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, -3.25, 1e-7, 333.0])
def test_a_constant_group_comes_back(bits, dim, scale, value):
    x = torch.full((1, 8, 8), value)
    left = dequantize(*quantize_pack(x, bits, 4, dim, scale), bits, dim, torch.float32)
    assert left.isfinite().all()
    assert ((left - x).abs() <= abs(value) * EPS[scale] * 1.01 + 2.0**-21).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_values_beyond_float16(bits, dtype):
    x = draw(1, 1, 8, 8, spread=2e6, dtype=dtype)
    assert scale_dtype(x) == torch.bfloat16
    codes, s, z = quantize_pack(x, bits, 8, -2, scale_dtype(x))
    left = dequantize(codes, s, z, bits, -2, torch.float32)
    step = spread_over(s, 8, -2)
    assert left.isfinite().all()
    assert ((x.double() - left.double()).abs() <= step / 2 + (z.double().abs() + step * 2**bits) * 2**-8).all()


def test_which_dtype_scales_are_kept_in():
    assert scale_dtype(torch.tensor([-30000.0, 2.0])) == torch.float16
    assert scale_dtype(torch.tensor([-40000.0])) == torch.bfloat16
    assert scale_dtype(torch.empty(0, 4)) == torch.float16
    # the range of what fits in float16 does too: no scale may overflow
    x = torch.tensor([[-32000.0] * 4 + [32000.0] * 4])
    codes, s, z = quantize_pack(x, 2, 8, -1, scale_dtype(x))
    assert (dequantize(codes, s, z, 2, -1, torch.float32) - x).abs().max() < 64


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 16])
def test_bits_are_2_4_or_8(bits):
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        quantize_pack(torch.randn(1, 8, 8), bits, 4, -1, torch.float16)


@pytest.mark.parametrize(("bits", "channels"), [(2, 6), (2, 9), (4, 7)])
def test_codes_fill_whole_bytes(bits, channels):
    with pytest.raises(ValueError, match="whole bytes"):
        quantize_pack(torch.randn(1, 4, channels), bits, 1, -1, torch.float16)


@pytest.mark.parametrize("dim", [-1, -2])
def test_nothing_in_nothing_out(dim):
    codes, s, z = quantize_pack(torch.empty(2, 3, 0, 4, 8), 4, 4, dim, torch.float16)
    assert codes.shape == (2, 3, 0, 4, 4)
    assert dequantize(codes, s, z, 4, dim, torch.bfloat16).shape == (2, 3, 0, 4, 8)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_are_operators(bits, dim, dtype):
    x = torch.randn(2, 16, 8).to(dtype)
    torch.library.opcheck(quantize_pack, (x, bits, 4, dim, torch.float16))
    packed = quantize_pack(x, bits, 4, dim, torch.float16)
    torch.library.opcheck(dequantize, (*packed, bits, dim, dtype))


@pytest.mark.parametrize("dim", [-1, -2])
def test_compile_without_a_break(dim):
    def there_and_back(x):
        return dequantize(*quantize_pack(x, 4, 4, dim, torch.float16), 4, dim, torch.float32)

    x = draw(2, 2, 16, 8)
    assert torch.equal(torch.compile(there_and_back, fullgraph=True, backend="eager")(x), there_and_back(x))


@pytest.mark.parametrize("dim", [-1, -2])
def test_layout_in_memory_does_not_matter(dim):
    x = draw(3, 2, 8, 3, 16).transpose(1, 2)
    for got, want in zip(
        quantize_pack(x, 4, 4, dim, torch.float16), quantize_pack(x.contiguous(), 4, 4, dim, torch.float16), strict=True
    ):
        assert torch.equal(got, want)
