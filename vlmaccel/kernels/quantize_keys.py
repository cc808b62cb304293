"""Low-bit codes of keys whose errors cancel out along the queries that will ask for them.

A key is judged by its logits. If queries have the mean m and, channel by channel, the variance D, then an error e of a key
changes its logit by (m . e)^2 + sum_c D_c e_c^2 in the mean square. Rounding each channel to the nearest code minimises
neither; so channels are rounded one after the other, the strongest first, and each makes up for what those before it did
to m . e, as GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323) does for weights with a whole Hessian. With this one, diagonal
and one direction, a running sum for each token is all it takes. Bytes and their layout are those of `quantize_pack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmaccel.kernels.dispatch import gpu_form
from vlmaccel.kernels.quantize_pack import TINY, pack

_LIB = torch.library.Library("vlmaccel", "FRAGMENT")
_LIB.define(
    "quantize_keys(Tensor x, Tensor mean, Tensor variance, int bits, int group, ScalarType dtype) "
    "-> (Tensor codes, Tensor scale, Tensor zero)"
)

quantize_keys = torch.ops.vlmaccel.quantize_keys.default
"""quantize_keys(x, mean, variance, bits, group, dtype) -> (codes, scale, zero).

x: (B, H, n, d) float keys, n a multiple of `group`, d of 8 / bits. mean, variance: (B, H, d) float, of the queries; a
variance counts as at least FLOOR of the mean square of all channels. bits: 2, 4 or 8. group: neighbouring tokens that share
the scale of a channel. codes, scale and zero are as `quantize_pack(x, bits, group, -2, dtype)` lays them out, but the grid
of a group reaches over CLIP of the range of its values, in the middle, and codes may be others than the nearest.
"""

CLIP = {2: 0.85, 4: 1.0, 8: 1.0}
FLOOR = 0.01


def reference(x: Tensor, mean: Tensor, variance: Tensor, bits: int, group: int) -> Tensor:
    """What is left of x after quantisation with exact scales, in float64: for each channel, the best values of all that are
    not rounded yet are solved for, given the errors of those that are, and the first of them is rounded."""
    x, mean, variance = (t.double() for t in (x, mean, variance))
    square = mean.square() + variance
    floor = FLOOR * square.mean(-1, keepdim=True)
    grouped = x.unflatten(2, (-1, group))
    low, high = grouped.amin(3, keepdim=True), grouped.amax(3, keepdim=True)
    zero = low + (high - low) * (1 - CLIP[bits]) / 2
    scale = (high - low) * CLIP[bits] / (2**bits - 1)
    zero, scale = (t.expand_as(grouped).flatten(2, 3) for t in (zero, scale))
    left = x.clone()
    for b, h in [(b, h) for b in range(x.shape[0]) for h in range(x.shape[1])]:
        hessian = torch.outer(mean[b, h], mean[b, h]) + variance[b, h].maximum(floor[b, h]).diag()
        order = square[b, h].argsort(descending=True, stable=True)
        for number, c in enumerate(order):
            done, open_ = order[:number], order[number:]
            error = (left - x)[b, h]
            pull = error[:, done] @ hessian[done][:, open_]
            wanted = x[b, h, :, c] - torch.linalg.solve(hessian[open_][:, open_], pull.mT)[0]
            step, start = scale[b, h, :, c], zero[b, h, :, c]
            code = torch.where(step > 0, (wanted - start) / step, torch.zeros_like(step))
            left[b, h, :, c] = code.round().clamp(0, 2**bits - 1) * step + start
    return left


def plan(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For (B, H, d) float32 moments: order (B, H, d) int64, the channels as they are rounded, and in this order (B, H, d):
    how much of the error along the mean a channel takes back, and what its own error adds to that."""
    square = mean.square() + variance
    order = square.argsort(dim=-1, descending=True, stable=True)
    floor = (FLOOR * square.mean(-1, keepdim=True)).clamp(min=torch.finfo(torch.float).tiny)
    weight, variance = mean.gather(-1, order), variance.maximum(floor).gather(-1, order)
    rest = (weight.square() / variance).flip(-1).cumsum(-1).flip(-1)  # of this channel and those behind it
    return order, weight / (variance * (1 + rest)), weight


def _torch_form(
    x: Tensor, mean: Tensor, variance: Tensor, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if bits not in CLIP or x.shape[-1] % (8 // bits):
        raise ValueError(f"codes have 2, 4 or 8 bits and fill whole bytes, not {bits} bits of {x.shape[-1]} channels")
    order, gain, weight = plan(mean.float(), variance.float())
    grouped = x.float().unflatten(2, (-1, group))  # (B, H, N, group, d)
    low, high = grouped.aminmax(dim=3)
    margin = (high - low) * ((1 - CLIP[bits]) / 2)
    zero = (low + margin).to(dtype)
    scale = ((high - margin - zero.float()) / (2**bits - 1)).clamp(min=TINY[dtype]).to(dtype)
    # channels first, each (B, H, N, group) or (B, H, N, 1)
    columns, steps, starts = (
        t.gather(-1, order.view(*order.shape[:2], *[1] * (t.ndim - 3), -1).expand_as(t)).movedim(-1, 0).contiguous()
        for t in (grouped, scale.float().unsqueeze(3), zero.float().unsqueeze(3))
    )
    gain, weight = (t.movedim(-1, 0)[..., None, None] for t in (gain, weight))
    codes, off = torch.empty_like(columns, dtype=torch.uint8), torch.zeros_like(columns[:1]).squeeze(0)
    for c, (column, step, start) in enumerate(zip(columns, steps, starts, strict=True)):
        code = ((column - gain[c] * off - start) / step).round_().clamp_(0, 2**bits - 1)
        codes[c] = code
        off += weight[c] * (code * step + start - column)
    places = order.argsort(-1)[:, :, None, None].expand_as(grouped)
    return pack(codes.movedim(0, -1).gather(-1, places).flatten(2, 3), bits), scale, zero


def _fake(
    x: Tensor, mean: Tensor, variance: Tensor, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, n, dim = x.shape
    codes = x.new_empty(batch, heads, n, dim * bits // 8, dtype=torch.uint8)
    shape = batch, heads, n // group, dim
    return codes, x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


_LIB.impl("quantize_keys", _torch_form, "CompositeExplicitAutograd")
_LIB.impl("quantize_keys", gpu_form("quantize_keys", _torch_form), "CUDA")
torch.library.register_fake("vlmaccel::quantize_keys", _fake, lib=_LIB)
