"""Which form of an operator a GPU gets: its Triton form, or its torch form where there is none for what is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch


def gpu_form(name: str, otherwise: Callable) -> Callable:
    """`launch` of `vlmaccel.kernels.gpu.<name>`, imported at the first call: Triton is needed on GPUs only.

    otherwise: the torch form, for a GPU or a platform without Triton's support and for what `fits` of that module declines.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device
        module = _triton_form(name) if _supported(device.index) else None
        if module is None or not module.fits(*args, **kwargs):
            return otherwise(*args, **kwargs)
        with torch.cuda.device(device):  # Triton launches on the current one
            return module.launch(*args, **kwargs)

    return call


@cache
def _triton_form(name: str) -> ModuleType | None:
    return None if find_spec("triton") is None else import_module(f"vlmaccel.kernels.gpu.{name}")


@cache
def _supported(device: int) -> bool:
    """Triton compiles bfloat16 products for matrix units from compute capability 8.0 on, and for every AMD GPU of ROCm."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
