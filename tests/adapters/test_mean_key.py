"""The mean of keys over heads, for every way that a projection lays them out."""

import pytest
import torch

from vlmaccel.adapters.mean_key import mean_key


def packed(batch, heads, n, dim):
    """Queries, keys and values of one projection, as timm has them."""
    return torch.randn(batch, n, 3, heads, dim).permute(2, 0, 3, 1, 4)[1]


LAYOUTS = {
    "packed": packed,
    "own projection": lambda batch, heads, n, dim: torch.randn(batch, n, heads, dim).transpose(1, 2),
    "contiguous": torch.randn,
    "without the last token": lambda batch, heads, n, dim: torch.randn(batch, heads, n + 1, dim)[:, :, :n],
    "the same for all samples": lambda batch, heads, n, dim: torch.randn(1, heads, n, dim).expand(batch, -1, -1, -1),
    "not in rows": lambda batch, heads, n, dim: torch.randn(batch, heads, n, dim + 1)[..., 1:],
    "transposed": lambda batch, heads, n, dim: torch.randn(batch, heads, dim, n).mT,
}


@pytest.mark.parametrize("shape", [(3, 4, 11, 8), (1, 1, 1, 16), (2, 3, 5, 24), (0, 2, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_mean(layout, dtype, shape):
    keys = LAYOUTS[layout](*shape).to(dtype)
    got = mean_key(keys)
    assert got.dtype == torch.float32 and got.shape == (shape[0], *shape[2:])
    want = keys.double().mean(1)
    error = torch.finfo(dtype).eps * keys.double().abs().sum(1) / shape[1] + 1e-6
    assert ((got - want).abs() <= error).all()
    alone = torch.cat([mean_key(x[None]) for x in keys]) if len(keys) else got
    assert torch.equal(got, alone)
