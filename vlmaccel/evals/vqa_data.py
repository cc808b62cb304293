"""Where the questions of `vlmaccel eval vqa` come from: a data set by name, or a JSONL file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmaccel.evals.samples import VQASample


def read_samples(data: str) -> list[VQASample]:
    """The questions of "easy-vqa" (its test split), "collage" (made of its test pictures) or a JSONL file."""
    from vlmaccel.evals import easy_vqa

    if data == "easy-vqa":
        return easy_vqa.easy_vqa()
    if data == "collage":
        return easy_vqa.collages()
    if Path(data).is_file():
        return read_jsonl(Path(data))
    raise ValueError(f"unknown data {data!r}: neither easy-vqa, nor collage, nor a JSONL file that exists")


def read_jsonl(path: Path) -> list[VQASample]:
    """Questions from a file with one JSON object a line.

    Fields: image (path, relative to the file), question, answers (a string, or a list with one from each annotator),
    and optionally id and kind. Raises ValueError that names the line which is wrong.
    """
    samples: list[VQASample] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            sample = _sample(json.loads(line), path, number)
        except ValueError as error:  # a JSONDecodeError is one too
            raise ValueError(f"{path}, line {number}: {error}") from error
        if sample.id in seen:
            raise ValueError(f"{path}, line {number}: id {sample.id!r} is that of line {seen[sample.id]}")
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path} has no questions")
    return samples


def _sample(row: Any, path: Path, number: int) -> VQASample:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for name in ("image", "question", "answers"):
        if name not in row:
            raise ValueError(f"no field {name!r}")
    answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("answers must be a string or a list of strings, not empty")
    for name in ("image", "question", "kind"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"{name} must be a string")
    image = path.parent / row["image"]
    if not image.is_file():
        raise ValueError(f"there is no image {image}")
    name = str(row.get("id", f"{path.name}:{number}"))
    return VQASample(name, str(image), row["question"], tuple(answers), row.get("kind", ""), str(image))
