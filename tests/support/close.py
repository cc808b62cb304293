"""How near an operator must be to a float64 result."""

from __future__ import annotations

import torch
from torch import Tensor

# Root-mean-square error, in epsilons of the dtype, that a correct result stays below whatever order it adds in. A result
# in half precision is rounded once, from float32; one in float32 has the error of long sums.
STEPS = {torch.float64: 64.0, torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def assert_close(out: Tensor, golden: Tensor, torch_path: Tensor | None = None, steps: float | None = None) -> None:
    """The error of `out` is no more than that of its dtype, overall and in every row, and nothing is NaN that should not be.

    golden: the result in float64. torch_path: what torch's own operations give in the dtype of `out`. The
    root-mean-square error may be twice theirs, or `steps` epsilons (STEPS) of the size of the result if that is more. No
    value may be off by more than four times that, or four times `steps` epsilons of the largest value in its row (the last
    dimension), so that one bad row does not hide among many.
    """
    assert golden.dtype == torch.float64, "the golden result is in float64"
    assert out.shape == golden.shape, f"shape {tuple(out.shape)}, should be {tuple(golden.shape)}"
    if out.numel() == 0:
        return
    got, finite = out.double(), golden.isfinite()
    assert torch.equal(got[~finite].nan_to_num(nan=0.5), golden[~finite].nan_to_num(nan=0.5)), "other inf or NaN"
    broken = finite & ~got.isfinite()
    assert not broken.any(), (
        f"{int(broken.sum())} of {out.numel()} values not finite, first {broken.nonzero()[0].tolist()}"
    )
    error, golden = (got - golden).where(finite, 0), golden.where(finite, 0)
    unit = (STEPS[out.dtype] if steps is None else steps) * torch.finfo(out.dtype).eps
    allowed = unit * _rms(golden)
    if torch_path is not None:
        allowed = max(allowed, 2 * _rms((torch_path.double() - golden).where(finite, 0)))
    assert _rms(error) <= allowed, f"root-mean-square error {_rms(error):.3g}, allowed {allowed:.3g}"
    in_row = 4 * (unit * golden.abs().amax(-1, keepdim=True)).clamp(min=allowed)
    excess = error.abs() - in_row
    at = tuple((excess == excess.max()).nonzero()[0].tolist())
    assert excess[at] <= 0, (
        f"error {float(error[at]):.3g} at {list(at)}, allowed {float(in_row.expand_as(error)[at]):.3g}"
    )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
