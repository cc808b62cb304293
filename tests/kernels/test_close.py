"""The comparison that all operators' tests use accepts roundings and nothing else."""

import pytest
import torch

from tests.support.close import assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_a_rounded_result(dtype):
    golden = torch.randn(20, 64, dtype=torch.double)
    assert_close(golden.to(dtype), golden)
    assert_close(golden.to(dtype)[:0], golden[:0])
    assert_close(0 * golden.to(dtype), 0 * golden)
    golden[3, 5], golden[4, 6] = torch.inf, torch.nan
    assert_close(golden.to(dtype), golden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["one value", "one row", "all a little", "nan", "inf", "shape"])
def test_finds(fault, dtype):
    golden = torch.randn(20, 64, dtype=torch.double)
    out = golden.to(dtype, copy=True)
    if fault == "one value":
        out[3, 5] += 1
    if fault == "one row":
        out[3] *= 1.2
    if fault == "all a little":
        out *= 1 + 4 * torch.finfo(dtype).eps * (100 if dtype in (torch.float32, torch.float64) else 1)
    if fault == "nan":
        out[3, 5] = torch.nan
    if fault == "inf":
        golden[3, 5] = torch.inf
    if fault == "shape":
        out = out[:, 1:]
    with pytest.raises(AssertionError):
        assert_close(out, golden)


def test_what_torch_itself_gives_is_near_enough():
    golden = torch.randn(20, 64, dtype=torch.double)
    out = golden + torch.randn(20, 64) * 1e-2
    assert_close(out.bfloat16(), golden, (golden + torch.randn(20, 64) * 1e-2).bfloat16())
    with pytest.raises(AssertionError):
        assert_close(out.bfloat16(), golden, golden.bfloat16())
