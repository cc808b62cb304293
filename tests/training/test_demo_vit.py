import json
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import use_fused_attn
from torch import nn

from vlmaccel.evals.easy_vqa import CLASSES, classified
from vlmaccel.training import demo_vit

SHIPPED = Path(demo_vit.__file__).parents[1] / "assets" / "tiny-vit"


def as_tensor(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def test_window_logits_are_those_of_the_window_alone():
    """A ViT for 64 px that has the positions under the window gives the same."""
    model = demo_vit.build_model().eval()
    alone = timm.create_model(demo_vit.ARCHITECTURE, **{**demo_vit.MODEL_ARGS, "img_size": 64}).eval()
    nn.init.normal_(model.pos_embed)
    drawn = random.Random(5)
    row, column = drawn.randint(0, 8), drawn.randint(0, 8)
    assert row != column
    positions = model.pos_embed[:, 1:].unflatten(1, (16, 16))[:, row : row + 8, column : column + 8].flatten(1, 2)
    state = {**model.state_dict(), "pos_embed": torch.cat([model.pos_embed[:, :1], positions], dim=1)}
    alone.load_state_dict(state)
    pixels = torch.rand(2, 3, 64, 64)
    expected = alone(pixels)
    torch.testing.assert_close(demo_vit.window_logits(model, pixels, random.Random(5)), expected, rtol=1e-4, atol=1e-5)
    whole = model(demo_vit.enlarge(pixels))
    assert whole.shape == expected.shape == (2, len(CLASSES))
    assert not torch.allclose(whole, expected)


def test_enlarging_is_what_the_checkpoints_transform_does():
    config = demo_vit.resolve_model_data_config(demo_vit.build_model())
    transform = demo_vit.create_transform(**config, is_training=False)
    images = [image for image, _ in classified("test")[:8]]
    expected = torch.stack([transform(image) for image in images])
    difference = (demo_vit.enlarge(as_tensor(images)) - expected).abs()
    assert difference.max() < 0.08  # the transform rounds to 256 steps, and clips, along one axis after the other
    assert difference.mean() < 0.001


def test_augmenting_shifts_and_mirrors():
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[..., 20, 30] = 1
    seen = {tuple(demo_vit.augment(pixels, random.Random(seed))[0, 0].nonzero()[0].tolist()) for seed in range(400)}
    rows, columns = map(set, zip(*seen, strict=True))
    assert rows == set(range(16, 25))
    assert columns == set(range(26, 35)) | set(range(29, 38))


def test_batches_see_every_picture_once_an_epoch():
    batches = demo_vit.endless_batches(10, 5)
    for _ in range(3):
        assert torch.cat([next(batches), next(batches)]).sort().values.tolist() == list(range(10))
    assert {len(next(demo_vit.endless_batches(11, 4))) for _ in range(5)} == {4}


def test_miniature_training_run(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_vit, "WINDOW_BATCH", 4)
    monkeypatch.setattr(demo_vit, "WHOLE_BATCH", 4)
    saved = {}

    def save(model, *args, **kwargs):
        saved["model"] = model
        timm.models.save_for_hf(model, *args, **kwargs)

    monkeypatch.setattr(demo_vit, "save_for_hf", save)
    demo_vit.train(tmp_path, steps_scale=0.0003)
    assert use_fused_attn()
    results = demo_vit.evaluate(tmp_path, pictures=8)
    assert json.loads((tmp_path / "accuracy.json").read_text()) == results
    assert results["float32"]["count"] == results["bfloat16"]["count"] == 8
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == list(CLASSES)
    pixels = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        trained = saved["model"].float().eval()
        torch.testing.assert_close(loaded(pixels), trained(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", demo_vit.PRECISIONS.values(), ids=demo_vit.PRECISIONS.keys())
def test_shipped_checkpoint_classifies(dtype):
    assert demo_vit.measure(demo_vit.load(SHIPPED, dtype), pictures=200)["top-1"] >= 0.995


def test_shipped_checkpoint_is_small_and_measured():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 3e6
    results = json.loads((SHIPPED / "accuracy.json").read_text())
    assert set(results) == set(demo_vit.PRECISIONS)
    for measured in results.values():
        assert measured["count"] == 880
        assert measured["top-1"] >= 0.995
    parameters = sum(p.numel() for p in demo_vit.build_model().parameters())
    assert (SHIPPED / "README.md").read_text() == demo_vit.model_card(results, parameters)
