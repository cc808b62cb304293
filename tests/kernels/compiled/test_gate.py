"""Every kernel compiles for every target as it is launched: nothing spills, everything fits, matrix units are used."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

import vlmaccel.kernels
from tests.support.triton_gate import compile_for
from vlmaccel.kernels.gpu.target import TARGETS

ROOT = Path(next(iter(vlmaccel.kernels.__path__)))
WITH_EXAMPLES = sorted(
    path.stem for path in (ROOT / "gpu").glob("*.py") if re.search(r"^def examples\(", path.read_text(), re.MULTILINE)
)
OPERATORS = sorted(name for path in ROOT.glob("*.py") for name in re.findall(r'gpu_form\("(\w+)"', path.read_text()))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_gate(name, target, record_property):
    examples = import_module(f"vlmaccel.kernels.gpu.{name}").examples(target)
    found = {}
    for example in examples:
        report = compile_for(target, example)
        share = "" if report.occupancy is None else f"{report.occupancy:.0%}"
        row = (report.registers, report.stack, report.shared, report.wide_loads, report.tensor_core or "-", share)
        record_property("kernel", "\t".join([name, example.name, target, *map(str, row)]))
        if violations := report.violations(example.tensor_core, example.wide_loads):
            found[example.name] = violations
    assert examples
    assert len({example.name for example in examples}) == len(examples)
    assert not found


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_all_that_the_dispatch_and_the_gate_ask_for(name):
    module = import_module(f"vlmaccel.kernels.gpu.{name}")
    assert all(hasattr(module, part) for part in ("launch", "fits", "CONFIGS", "examples"))
