import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vlmaccel
from vlmaccel.plots import Panel, save
from vlmaccel.plots_groups import default_blocks, enlarged, groups_plot, merged_groups
from vlmaccel.run import Stage
from vlmaccel.stats import TowerStats

ALONE = [[0, 1, 2], [3, 4, 5]]


def tower_stats(*groups, blocks=4, prefix=1, image=None, layers=(1, 2, 3), batch=1):
    """Of a tower that had `groups` (rows, columns) behind its blocks `layers`, the same in every picture."""
    stages, tokens = [], [prefix + np.size(groups[0] if groups else ALONE)]
    for layer, group in zip(layers, groups, strict=False):
        slots = torch.tensor(group).flatten()
        slots = torch.cat([torch.arange(prefix), torch.where(slots < 0, slots, slots + prefix)]).repeat(batch, 1)
        keep = torch.tensor([[i for i, s in enumerate(row) if s >= 0 and s not in row[:i]] for row in slots.tolist()])
        size = torch.stack([(slots == s).sum(1) for s in slots[0, keep[0]]], 1)
        stages.append(Stage(layer, keep, size, slots))
    for block in range(blocks):
        here = [stage for stage in stages if stage.layer == block]
        tokens.append(here[0].keep.shape[1] if here else tokens[-1])
    return TowerStats(("tome",), batch, blocks, prefix, tokens, image, 1.0, 1.0, tuple(stages))


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def cells(pixels, rows, columns):
    side = len(pixels) // rows
    return pixels.reshape(rows, side, columns, side, -1).swapaxes(1, 2)


def drawn(group, picture, **options):
    stats = tower_stats(group, **options)
    ((_, pixels),) = merged_groups(stats, picture, blocks=[1])
    return pixels, enlarged(picture, stats.tokens[0] - stats.prefix, stats.image)


def test_where_nothing_merged_the_picture_is_left():
    picture = noise(48, 32)
    for stats in (tower_stats(), tower_stats(ALONE), tower_stats([[0, 0, 1], [2, 3, 4]])):
        (_, pixels), *_ = merged_groups(stats, picture, blocks=[0])
        assert np.array_equal(pixels, enlarged(picture, 6))
    pixels, original = drawn(ALONE, picture)
    assert np.array_equal(pixels, original)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_groups_have_their_mean_colour_and_single_patches_their_pixels(prefix):
    group = np.array([[0, 1, 1], [2, 0, 3]])  # one of the groups is in two pieces
    pixels, original = drawn(group.tolist(), noise(48, 32), prefix=prefix)
    shown, before = cells(pixels, 2, 3), cells(original, 2, 3).astype(float)
    for slot in (0, 1):
        inside = shown[group == slot][:, 5:-5, 5:-5].reshape(-1, 3)
        assert (inside == inside[0]).all()
        assert np.abs(inside[0] - before[group == slot].mean((0, 1, 2))).max() <= 0.5
    for slot in (2, 3):
        assert np.array_equal(shown[group == slot], before[group == slot])


def test_outlines_are_where_groups_meet():
    group = np.array([[0, 0, 1], [0, 2, 1], [0, 1, 1]])
    pixels, original = drawn(group.tolist(), noise(33, 33))
    side = len(pixels) // 3
    label = group.repeat(side, 0).repeat(side, 1)
    other = np.zeros(label.shape, dtype=bool)
    for y, x in zip(*np.nonzero(label >= 0), strict=True):
        window = label[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        other[y, x] = (window != label[y, x]).any()
    colors = set()
    for slot in (0, 1):
        fill = original[label == slot].mean(0)
        outline = np.abs(pixels - fill).max(-1) > 0.5
        assert np.array_equal(outline[label == slot], other[label == slot])
        ring = {tuple(color) for color in pixels[(label == slot) & outline]}
        assert len(ring) == 1
        colors |= ring
    assert len(colors) == 2
    assert np.array_equal(pixels[label == 2], original[label == 2])


def test_neighbours_have_outlines_of_different_colours():
    rng = np.random.default_rng(1)
    group = rng.permutation(np.arange(144) // 2).reshape(12, 12)
    pixels, _ = drawn(group.tolist(), Image.new("RGB", (96, 96), "white"))
    corners = cells(pixels, 12, 12)[:, :, 0, 0].astype(int)
    assert len(np.unique(corners.reshape(-1, 3), axis=0)) > 60
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        inner = (group[a] != group[b])[1:, 1:]
        assert np.abs(corners[a] - corners[b]).max(-1)[1:, 1:][inner].min() > 20


def test_the_same_picture_every_time():
    group = [[0, 0, 1], [2, 1, 2]]
    assert np.array_equal(drawn(group, noise(48, 32))[0], drawn(group, noise(48, 32))[0])


def test_dropped_patches_are_dark():
    pixels, _ = drawn([[0, -1, 1], [-1, 2, 3]], Image.new("RGB", (48, 32), "white"))
    assert cells(pixels, 2, 3)[0, 1].max() < 100
    assert cells(pixels, 2, 3)[0, 0].min() == 255


def test_a_panel_for_every_block_asked_for():
    stats = tower_stats([[0, 0, 1], [2, 3, 4]], [[0, 0, 1], [2, 2, 3]], blocks=5, layers=(1, 3))
    blocks = merged_groups(stats, noise(48, 32), blocks=[4, 1, 2, 0])
    assert [block for block, _ in blocks] == [4, 1, 2, 0]
    pixels = dict(blocks)
    assert np.array_equal(pixels[1], pixels[2])  # block 2 merged nothing
    assert not np.array_equal(pixels[1], pixels[4])
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"no block {wrong}: blocks of this tower are 0 to 4"):
            merged_groups(stats, noise(48, 32), blocks=[wrong])


@pytest.mark.parametrize(
    ("layers", "blocks", "default"), [((), 12, [2, 5, 8, 11]), ((0, 9), 12, [1, 4, 7, 9]), ((0, 1), 2, [0, 1])]
)
def test_default_blocks(layers, blocks, default):
    stats = tower_stats(*[ALONE] * len(layers), layers=layers, blocks=blocks)
    assert default_blocks(stats) == default
    assert [block for block, _ in merged_groups(stats, noise(48, 32))] == default


def test_picture_of_another_sample():
    stats = tower_stats(ALONE, batch=2)
    stats.stages[0].group[1] = torch.tensor([0, 1, 1, 2, 3, 4, 5])
    ((_, first),), ((_, second),) = (merged_groups(stats, noise(48, 32), i, [1]) for i in (0, 1))
    assert np.array_equal(first, enlarged(noise(48, 32), 6))
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="no picture 2: the tower was given 2"):
        merged_groups(stats, noise(48, 32), 2)


@pytest.mark.parametrize(
    ("patches", "width", "height", "rows"), [(6, 48, 32, 2), (6, 32, 48, 3), (729, 384, 384, 27), (15, 83, 50, 3)]
)
def test_grids(patches, width, height, rows):
    """A picture that ends within a patch too: of SigLIP's 384 pixels, 27 patches of 14 take 378."""
    pixels = enlarged(Image.new("RGB", (width, height)), patches)
    assert pixels.shape[1] * rows == pixels.shape[0] * (patches // rows)


def test_what_is_in_no_patch_is_not_drawn():
    picture = Image.new("RGB", (384, 384), "white")
    picture.paste("black", (378, 0, 384, 384))
    picture.paste("black", (0, 378, 384, 384))
    assert enlarged(picture, 729)[:-2, :-2].min() == 255
    assert enlarged(picture.resize((768, 768), Image.Resampling.NEAREST), 729, (384, 384))[:-2, :-2].min() == 255


def test_patches_that_form_no_grid():
    with pytest.raises(ValueError, match="7 patches do not form a grid of squares on a picture of 48 x 32 pixels"):
        enlarged(noise(48, 32), 7)
    with pytest.raises(ValueError, match="6 patches do not form"):
        merged_groups(tower_stats(ALONE), noise(32, 32))


def test_groups_of_a_model():
    """Of a tower with class and register tokens, on a picture that is not square."""
    torch.manual_seed(0)
    sizes = dict(img_size=(32, 64), patch_size=8, embed_dim=32, depth=3, num_heads=2, reg_tokens=4)
    model = vlmaccel.patch(timm.create_model("vit_tiny_patch16_224", **sizes).eval(), "tome", r=5)
    picture = noise(64, 32)
    with torch.inference_mode():
        model(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1)
    stats = vlmaccel.stats(model)
    for block, pixels in merged_groups(stats, picture):
        group = stats.stages[block].group[0, 5:].reshape(4, 8).numpy()
        size = (group[..., None] == group.flatten()).sum(-1)
        same = (cells(pixels, 4, 8) == cells(enlarged(picture, 32), 4, 8)).all((2, 3, 4))
        assert np.array_equal(same, size == 1)
        assert (size > 1).any()


def test_plot_shows_every_panel_pixel_for_pixel(tmp_path):
    panels = [Panel(f"block {i}", np.array(noise(90, 60))) for i in range(7)]
    path = save(groups_plot([("in the vision tower", panels), ("in the decoder", panels[:1])]), tmp_path / "groups.png")
    image = np.asarray(Image.open(path).convert("RGB"))
    first = panels[0].pixels
    windows = np.lib.stride_tricks.sliding_window_view(image, first.shape)[:, :, 0]
    corner = (windows[:, :, 0, 0] == first[0, 0]).all(-1)
    found = [tuple(place) for place in np.argwhere(corner) if np.array_equal(windows[tuple(place)], first)]
    assert len(found) == 8
    assert len({top for top, _ in found}) == 3 and len({left for _, left in found}) == 5
