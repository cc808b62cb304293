"""Labelled pictures to measure classifiers on: a folder a class, a Hugging Face data set on disk, or easy-VQA."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlmaccel.evals.easy_vqa import CLASSES, classified

EASY_VQA = "easy-vqa"
HF_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")  # one of these is in what `save_to_disk` wrote


@dataclass(frozen=True, eq=False)
class ImageData:
    """Pictures with one label each.

    name: as the user gave it. classes: names of the classes. ids: of the pictures, stable and unique.
    targets: a picture's class, a number from 0 to len(classes) - 1.
    read: the picture with that number, as PIL gives it; can be pickled, for worker processes.
    """

    name: str
    classes: tuple[str, ...]
    ids: Sequence[str]
    targets: Sequence[int]
    read: Callable[[int], Image.Image]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(f"{self.name} has no pictures")
        if wrong := {target for target in self.targets if not 0 <= target < len(self.classes)}:
            raise ValueError(f"{self.name} has {len(self.classes)} classes, but also a label {min(wrong)}")

    def __len__(self) -> int:
        return len(self.ids)

    def picture(self, number: int) -> Image.Image:
        """The picture in RGB; raises ValueError if it cannot be read."""
        try:
            return self.read(number).convert("RGB")
        except OSError as error:
            raise ValueError(f"{self.name}: cannot read the picture {self.ids[number]}: {error}") from error

    def spread(self, count: int | None) -> ImageData:
        """`count` pictures evenly spread over the data, which may be sorted by class; all if there are fewer, or None."""
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise ValueError(f"at least one picture is needed, not {count}")
        chosen = [i * len(self) // count for i in range(count)]
        ids, targets = [self.ids[i] for i in chosen], [self.targets[i] for i in chosen]
        return replace(self, ids=ids, targets=targets, read=partial(_read_chosen, self.read, chosen))


def read_data(name: str) -> ImageData:
    """ "easy-vqa", a directory that `datasets` saved, or one with a folder of pictures for every class.

    Raises ValueError for anything else, for a data set without pictures or labels, and ImportError if `datasets` is
    needed and not there.
    """
    if name == EASY_VQA:
        return _easy_vqa()
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(f"unknown data {name!r}: neither {EASY_VQA}, nor a directory")
    if any((path / file).is_file() for file in HF_FILES):
        return _saved(name, path)
    return _image_folder(name, path)


def need(module: str, extra: str) -> Any:
    """An optional library, imported; ImportError says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is there, and fails to find something else
        raise ImportError(f"{module} is not installed: pip install 'vlmaccel[{extra}]'") from error


def _easy_vqa() -> ImageData:
    pictures, targets = zip(*classified("test"), strict=True)
    ids = [f"{EASY_VQA}/test/{i}" for i in range(len(pictures))]
    return ImageData(EASY_VQA, CLASSES, ids, targets, pictures.__getitem__)


def _image_folder(name: str, path: Path) -> ImageData:
    """The classes are the sorted folder names, which for ImageNet's (n01440764, ...) is the usual order."""
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:  # no folders, or one without pictures
        raise ValueError(f"{name} is not a directory with a folder of pictures for every class: {error}") from error
    ids = [Path(file).relative_to(path).as_posix() for file, _ in folder.samples]
    return ImageData(name, tuple(folder.classes), ids, folder.targets, partial(_read_file, path, ids))


def _saved(name: str, path: Path) -> ImageData:
    """Columns are found by their type; pictures are numbered by row."""
    datasets = need("datasets", "vit")
    try:
        data = datasets.load_from_disk(str(path))
    except IndexError as error:  # what it raises for a data set that was saved with no rows
        raise ValueError(f"{name} has no pictures") from error
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            raise ValueError(f"{name} has the splits {', '.join(data)}: name the directory of one, {path / min(data)}")
        (data,) = data.values()
    image, label = (_column(name, data, kind) for kind in (datasets.Image, datasets.ClassLabel))
    ids = [f"row-{i}" for i in range(len(data))]
    return ImageData(name, tuple(data.features[label].names), ids, list(data[label]), partial(_read_row, data, image))


def _column(name: str, data: Any, kind: type) -> str:
    found = [column for column, feature in data.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        named = f"{len(found)} columns ({', '.join(found)})" if found else "no column"
        raise ValueError(
            f"{name} has {named} of type {kind.__name__}, and needs one; it has {', '.join(data.features)}"
        )
    return found[0]


def _read_file(folder: Path, files: Sequence[str], number: int) -> Image.Image:
    with Image.open(folder / files[number]) as image:
        image.load()
        return image


def _read_row(data: Any, column: str, number: int) -> Image.Image:
    return data[number][column]


def _read_chosen(read: Callable[[int], Image.Image], chosen: Sequence[int], number: int) -> Image.Image:
    return read(chosen[number])
