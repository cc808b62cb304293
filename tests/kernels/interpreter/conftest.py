"""Kernels on CPU tensors, under Triton's interpreter: repaired, sanitized, and with memory that is NaN before it is written.

TRITON_INTERPRET=1 must be in the environment before Triton is imported, which transformers and torch.compile also do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import INTERPRETS


@pytest.fixture(autouse=True)
def sanitized() -> Iterator[None]:
    from tests.support import triton_repair, triton_sanitizer

    assert INTERPRETS
    triton_repair.install()
    torch.manual_seed(0)
    with triton_sanitizer.sanitize():
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that a kernel leaves unwritten are NaN; integers are odd and too large for any index."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max - 2)

        return allocated

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poison(getattr(Tensor, name)))
