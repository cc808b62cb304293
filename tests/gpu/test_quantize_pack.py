"""Low-bit codes on a GPU are those of the CPU, to the bit."""

from __future__ import annotations

import pytest
import torch

from vlmaccel.kernels.quantize_pack import dequantize, quantize_pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group"), [((1, 2, 64, 32, 128), 32), ((2, 3, 6, 16, 72), 8), ((5, 40, 80), 20)])
def test_the_same_bits(shape, group, dtype, dim):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 0.7
    group = group if shape[dim] % group == 0 else shape[dim]
    for bits in (2, 4, 8):
        for scale in DTYPES:
            x = x.to(dtype)
            want, got = (quantize_pack(y, bits, group, dim, scale) for y in (x, x.cuda()))
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
            back = dequantize(*got, bits, dim, dtype)
            assert torch.equal(back.cpu(), dequantize(*want, bits, dim, dtype))


def test_what_the_kernels_do_not_take():
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    want, got = (quantize_pack(y, 4, 4, -2, torch.float32) for y in (x, x.cuda()))
    left = dequantize(*got, 4, -2, torch.float64)
    assert torch.allclose(left.cpu(), dequantize(*want, 4, -2, torch.float64), atol=0.5)
    empty = quantize_pack(torch.empty(2, 0, 16, device="cuda"), 4, 4, -1, torch.float16)
    assert dequantize(*empty, 4, -1, torch.bfloat16).shape == (2, 0, 16)
