"""What the commands share: how options are read, how progress and mistakes are shown."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Method = Annotated[str | None, typer.Option(help="One of `vlmaccel methods`; none: the model as it is.")]


Options = Annotated[list[str] | None, typer.Option("--option", help="Hyper-parameter of the method, e.g. ratio=0.25.")]


CONSTANTS = {name.lower(): name for name in ("True", "False", "None")}


def parse_options(pairs: list[str] | None, flag: str = "--option") -> dict[str, Any]:
    """key=value pairs; values are Python literals (0.5, None, 1,3,4; true, false and none in any case), or else text."""
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{flag} takes key=value, e.g. ratio=0.5, not {pair!r}")
        try:
            options[key] = ast.literal_eval(CONSTANTS.get(value.lower(), value))
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def parse_method(text: str) -> Any:
    """The method of NAME or NAME:key=value,key=value; a comma inside a value does not end it, e.g. ratios=0.5,0.25."""
    from vlmaccel.methods import make

    name, colon, rest = text.partition(":")
    return make(name, **parse_options(re.split(r",(?=[A-Za-z_]\w*=)", rest) if colon else None, f"--method {name}:"))


def numbers(lists: list[str] | None) -> list[int]:
    try:
        return [int(part) for text in lists or () for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--r takes whole numbers, e.g. 4,8, not {' '.join(lists or ())!r}") from None


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend is said in one line, exit code 2; VLMACCEL_TRACEBACK=1 shows where it came from."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        if os.environ.get("VLMACCEL_TRACEBACK"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"vlmaccel: {lines[0]}", file=sys.stderr)
        raise typer.Exit(2) from None


class _Bar:
    """A progress bar that starts anew with every part of the work."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.task: Any = None

    def start(self, what: str, total: int) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(what, total=total or None)

    def advance(self, count: int) -> None:
        self.bar.advance(self.task, count)


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        yield _Bar(bar)


def save(facts: Any, out: Path | None) -> None:
    """Write a result as JSON and say so; nothing if no file is wanted."""
    if out:
        out.write_text(json.dumps(facts, indent=2) + "\n")
        show(f"wrote {out}")


def show(*parts: Any) -> None:
    from rich.console import Console

    # a file or a pipe has no width of its own: the widest table fits into this
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for part in parts:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
