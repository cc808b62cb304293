"""Which methods on the KV cache are compared, and at which budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlmaccel.evals.sweep import Candidate
from vlmaccel.hooks import Method
from vlmaccel.methods import (
    H2O,
    AdaKV,
    EntropyEviction,
    HessianEviction,
    LookM,
    PyramidKV,
    RandomEviction,
    Sensitivity,
    SnapKV,
    StreamingLLM,
    VLCache,
)

BUDGETS = (0.01, 0.05, 0.1, 0.2, 0.5)
WINDOW = 8  # a question of the shipped models' tasks has few tokens


def default_methods() -> tuple[Method, ...]:
    """What is compared if nothing else is said."""
    return (
        RandomEviction(),
        StreamingLLM(),
        H2O(),
        SnapKV(window=WINDOW),
        PyramidKV(window=WINDOW),
        AdaKV(window=WINDOW),
        VLCache(),
        LookM(),
        Sensitivity(window=WINDOW),
        HessianEviction(window=WINDOW),
        EntropyEviction(window=WINDOW),
    )


def candidates(methods: Sequence[Any], budgets: Sequence[float] = BUDGETS) -> list[Candidate]:
    """Every method at every budget. Raises ValueError for a method without a budget, or for a budget that is none."""
    for method in methods:
        if not hasattr(method, "budget"):
            raise ValueError(f"{method.name} has no budget to vary")
    return [Candidate(method.name, budget, replace(method, budget=budget)) for method in methods for budget in budgets]
