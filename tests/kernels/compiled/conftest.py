"""Prints what every kernel takes on every target, after the tests."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("kernel", "example", "target", "registers", "local B", "shared B", "wide loads", "matrix units", "occupancy")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome)]
    # properties of a test also come back from the processes of pytest-xdist
    rows = sorted({value for r in reports for name, value in r.user_properties if name == "kernel"})
    if not rows:
        return
    table = Table(title="What the compiler makes of the kernels (estimated occupancy)")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number > 2 else "left")
    for row in rows:
        table.add_row(*row.split("\t"))
    terminalreporter.ensure_newline()
    Console(width=160, file=terminalreporter._tw._file, color_system=None).print(table)
