import sys
from collections import Counter

import numpy as np
import pytest

from vlmaccel.evals import easy_vqa as data

KINDS = {"shape-of-color", "color-of-shape", "exists-color", "exists-pair", "describe"}


@pytest.fixture(scope="module")
def collages():
    return data.collages("test", images=40, questions=12, seed=3)


def test_easy_vqa_has_all_test_questions():
    samples = data.easy_vqa("test")
    assert len(samples) == 9673
    assert len({sample.id for sample in samples}) == 9673
    assert all(sample.image.size == (64, 64) and len(sample.answers) == 1 for sample in samples)
    assert len({sample.image_id for sample in samples}) == len({id(sample.image) for sample in samples})
    assert set(Counter(sample.kind for sample in samples)) == {
        "what-color",
        "what-shape",
        "yesno-color",
        "yesno-color-neg",
        "yesno-shape",
        "yesno-shape-neg",
    }


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what color is the shape?", "what-color"),
        ("what is the red shape?", "what-shape"),
        ("is there a red shape?", "yesno-color"),
        ("does the image not contain a circle?", "yesno-shape-neg"),
    ],
)
def test_question_kind(question, kind):
    assert data.question_kind(question) == kind


def test_labels_agree_with_every_question():
    """Labels are collected from all questions of a picture; none may contradict them."""
    labelled = [picture for picture in data.pictures("test") if picture.label]
    assert len(labelled) == 880
    for picture in labelled:
        for question, answer, kind in picture.questions:
            if kind.startswith("what"):
                assert answer in picture.label
            else:
                named = [word for word in (*data.COLORS, *data.SHAPES) if word in question]
                true = all(word in picture.label for word in named)
                assert answer == ("yes" if true != kind.endswith("-neg") else "no")


@pytest.mark.parametrize(("split", "count"), [pytest.param("train", 3542, marks=pytest.mark.slow), ("test", 880)])
def test_classified_pictures(split, count):
    classified = data.classified(split)
    assert len(classified) == count
    assert {index for _, index in classified} == set(range(24))
    assert all(image.mode == "RGB" and image.size == (64, 64) for image, _ in classified)
    by_pixels = {picture.pixels.tobytes(): picture.label for picture in data.pictures(split) if picture.label}
    for image, index in classified[:50]:
        assert data.CLASSES[index] == " ".join(by_pixels[image.tobytes()])


def test_classes_are_all_pairs_of_color_and_shape():
    assert len(set(data.CLASSES)) == len(data.CLASSES) == 24
    assert data.CLASSES[0] == "red circle"
    assert all(color in data.COLORS and shape in data.SHAPES for color, shape in map(str.split, data.CLASSES))


def test_collage_answers_follow_from_its_objects():
    rng = np.random.default_rng(0)
    for seed in rng.integers(0, 10_000, 100).tolist():
        generator = data.random.Random(seed)
        objects = data.make_collage("test", generator).objects
        colors = {color: shape for color, shape in objects.values()}
        assert 3 <= len(objects) == len(colors) <= 8
        for text, answer, kind in data.collage_questions(objects, generator, 12):
            words = text.rstrip("?.").split()
            color = next((word for word in words if word in data.COLORS), None)
            shape = next((word for word in words if word in data.SHAPES), None)
            if kind == "shape-of-color":
                assert answer == colors[color]
            elif kind == "color-of-shape":
                assert [name for name, its in colors.items() if its == shape] == [answer]
            elif kind == "exists-color":
                assert answer == ("yes" if (color in colors) != bool({"no", "not"} & set(words)) else "no")
            elif kind == "exists-pair":
                assert color in colors
                assert answer == ("yes" if colors[color] == shape else "no")
            else:
                assert answer.split() == [
                    word for name in data.COLORS if name in colors for word in (name, colors[name])
                ]


def test_collages_are_what_was_asked_for(collages):
    assert len(collages) == 40 * 12
    assert len({sample.id for sample in collages}) == len(collages)
    assert len({sample.image_id for sample in collages}) == 40
    assert len({(sample.image_id, sample.question) for sample in collages}) == len(collages)
    assert {sample.kind for sample in collages} == KINDS
    assert {sample.image.size for sample in collages} == {(192, 192)}
    plain = data.collages("test", images=5, questions=20, describe=False)
    assert {sample.kind for sample in plain} == KINDS - {"describe"}


def test_collages_are_deterministic(collages):
    again = data.collages("test", images=40, questions=12, seed=3)
    assert [(s.id, s.question, s.answers) for s in again] == [(s.id, s.question, s.answers) for s in collages]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(again, collages, strict=True))
    other = data.collages("test", images=40, questions=12, seed=4)
    assert [s.question for s in other] != [s.question for s in collages]
    assert not {s.id for s in other} & {s.id for s in collages}


@pytest.mark.parametrize("split", data.SPLITS)
def test_collages_keep_to_their_split(split):
    known = {picture.pixels.tobytes(): picture.label for picture in data.pictures(split)}
    rng = data.random.Random(0)
    for _ in range(20):
        collage = data.make_collage(split, rng)
        for cell, label in collage.objects.items():
            row, column = divmod(cell, 3)
            tile = collage.pixels[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
            assert known[np.ascontiguousarray(tile).tobytes()] == label


def test_yes_and_no_are_balanced():
    samples = data.collages("test", images=100, questions=10)
    for kind in ("exists-color", "exists-pair"):
        answers = [sample.answers[0] for sample in samples if sample.kind == kind]
        assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_unknown_split():
    with pytest.raises(ValueError, match="train and test"):
        data.easy_vqa("validation")


@pytest.mark.parametrize("questions", [0, 33])
def test_impossible_number_of_questions(questions):
    with pytest.raises(ValueError, match="between 1 and 32"):
        data.collages(images=1, questions=questions)


def test_missing_package_names_the_fix(monkeypatch):
    data.pictures.cache_clear()
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r"vlmaccel\[demo\]"):
        data.easy_vqa()
