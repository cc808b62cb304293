import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import vlmaccel
from tests.support.tiny_vqa import PIXELS, SIDE, TOKENS, tiny_llava
from vlmaccel.plots import BASELINES, Panel, Point, accuracy_plot, save, survivors, survivors_plot

NAMES = (
    "pyramiddrop",
    "fastv",
    "attention-sum",
    "magnitude",
    "neighbour-cosine",
    "random",
    "uniform",
    "pool",
)


def texts(figure):
    axes = figure.axes[0]
    return {text.get_text(): text for text in axes.texts}


def test_accuracy_plot_labels_every_line():
    curves = {name: [Point(0.6, 0.9 - i / 100), Point(0.4, 0.8 - i / 1000, 0.02)] for i, name in enumerate(NAMES)}
    figure = accuracy_plot(curves, 0.95, "collage", "FLOPs", "accuracy")
    figure.draw_without_rendering()
    labels = texts(figure)
    assert set(labels) == {*NAMES, "unpatched\n95.0"}
    # lines that end within a percent of one another still have labels apart
    heights = sorted(Text.get_window_extent(labels[name]).y0 for name in NAMES)
    assert min(np.diff(heights)) >= 0.8 * Text.get_window_extent(labels["fastv"]).height
    bounds = figure.axes[0].get_window_extent()
    for name in NAMES:
        box = Text.get_window_extent(labels[name])
        assert box.x0 >= bounds.x0 and box.y0 >= bounds.y0 - 1 and box.y1 <= bounds.y1 + 1


def test_accuracy_plot_draws_in_percent_and_in_order():
    figure = accuracy_plot({"fastv": [Point(0.6, 0.9), Point(0.4, 0.8)]}, 0.95, "", "", "")
    line = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() != "None")
    assert line.get_xdata() == pytest.approx([40, 60])
    assert line.get_ydata() == pytest.approx([80, 90])


def test_methods_differ_in_more_than_colour():
    curves = {name: [Point(0.6, 0.9), Point(0.4, 0.8)] for name in NAMES}
    figure = accuracy_plot(curves, 0.95, "", "", "")
    drawn = [container.lines[0] for container in figure.axes[0].containers]
    assert len({line.get_marker() for line in drawn}) == len(NAMES)
    assert len({line.get_color() for line in drawn}) == len(NAMES) - len(BASELINES) + 1


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def stats_of(picture, method, **options):
    model, processor = tiny_llava()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a red shape?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    with vlmaccel.patched(model, method, **options), torch.inference_mode():
        model(**inputs)
        return vlmaccel.stats(model)


def blocks(pixels):
    patch = PIXELS // SIDE
    return np.asarray(pixels).reshape(SIDE, patch, SIDE, patch, 3).swapaxes(1, 2).astype(int)


def test_survivors_of_dropping(picture):
    stats = stats_of(picture, "pyramiddrop", layers=(1, 3), ratio=0.5)
    stages = survivors(stats, picture)
    assert [layer for layer, _ in stages] == [1, 3]
    original = blocks(picture)
    kept = [(blocks(pixels) == original).all((2, 3, 4)) for _, pixels in stages]
    assert [int(k.sum()) for k in kept] == [TOKENS // 2, TOKENS // 4]
    assert (kept[0] >= kept[1]).all()
    # the very patches that the stage lists: three tokens come before the picture
    listed = stats.stages[1].keep[0] - 3
    listed = listed[(listed >= 0) & (listed < TOKENS)]
    assert sorted(listed.tolist()) == kept[1].flatten().nonzero()[0].tolist()
    assert blocks(stages[1][1])[~kept[1]].max() < 100


def test_survivors_of_merging(picture):
    ((layer, pixels),) = survivors(stats_of(picture, "pool", layer=1, ratio=0.25), picture)
    assert layer == 1
    shown, original = blocks(pixels), blocks(picture)
    assert np.abs(shown[:2, :2] - original[:2, :2].mean((0, 1, 2, 3))).max() <= 0.5
    assert len(np.unique(shown.reshape(TOKENS, -1), axis=0)) == TOKENS // 4


def test_survivors_needs_a_picture(picture):
    stats = stats_of(picture, "uniform", layer=1, ratio=0.5)
    with pytest.raises(ValueError, match="sample 0 has no picture 1"):
        survivors(stats, picture, image=1)


def test_survivors_plot(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    figure = survivors_plot([("is it red? no", [Panel("original", picture)] * 3), ("two", [Panel("a", picture)])])
    path = save(figure, tmp_path / "patches.png")
    assert Image.open(path).size[0] > 500
    shown = [axes for part in figure.subfigs for axes in part.axes if axes.images]
    assert len(shown) == 4
