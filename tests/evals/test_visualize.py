import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers as hf
from PIL import Image

import vlmaccel
from tests.support.models import build, inputs
from tests.support.tiny_vqa import PIXELS, tiny_llava
from vlmaccel.evals.visualize import PROMPT, draw, visualize
from vlmaccel.methods import FastV, ToMe

SIDE, PATCH = 48, 8
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """Wider than high, and neither smooth nor noise."""
    small = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(small).resize((96, 64), Image.Resampling.BICUBIC).save(path)
    return path


def images(figure):
    return {axes.get_title(loc="left"): axes.images[0].get_array() for axes in figure.axes}


def rows(figure):
    return [text.get_text() for text in figure.texts]


def vit():
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=SIDE, patch_size=PATCH))
    return model, hf.ViTImageProcessor(size={"height": SIDE, "width": SIDE})


def dinov2():
    torch.manual_seed(0)
    config = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
    )
    size = {"shortest_edge": 60}
    crop = {"height": SIDE, "width": SIDE}
    return hf.Dinov2Model(config), hf.BitImageProcessor(size=size, crop_size=crop, image_mean=[0.4, 0.5, 0.6])


def clip():
    torch.manual_seed(0)
    vision = dict(**SIZES, image_size=SIDE, patch_size=PATCH)
    text = dict(**SIZES, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return model, hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.mark.parametrize("make", [vit, dinov2, clip])
def test_models_of_transformers(make, photo, tmp_path):
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    figure = visualize(str(tmp_path), photo, options={"r": 6}, blocks=[0, 2])
    shown = images(figure)
    assert list(shown) == ["as the model sees it", "block 0: 31 tokens", "block 2: 19 tokens"]
    assert rows(figure) == [f"{tmp_path.name}: tome, r=6, in the vision tower"]
    # the very pixels that the processor made, enlarged
    values = processor(images=Image.open(photo), return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()
    pixels = 255 * (values * np.array(processor.image_std) + np.array(processor.image_mean))
    seen = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    large = np.asarray(seen.resize(shown["as the model sees it"].shape[1::-1], Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(large - shown["as the model sees it"]).max() <= 3


def test_shipped_model(photo):
    shown = images(visualize("tiny-vit", photo, options={"r": 16}))
    assert list(shown) == ["as the model sees it", *(f"block {i}: {257 - 16 * (i + 1)} tokens" for i in (1, 3, 5, 7))]


def test_model_of_open_clip(photo, tmp_path):
    vision = dict(image_size=SIDE, layers=2, width=32, head_width=8, patch_size=PATCH)
    text = dict(context_length=8, vocab_size=64, width=16, heads=2, layers=1)
    (tmp_path / "tiny-clip.json").write_text(json.dumps(dict(embed_dim=8, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(tmp_path)
    figure = visualize("open_clip:tiny-clip", photo, options={"r": 6})
    assert list(images(figure))[1:] == ["block 0: 31 tokens", "block 1: 25 tokens"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llava")
    for part in tiny_llava():
        part.save_pretrained(folder)
    return str(folder)


def test_tower_of_a_vision_language_model(checkpoint, photo):
    figure = visualize(checkpoint, photo, options={"r": 6}, prompt="is there a red shape?", blocks=[0])
    assert list(images(figure)) == ["as the model sees it", "block 0: 31 tokens"]
    assert rows(figure) == [f"{Path(checkpoint).name}: tome, r=6, in the vision tower"]


def test_groups_that_go_on_in_the_decoder(checkpoint, photo):
    figure = visualize(checkpoint, photo, options={"r": 6, "after": "carry"})
    assert [row.rpartition(" in ")[2] for row in rows(figure)] == ["the vision tower", "the decoder"]
    assert "from layer 0 on: 30 tokens" in images(figure)


def test_of_a_picture_in_pieces_the_whole_is_drawn(photo, tmp_path):
    """LLaVA-NeXT's tower gets the whole picture, then pieces of it."""
    small, processor = tiny_llava()
    grids = [[PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS]]
    configs = dict(vision_config=small.config.vision_config, text_config=small.config.text_config)
    config = hf.LlavaNextConfig(**configs, image_token_id=small.config.image_token_id, image_grid_pinpoints=grids)
    size = dict(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    kept = dict(patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    kept |= dict(chat_template=processor.chat_template, image_token=processor.image_token)
    pieces = hf.LlavaNextImageProcessor(**size, image_grid_pinpoints=grids)
    hf.LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path)
    hf.LlavaNextProcessor(pieces, processor.tokenizer, **kept).save_pretrained(tmp_path)
    figure = visualize(str(tmp_path), photo, options={"r": 6, "after": "carry"}, prompt="is there a red shape?")
    assert len(rows(figure)) == 2
    whole = Image.open(photo).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    for axes in figure.axes:
        if axes.get_title(loc="left") == "as the model sees it":
            drawn = axes.images[0].get_array()
            large = np.asarray(whole.resize(drawn.shape[1::-1], Image.Resampling.BICUBIC), dtype=int)
            assert np.abs(large - drawn).mean() < 3


def test_survivors_in_the_decoder(checkpoint, photo):
    figure = visualize(checkpoint, photo, "fastv", {"layer": 1, "ratio": 0.25})
    assert rows(figure) == [f"{Path(checkpoint).name}: fastv, layer=1, ratio=0.25, in the decoder"]
    shown = images(figure)
    assert list(shown) == ["as the model sees it", "from layer 1 on: 9 tokens"]
    original, left = shown.values()
    side = PIXELS // PATCH
    cell = len(original) // side
    same = (original == left).reshape(side, cell, side, cell, 3).all((1, 3, 4))
    assert same.sum() == 9


@pytest.mark.parametrize("kind", ["llava-clip-llama", "llava-next", "llava-onevision"])
def test_both_at_once(kind):
    model, batch = build(kind), inputs(kind, 1)
    vlmaccel.patch(model, [ToMe(r=2), FastV(layer=2)])
    with torch.inference_mode():
        model(**batch)
    stats = vlmaccel.stats(model)
    figure = draw(stats, Image.new("RGB", (24, 24)), blocks=[0])
    assert f"block 0: {stats.tower.tokens[1]} tokens" in images(figure)
    assert [row.rpartition(" in ")[2] for row in rows(figure)] == ["the vision tower", "the decoder"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("tiny-vit", dict(blocks=[8]), "there is no block 8: blocks of this tower are 0 to 7"),
        ("tiny-vit", dict(prompt=PROMPT), "a prompt is for a vision-language model, and tiny-vit is none"),
        ("tiny-vit", dict(dtype="fp8"), "unknown dtype 'fp8'"),
        ("timm:no_such_vit", {}, "cannot load timm:no_such_vit"),
        ("timm:local-dir:nowhere", {}, "there is no model directory nowhere"),
        ("./nowhere", {}, "there is no model directory ./nowhere"),
        (
            "llava",
            dict(method="fastv", options={"ratio": 0.5, "layer": 1}, blocks=[0]),
            "the method does nothing there",
        ),
        ("llava", dict(method="fastv", options={"ratio": 1.0, "layer": 1}), "the method dropped and merged nothing"),
    ],
)
def test_errors(model, options, message, photo, checkpoint):
    with pytest.raises(ValueError, match=message):
        visualize(checkpoint if model == "llava" else model, photo, **options)


def test_picture_that_cannot_be_read(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match="text.png"):
        visualize("tiny-vit", tmp_path / "text.png")
