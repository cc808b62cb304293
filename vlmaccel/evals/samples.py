"""What every visual question answering data set is turned into."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class VQASample:
    """One question about one picture.

    Attributes:
        id: stable and unique, e.g. ``"easy-vqa/test/123"``.
        image: the picture, or the path of its file.
        question: the question as it is put to the model.
        answers: the accepted answers: one, or the several given by annotators.
        kind: the type of the question; empty if unknown.
        image_id: the same for all questions about one picture.
    """

    id: str
    image: Image.Image | str
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    image_id: str = ""
