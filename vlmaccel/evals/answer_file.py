"""The file that finished answers go to, one JSON line each, so that an interrupted evaluation can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

VQA = "vlmaccel eval vqa"


class AnswerFile:
    """Opens `path` for appending, or starts it with a line that holds the settings, in a field named by the command.

    A last line that was cut off by an interruption is removed. Raises ValueError if the file holds something else, or
    answers that were made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], command: str = VQA) -> None:
        self.rows: list[dict[str, Any]] = []
        self._command = command
        header = json.dumps({command: dict(settings)})
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole:
            self._read(path, whole.decode("utf-8", errors="replace").splitlines(), json.loads(header)[command])
        elif text and not header.encode().startswith(text):
            raise ValueError(f"{path} is not a file of answers; name another one")
        self._file = path.open("ab")
        self._file.truncate(len(whole))
        if not whole:
            self.write([json.loads(header)])

    def _read(self, path: Path, lines: list[str], settings: dict[str, Any]) -> None:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or (self._command not in row if number == 1 else "id" not in row):
                what = "is not a file of answers" if number == 1 else f"is damaged in line {number}"
                raise ValueError(f"{path} {what}; name another one")
            if number > 1:
                self.rows.append(row)
            elif (made_with := row[self._command]) != settings:
                raise ValueError(f"{path} was made with {_difference(made_with, settings)}; name another file")

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, each with an `id`, and hand them to the operating system at once."""
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *error: object) -> Literal[False]:
        self._file.close()
        return False


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    names = [name for name in (*ours, *theirs) if theirs.get(name) != ours.get(name)]
    return " and ".join(f"{name} {theirs.get(name)!r} instead of {ours.get(name)!r}" for name in dict.fromkeys(names))


def read_answers(path: Path) -> dict[str, str]:
    """The answers in a file that `vlmaccel eval vqa` wrote, by the question's id."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of answers {path}")
    first, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] or [{}]
    if VQA not in first:
        raise ValueError(f"{path} is not a file of answers")
    return {row["id"]: row["answer"] for row in rows}
