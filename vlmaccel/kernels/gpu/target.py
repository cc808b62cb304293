"""Which launch configuration a GPU gets. Tables, not autotuning: a table can be compiled and checked without the GPU."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

TARGETS = ("sm_80", "sm_86", "sm_90", "gfx942")


def target(x: Tensor) -> str:
    """The row of a kernel's table for the device of `x`: "sm_80" (A100), "sm_86" (GPUs with 100 KB of shared memory a
    block: GeForce and RTX, Ampere to Blackwell), "sm_90" (Hopper, B200), "gfx942" (AMD), or "interpreter" for a CPU tensor,
    which only Triton's interpreter can take."""
    return "interpreter" if x.device.type == "cpu" else _of_device(x.device.index)


@cache
def _of_device(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) == (8, 0):
        return "sm_80"
    return "sm_90" if major in (9, 10) else "sm_86"


class Example(NamedTuple):
    """A launch that is compiled ahead of time, to see what the compiler makes of it on every target."""

    name: str
    kernel: Any  # the function under @triton.jit
    args: (
        tuple  # as at the launch, but for tensors: their dtype, which stands for a pointer that is aligned to 16 bytes
    )
    meta: dict[str, Any]  # constexpr arguments
    options: dict[str, int]  # num_warps, num_stages
    tensor_core: bool  # it must use matrix units
    wide_loads: bool = True  # it must load 128 bits at a time somewhere
