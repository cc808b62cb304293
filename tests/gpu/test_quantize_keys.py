"""Keys rounded by their queries on a GPU: the grids of the CPU to the bit, and codes as good."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_quantize_keys import damage, draw
from vlmaccel.kernels.quantize_keys import quantize_keys, reference
from vlmaccel.kernels.quantize_pack import dequantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", DTYPES)
@pytest.mark.parametrize(("n", "dim", "group"), [(128, 128, 32), (80, 80, 8), (66, 72, 33)])
def test_is_that_of_the_cpu(n, dim, group, dtype, scale):
    keys, mean, variance = draw(0, n, dim)
    keys = keys.to(dtype)
    for bits in (2, 4, 8):
        want = quantize_keys(keys, mean, variance, bits, group, scale)
        got = quantize_keys(keys.cuda(), mean.cuda(), variance.cuda(), bits, group, scale)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got[1:], want[1:], strict=True))
        # sums of the plan have another order there, and what is half-way may go to either code
        assert (got[0].cpu() == want[0]).all(-1).double().mean() > 0.8
        left, expected = (dequantize(*x, bits, -2, torch.float32).cpu() for x in (got, want))
        assert damage(left, keys, mean, variance) <= 1.05 * damage(expected, keys, mean, variance)


def test_what_the_kernel_does_not_take():
    keys, mean, variance = (x.double() for x in draw(1, 16))
    got = quantize_keys(keys.cuda(), mean.cuda(), variance.cuda(), 2, 8, torch.float32)
    left = dequantize(*got, 2, -2, torch.float64).cpu()
    assert damage(left, keys, mean, variance) <= 1.05 * damage(
        reference(keys, mean, variance, 2, 8), keys, mean, variance
    )
    empty = quantize_keys(keys[:, :, :0].cuda(), mean.cuda(), variance.cuda(), 2, 8, torch.float16)
    assert empty[0].shape == (2, 2, 0, 4)
