"""Keys rounded by the queries that ask for them: agreement with the exact solution, logits, layout, extremes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmaccel.kernels.quantize_keys import CLIP, plan, quantize_keys, reference
from vlmaccel.kernels.quantize_pack import dequantize, pack, quantize_pack

BITS = (2, 4, 8)


def draw(seed, n=8, dim=16, batch=2, heads=2, strength=3.0):
    """Keys, and the mean and variance of queries whose mean is `strength` times their deviation."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, n, dim, generator=generator)
    mean = torch.randn(batch, heads, dim, generator=generator) * strength
    variance = torch.rand(batch, heads, dim, generator=generator) + 0.1
    return keys, mean, variance


def left_of(x, mean, variance, bits, group, dtype=torch.float32):
    codes, scale, zero = quantize_keys(x, mean, variance, bits, group, dtype)
    return dequantize(codes, scale, zero, bits, -2, torch.float32)


def damage(left, x, mean, variance):
    """Mean square of the error of a logit."""
    error = (left - x).double()
    along = (error * mean.double()[:, :, None]).sum(-1).square()
    return (along + (error.square() * variance.double()[:, :, None]).sum(-1)).mean().item()


@given(
    st.sampled_from(BITS), st.sampled_from([1, 2, 4]), st.integers(1, 2), st.sampled_from([8, 16]), st.integers(0, 50)
)
def test_agrees_with_the_exact_solution(bits, group, n, dim, seed):
    keys, mean, variance = draw(seed, n * group, dim)
    got, want = left_of(keys, mean, variance, bits, group).double(), reference(keys, mean, variance, bits, group)
    # a value half-way between two codes may go to either, and all channels of its token behind it with it
    same = ((got - want).abs() < 1e-4).all(-1)
    assert same.double().mean() > 0.8
    assert damage(got, keys, mean, variance) <= 1.05 * damage(want, keys, mean, variance) + 1e-6


@given(st.sampled_from(BITS), st.integers(0, 50), st.sampled_from([0.0, 1.0, 3.0]))
def test_logits_are_nearer_than_by_the_nearest_codes(bits, seed, strength):
    keys, mean, variance = draw(seed, 64, 32, strength=strength)
    nearest = dequantize(*quantize_pack(keys, bits, 32, -2, torch.float16), bits, -2, torch.float32)
    ours = left_of(keys, mean, variance, bits, 32, torch.float16)
    limit = {0.0: 1.01, 1.0: 0.9, 3.0: 0.5}[strength]
    assert damage(ours, keys, mean, variance) < limit * damage(nearest, keys, mean, variance)


def test_real_queries_of_that_mean_are_answered_better():
    keys, mean, variance = draw(7, 256, 64, strength=1.0)
    noise = torch.randn(2, 2, 100, 64, generator=torch.Generator().manual_seed(8))
    query = mean[:, :, None] + noise * variance.sqrt()[:, :, None]
    nearest = dequantize(*quantize_pack(keys, 2, 32, -2, torch.float16), 2, -2, torch.float32)
    ours = left_of(keys, mean, variance, 2, 32, torch.float16)
    assert (query @ (ours - keys).mT).square().mean() < 0.5 * (query @ (nearest - keys).mT).square().mean()


@pytest.mark.parametrize("bits", BITS)
def test_without_a_mean_it_is_rounding_to_the_nearest_code(bits):
    keys, mean, variance = draw(1, 16)
    codes, scale, zero = quantize_keys(keys, 0 * mean, variance, bits, 8, torch.float32)
    step, start = (t.repeat_interleave(8, 2) for t in (scale, zero))
    want = ((keys - start) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)
    assert torch.equal(codes, pack(want, bits))


@pytest.mark.parametrize("bits", BITS)
def test_the_grid_is_the_middle_of_the_range(bits):
    keys, mean, variance = draw(2, 16)
    _, scale, zero = quantize_keys(keys, mean, variance, bits, 4, torch.float32)
    grouped = keys.unflatten(2, (-1, 4))
    low, high = grouped.amin(3), grouped.amax(3)
    assert torch.allclose(scale * (2**bits - 1), (high - low) * CLIP[bits], atol=1e-5)
    assert torch.allclose(2 * zero + scale * (2**bits - 1), low + high, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_that_of_quantize_pack(bits):
    keys, mean, variance = draw(3, 12)
    for got, want in zip(
        quantize_keys(keys, mean, variance, bits, 4, torch.bfloat16),
        quantize_pack(keys, bits, 4, -2, torch.bfloat16),
        strict=True,
    ):
        assert got.shape == want.shape and got.dtype == want.dtype


@given(st.sampled_from(BITS), st.lists(st.integers(1, 3), min_size=2, max_size=3))
def test_groups_one_after_the_other_are_all_at_once(bits, counts):
    keys, mean, variance = draw(4, 4 * sum(counts))
    whole = quantize_keys(keys, mean, variance, bits, 4, torch.float16)
    parts = [quantize_keys(x, mean, variance, bits, 4, torch.float16) for x in keys.split([4 * c for c in counts], 2)]
    assert all(torch.equal(torch.cat(x, 2), y) for x, y in zip(zip(*parts, strict=True), whole, strict=True))


def test_every_sample_and_head_has_its_own_queries():
    keys, mean, variance = draw(5, 16)
    whole = quantize_keys(keys, mean, variance, 2, 8, torch.float16)
    for b in range(2):
        for h in range(2):
            here = slice(b, b + 1), slice(h, h + 1)
            one = quantize_keys(keys[here], mean[here], variance[here], 2, 8, torch.float16)
            assert all(torch.equal(x, y[here]) for x, y in zip(one, whole, strict=True))


@pytest.mark.parametrize("scale", [0.0, 2.0**-30, 2.0**50])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_queries_of_any_size(scale, spread):
    """Only the ratio of mean and variance counts; queries that are all the same, or 0, divide nothing by 0."""
    keys, mean, variance = draw(6, 16)
    variance = variance * spread
    got = quantize_keys(keys, mean * scale, variance * scale**2, 2, 8, torch.float16)
    assert all(x.isfinite().all() for x in got)
    if scale > 0:
        want = quantize_keys(keys, mean, variance, 2, 8, torch.float16)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    order, gain, weight = plan(mean * scale, variance * scale**2)
    assert gain.isfinite().all() and weight.isfinite().all()
    assert torch.equal(order.sort(-1).values, torch.arange(16).expand(2, 2, -1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, -3.25, 333.0])
def test_a_constant_group_comes_back(bits, value):
    keys, mean, variance = draw(7, 8)
    left = left_of(torch.full_like(keys, value), mean, variance, bits, 4, torch.float16)
    assert ((left - value).abs() <= abs(value) * 2.0**-11 + 2.0**-11).all()


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_bits_are_2_4_or_8(bits):
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        quantize_keys(*draw(8), bits, 4, torch.float16)


def test_codes_fill_whole_bytes():
    with pytest.raises(ValueError, match="whole bytes"):
        quantize_keys(*draw(9, dim=6), 2, 4, torch.float16)


def test_nothing_in_nothing_out():
    keys, mean, variance = draw(10)
    codes, scale, zero = quantize_keys(keys[:, :, :0], mean, variance, 2, 4, torch.float16)
    assert codes.shape == (2, 2, 0, 4) and scale.shape == zero.shape == (2, 2, 0, 16)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_an_operator(bits, dtype):
    keys, mean, variance = draw(11)
    torch.library.opcheck(quantize_keys, (keys.to(dtype), mean, variance, bits, 4, torch.float16))


def test_compile_without_a_break():
    keys, mean, variance = draw(12)

    def there_and_back(x):
        return left_of(x, mean, variance, 2, 4)

    assert torch.equal(torch.compile(there_and_back, fullgraph=True, backend="eager")(keys), there_and_back(keys))


def test_layout_in_memory_does_not_matter():
    keys, mean, variance = draw(13, 16)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    for got, want in zip(
        quantize_keys(strided, mean, variance, 2, 4, torch.float16),
        quantize_keys(keys, mean, variance, 2, 4, torch.float16),
        strict=True,
    ):
        assert torch.equal(got, want)
