"""easy-VQA: a small data set that installs from PyPI, and a harder task made of its pictures.

An easy-VQA picture (64x64) shows a single shape, so a model answers even when most of the picture is gone.
The collage task puts 3-8 of these pictures, pairwise different in colour, in a 3x3 grid: the colour named in
the question has to be found and its shape read there. Pixels, labels and question templates are easy-VQA's.

Data: https://github.com/vzhou842/easy-VQA (MIT).
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlmaccel.evals.samples import VQASample

SPLITS = ("train", "test")
COLORS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
SHAPES = ("circle", "triangle", "rectangle")
CLASSES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
PICTURE_SIZE = 64
CELLS = 9  # of a collage, row by row
MAX_QUESTIONS = 32  # about one collage; a collage of three shapes does not give many more different ones

COLOR_OF_SHAPE = ("what color is the {}?", "what is the color of the {}?")
COLOR_EXISTS = (
    "is there a {} shape?",
    "is a {} shape present?",
    "does the image contain a {} shape?",
    "is there a {} shape in the image?",
)
COLOR_MISSING = (
    "is there not a {} shape?",
    "is no {} shape present?",
    "does the image not contain a {} shape?",
    "is there not a {} shape in the image?",
)
# color-of-shape depends most on finding the right place, so it is asked often
KIND_WEIGHTS = {
    "shape-of-color": 30,
    "color-of-shape": 22,
    "exists-color": 14,
    "exists-pair": 16,
    "describe": 8,
}


class Object(NamedTuple):
    color: str
    shape: str


class Question(NamedTuple):
    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Picture:
    """An easy-VQA picture; `label` is None where its questions do not tell both colour and shape."""

    index: int
    pixels: np.ndarray
    questions: tuple[Question, ...]
    label: Object | None

    @property
    def background(self) -> np.ndarray:
        corners = self.pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        return np.median(corners, axis=0).astype(np.uint8)


@dataclass(frozen=True)
class Collage:
    """A 3x3 grid of pictures: pixels (192, 192, 3), cell -> object, and the background of every cell."""

    pixels: np.ndarray
    objects: dict[int, Object]
    backgrounds: np.ndarray


def easy_vqa(split: str = "test") -> list[VQASample]:
    """All questions of a split (38,575 in train, 9,673 in test) about the native 64x64 pictures."""
    samples: list[VQASample] = []
    for picture in pictures(split):
        image = Image.fromarray(picture.pixels)
        image_id = f"easy-vqa/{split}/picture-{picture.index}"
        for question in picture.questions:
            name = f"easy-vqa/{split}/{len(samples)}"
            samples.append(VQASample(name, image, question.text, (question.answer,), question.kind, image_id))
    return samples


def collages(
    split: str = "test", images: int = 250, questions: int = 10, seed: int = 0, describe: bool = True
) -> list[VQASample]:
    """`questions` different questions about each of `images` collages; the same seed gives the same ones.

    The kinds are shape-of-color, color-of-shape, exists-color, exists-pair and, unless turned off, describe:
    all shapes in the order of `COLORS`, an answer of 6-16 words.
    """
    rng = random.Random(seed)
    samples: list[VQASample] = []
    for number in range(images):
        collage = make_collage(split, rng)
        image = Image.fromarray(collage.pixels)
        image_id = f"collage/{split}/{seed}/{number}"
        for i, question in enumerate(collage_questions(collage.objects, rng, questions, describe)):
            answers = (question.answer,)
            samples.append(VQASample(f"{image_id}/{i}", image, question.text, answers, question.kind, image_id))
    return samples


def classified(split: str = "test") -> list[tuple[Image.Image, int]]:
    """The pictures of a split as a classification task: RGB 64x64 and the index into `CLASSES`.

    Only those whose label is known: 3,542 of the 4,000 in train, 880 of the 1,000 in test.
    """
    return [
        (Image.fromarray(picture.pixels), CLASSES.index(f"{picture.label.color} {picture.label.shape}"))
        for picture in pictures(split)
        if picture.label
    ]


@functools.cache
def pictures(split: str) -> tuple[Picture, ...]:
    """Every picture of a split with its questions."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; easy-VQA has {' and '.join(SPLITS)}")
    try:
        import easy_vqa as package
    except ImportError as error:
        raise ImportError('easy-VQA is not installed: pip install "vlmaccel[demo]"') from error
    paths = getattr(package, f"get_{split}_image_paths")()
    asked: dict[int, list[Question]] = {index: [] for index in paths}
    for text, answer, index in zip(*getattr(package, f"get_{split}_questions")(), strict=True):
        asked[index].append(Question(text, answer, question_kind(text)))
    result = []
    for index in sorted(paths):
        with Image.open(paths[index]) as image:
            pixels = np.asarray(image.convert("RGB"))
        result.append(Picture(index, pixels, tuple(asked[index]), picture_label(asked[index])))
    return tuple(result)


def question_kind(text: str) -> str:
    """what-color, what-shape, yesno-color or yesno-shape, the latter two with -neg if negated."""
    if text.startswith("what"):
        return "what-color" if "color" in text else "what-shape"
    attribute = "color" if _words(text) & set(COLORS) else "shape"
    return f"yesno-{attribute}-neg" if _negated(text) else f"yesno-{attribute}"


def picture_label(questions: list[Question]) -> Object | None:
    """The colour and shape of a picture, which easy-VQA tells only through questions and answers."""
    true_words: set[str] = set()
    for text, answer, _ in questions:
        if answer not in ("yes", "no") or (answer == "yes") != _negated(text):
            true_words |= _words(text) | {answer}
    color = [word for word in COLORS if word in true_words]
    shape = [word for word in SHAPES if word in true_words]
    return Object(color[0], shape[0]) if color and shape else None


@functools.cache
def pictures_by_label(split: str) -> dict[Object, list[Picture]]:
    """The pictures of a split whose label is known, by that label."""
    result: dict[Object, list[Picture]] = {}
    for picture in pictures(split):
        if picture.label:
            result.setdefault(picture.label, []).append(picture)
    return result


def make_collage(split: str, rng: random.Random, count: int | None = None) -> Collage:
    """A collage of `count` pictures (3-8 if None); an empty cell has the background of some picture."""
    count = rng.randint(3, 8) if count is None else count
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    if rng.random() < 0.6:  # let one shape be there exactly once, so that its colour can be asked
        single = rng.choice(SHAPES)
        shapes = [rng.choice([shape for shape in SHAPES if shape != single]) for _ in range(count)]
        shapes[rng.randrange(count)] = single
    cells = rng.sample(range(CELLS), count)
    objects = {
        cell: Object(color, shape) for cell, color, shape in zip(cells, rng.sample(COLORS, count), shapes, strict=True)
    }
    tiles = np.empty((CELLS, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    backgrounds = np.empty((CELLS, 3), np.uint8)
    for cell in range(CELLS):
        if cell in objects:
            picture = rng.choice(pictures_by_label(split)[objects[cell]])
            tiles[cell] = picture.pixels
        else:
            picture = rng.choice(pictures(split))
            tiles[cell] = picture.background
        backgrounds[cell] = picture.background
    grid = tiles.reshape(3, 3, PICTURE_SIZE, PICTURE_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return Collage(grid.reshape(3 * PICTURE_SIZE, 3 * PICTURE_SIZE, 3), objects, backgrounds)


def collage_questions(
    objects: dict[int, Object], rng: random.Random, count: int, describe: bool = True
) -> list[Question]:
    """`count` different questions about a collage."""
    if not 0 < count <= MAX_QUESTIONS:
        raise ValueError(f"between 1 and {MAX_QUESTIONS} questions can be asked about a collage, not {count}")
    weights = {kind: weight for kind, weight in KIND_WEIGHTS.items() if describe or kind != "describe"}
    result: list[Question] = []
    while len(result) < count:
        (kind,) = rng.choices(list(weights), weights=list(weights.values()))
        question = _ask(kind, list(objects.values()), rng)
        if question and question not in result:
            result.append(question)
    return result


def _ask(kind: str, objects: list[Object], rng: random.Random) -> Question | None:
    """A question of this kind, or None if the collage gives none."""
    color, shape = rng.choice(objects)
    if kind == "shape-of-color":
        return Question(f"what is the {color} shape?", shape, kind)
    if kind == "color-of-shape":
        times = Counter(item.shape for item in objects)
        alone = [item for item in objects if times[item.shape] == 1]
        if not alone:
            return None
        color, shape = rng.choice(alone)
        return Question(rng.choice(COLOR_OF_SHAPE).format(shape), color, kind)
    if kind == "exists-color":
        absent = [name for name in COLORS if name not in {item.color for item in objects}]
        exists = not absent or rng.random() < 0.5
        negated = rng.random() < 0.5
        template = rng.choice(COLOR_MISSING if negated else COLOR_EXISTS)
        named = color if exists else rng.choice(absent)
        return Question(template.format(named), "yes" if exists != negated else "no", kind)
    if kind == "exists-pair":
        exists = rng.random() < 0.5
        # a colour that is there, with a wrong shape: knowing the colours is not enough
        named = shape if exists else rng.choice([name for name in SHAPES if name != shape])
        return Question(f"is there a {color} {named}?", "yes" if exists else "no", kind)
    in_order = sorted(objects, key=lambda item: COLORS.index(item.color))
    return Question("describe the image.", " ".join(f"{color} {shape}" for color, shape in in_order), kind)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _negated(text: str) -> bool:
    return bool(_words(text) & {"no", "not"})
