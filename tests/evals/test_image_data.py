import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from vlmaccel.evals.easy_vqa import CLASSES
from vlmaccel.evals.image_data import ImageData, need, read_data

WNIDS = ("n01440764", "n01443537", "n02123045")


def noise(seed, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Three classes, made in another order than theirs, with one to three pictures each."""
    for i, name in enumerate(reversed(WNIDS)):
        (tmp_path / name).mkdir()
        for j in range(i + 1):
            noise(10 * i + j, "L" if j else "RGBA").save(tmp_path / name / f"{j}.png")
    return tmp_path


def saved(path, **columns):
    datasets = pytest.importorskip("datasets")
    features, rows = datasets.Features({k: f for k, (f, _) in columns.items()}), {k: r for k, (_, r) in columns.items()}
    data = datasets.Dataset.from_dict(rows, features)
    data.save_to_disk(str(path))
    return data


def columns(labels=(1, 0, 1), names=("cat", "dog")):
    datasets = pytest.importorskip("datasets")
    pictures = [noise(i) for i in range(len(labels))]
    return {
        "note": (datasets.Value("string"), ["x"] * len(labels)),
        "kind": (datasets.ClassLabel(names=list(names)), list(labels)),
        "photo": (datasets.Image(), pictures),
    }


def test_easy_vqa():
    data = read_data("easy-vqa")
    assert (len(data), data.classes) == (880, CLASSES)
    assert len(set(data.ids)) == 880 and data.ids[3] == "easy-vqa/test/3"
    assert data.picture(0).size == (64, 64)


def test_image_folder(folder):
    data = read_data(str(folder))
    assert data.classes == WNIDS
    assert data.targets == [0, 0, 0, 1, 1, 2]
    assert list(data.ids)[2:4] == ["n01440764/2.png", "n01443537/0.png"]
    for i, target in enumerate(data.targets):
        assert data.ids[i].startswith(WNIDS[target])
        expected = Image.open(folder / data.ids[i]).convert("RGB")
        assert data.picture(i).mode == "RGB" and data.picture(i).tobytes() == expected.tobytes()


def test_spread_takes_of_every_class(folder):
    data = read_data(str(folder))
    assert data.spread(3).ids == [data.ids[0], data.ids[2], data.ids[4]]
    assert data.spread(3).targets == [0, 0, 1]
    assert data.spread(3).picture(2).tobytes() == data.picture(4).tobytes()
    assert data.spread(9) is data.spread(None) is data
    assert set(read_data("easy-vqa").spread(200).targets) == set(range(24))
    with pytest.raises(ValueError, match="at least one picture"):
        data.spread(0)


def test_saved_data_set(tmp_path):
    saved(tmp_path / "data", **columns())
    data = read_data(str(tmp_path / "data"))
    assert (data.classes, data.targets, data.ids) == (("cat", "dog"), [1, 0, 1], ["row-0", "row-1", "row-2"])
    assert data.picture(2).tobytes() == noise(2).tobytes()


def test_saved_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = saved(tmp_path / "plain", **columns())
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "one"))
    assert len(read_data(str(tmp_path / "one"))) == 3
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"has the splits train, test: name the directory of one, .*two/test"):
        read_data(str(tmp_path / "two"))
    assert len(read_data(str(tmp_path / "two" / "test"))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all: all.pop("kind"), "has no column of type ClassLabel, and needs one; it has note, photo"),
        (lambda all: all.pop("photo"), "has no column of type Image"),
        (lambda all: all.update(other=all["photo"]), r"has 2 columns \(photo, other\) of type Image"),
        (lambda all: all.update(columns((1, -1, 1))), "has 2 classes, but also a label -1"),
        (lambda all: all.update(columns(())), "has no pictures"),
    ],
)
def test_saved_data_that_cannot_be_used(tmp_path, change, message):
    wrong = columns()
    change(wrong)
    saved(tmp_path / "data", **wrong)
    with pytest.raises(ValueError, match=message):
        read_data(str(tmp_path / "data"))


def test_other_directories(tmp_path):
    with pytest.raises(ValueError, match="unknown data 'imagenet': neither easy-vqa, nor a directory"):
        read_data("imagenet")
    with pytest.raises(ValueError, match="is not a directory with a folder of pictures for every class"):
        read_data(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="is not a directory with a folder of pictures for every class"):
        read_data(str(tmp_path))


def test_unreadable_picture(folder):
    (folder / WNIDS[1] / "0.png").write_bytes(b"not a picture")
    data = read_data(str(folder))
    with pytest.raises(ValueError, match="cannot read the picture n01443537/0.png"):
        data.picture(3)


def test_worker_processes_can_read(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "data"
    saved(path, **columns())
    for data in (read_data(str(folder)), read_data(str(path)), read_data("easy-vqa").spread(2)):
        again = pickle.loads(pickle.dumps(data))
        assert isinstance(again, ImageData) and again.picture(1).tobytes() == data.picture(1).tobytes()


def test_missing_library_names_the_fix(tmp_path, monkeypatch):
    saved(tmp_path / "data", **columns())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is not installed: pip install 'vlmaccel\[vit\]'"):
        read_data(str(tmp_path / "data"))


def test_a_library_that_lacks_another_says_so(tmp_path, monkeypatch):
    (tmp_path / "halfway_there.py").write_text("import no_such_library_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="no_such_library_at_all"):
        need("halfway_there", "vit")
