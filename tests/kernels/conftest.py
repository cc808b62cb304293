"""Which process runs which kernel tests.

Where TRITON_INTERPRET=1 kernels run on CPU tensors and do not compile, without it the other way round, so one process
cannot do both: `interpreter` is for the first, `compiled` for the second. Both are left to `make test-kernels` (a folder
that is named on the command line is collected in spite of what is ignored here), and skip without Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = ["interpreter", "compiled"]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


def _reason_to_skip(folder: str) -> str | None:
    if find_spec("triton") is None:
        return "needs Triton"
    if folder == "interpreter" and not INTERPRETS:
        return "runs where TRITON_INTERPRET=1 is set in the shell"
    return "compiles nothing where TRITON_INTERPRET=1 is set" if folder == "compiled" and INTERPRETS else None


class _Skipped(pytest.Item):
    reason = ""

    def runtest(self) -> None:
        pytest.skip(self.reason)


class _NotImported(pytest.File):
    """A file of tests that would fail to import here."""

    def collect(self) -> Iterator[_Skipped]:
        item = _Skipped.from_parent(self, name="all")
        item.reason = _reason_to_skip(self.path.parent.name) or ""
        yield item


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> _NotImported | None:
    folder = module_path.parent.name
    if folder in collect_ignore_glob and _reason_to_skip(folder):
        return _NotImported.from_parent(parent, path=module_path)
    return None
