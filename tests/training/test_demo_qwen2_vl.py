import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmaccel.evals.easy_vqa as data
from vlmaccel.training import demo_measure, demo_qwen2_vl, demo_qwen2_vl_stages, demo_stages
from vlmaccel.training.demo_packing import PACKED
from vlmaccel.training.demo_qwen2_vl_model import (
    FAMILY,
    IMAGE,
    VISUAL_TOKENS,
    build_model,
    build_processor,
    layout,
    merge,
    vision,
)

SHIPPED = Path(demo_qwen2_vl.__file__).parents[1] / "assets" / "tiny-qwen2-vl"


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model()


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32)


def ids(processor, content, images):
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=images, text=text, return_tensors="pt")


def test_chat_template_writes_answers(processor):
    plain = processor.apply_chat_template(
        [{"role": "user", "content": "describe the image."}, {"role": "assistant", "content": "red circle"}]
    )
    assert plain == ("<|im_start|>user\ndescribe the image.<|im_end|>\n<|im_start|>assistant\nred circle<|im_end|>\n")


def test_every_square_picture_has_the_same_number_of_tokens(processor):
    content = [{"type": "image"}, {"type": "text", "text": "describe the image."}]
    for side in [*range(16, 420, 7), 185, 192, 199, 1000]:
        inputs = ids(processor, content, [Image.new("RGB", (side, side))])
        assert inputs["image_grid_thw"].tolist() == [[1, 24, 24]], side
        assert int((inputs["input_ids"] == IMAGE).sum()) == VISUAL_TOKENS


def test_pictures_keep_their_proportions(processor):
    content = [{"type": "image"}, {"type": "text", "text": "describe the image."}]
    for size, grid in {(400, 100): [1, 12, 50], (90, 120): [1, 28, 20]}.items():
        assert ids(processor, content, [Image.new("RGB", size)])["image_grid_thw"].tolist() == [grid]


def test_layout_is_the_models_own(model, processor):
    content = [{"type": "image"}, {"type": "text", "text": "is there a red shape?"}]
    inputs = ids(processor, content, [Image.new("RGB", (90, 120))])
    _, height, width = (inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    place, here = layout(height, width), (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    start = int(here[0])
    assert torch.equal(positions[:, 0, here] - start, place.positions)
    assert (positions[:, 0, int(here[-1]) + 1] == start + place.extent).all()


@torch.no_grad()
def test_vision_is_what_the_model_sees(model, processor):
    """Pictures as the trainer gives them are those of the whole processor, and merging their patches gives the tokens."""
    sample = data.collages("test", images=1)[0]
    inputs = processor.image_processor(sample.image, return_tensors="pt")
    expected = model.model.get_image_features(**inputs).pooler_output[0]
    patches, tokens = vision(model, [np.asarray(sample.image)] * 2)
    for row in (*tokens, *merge(model, patches)):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    some = torch.tensor([3, 77, 140])
    torch.testing.assert_close(merge(model, patches[:, some])[1], expected[some], rtol=1e-4, atol=1e-5)


def test_tower_order_is_that_of_the_pixels(processor):
    """Patch by patch, the processor's rows are those of the picture at the places `TOWER_ORDER` names."""
    pixels = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    rows = processor.image_processor(pixels, do_resize=False, return_tensors="pt")["pixel_values"]
    patches = torch.from_numpy(pixels).view(24, 8, 24, 8, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
    expected = patches[demo_qwen2_vl_stages.TOWER_ORDER].flatten(1) / 127.5 - 1
    torch.testing.assert_close(rows.unflatten(1, (3, 2, 64))[:, :, 0].flatten(1), expected)


@torch.no_grad()
def test_patch_projection_is_the_convolution(model):
    embed = copy.deepcopy(model.model.visual.patch_embed)
    patches = torch.randn(5, 3 * 2 * 8 * 8)
    expected, names = embed(patches), list(embed.state_dict())
    embed.proj = demo_qwen2_vl_stages.PatchProjection(embed.proj)
    torch.testing.assert_close(embed(patches), expected, rtol=1e-4, atol=1e-5)
    assert list(embed.state_dict()) == names


def test_corners_show_what_they_say():
    rng = random.Random(0)
    for _ in range(20):
        rows, columns = rng.randint(1, 3), rng.randint(1, 3)
        part = demo_qwen2_vl_stages.corner(rng, rows, columns)
        assert part.pixels.shape == (64 * rows, 64 * columns, 3)
        assert part.objects and all(cell // 3 < rows and cell % 3 < columns for cell in part.objects)
        cells = part.pixels.reshape(rows, 64, columns, 64, 3).swapaxes(1, 2).reshape(rows * columns, -1, 3)
        for number, (pixels, background) in enumerate(zip(cells, part.backgrounds, strict=True)):
            cell = number // columns * 3 + number % columns
            differs = (abs(pixels.astype(int) - background) > 40).any()
            assert differs == (cell in part.objects)


def test_miniature_training_run(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_stages, "BINDING_BATCH", 2)
    for batch in ("VISION_BATCH", "JOINT_BATCH"):
        monkeypatch.setattr(demo_qwen2_vl_stages, batch, 2)
    out, work = tmp_path / "out", tmp_path / "work"
    demo_qwen2_vl.train(out, work, steps_scale=0.001)
    results = demo_qwen2_vl.evaluate(out, pictures=2, collage_count=1, generated=1)
    assert results["collage"]["all"]["count"] == demo_measure.QUESTIONS_EACH
    assert json.loads((out / "accuracy.json").read_text()) == results
    assert "license: apache-2.0" in (out / "README.md").read_text()
    saved = AutoModelForImageTextToText.from_pretrained(out)
    assert saved.dtype == torch.bfloat16 and saved.generation_config.eos_token_id == 3


@torch.no_grad()
def test_packed_grades_are_those_of_generate(shipped):
    processor = AutoProcessor.from_pretrained(SHIPPED)
    samples = data.collages("test", images=4, questions=3, seed=5)
    shipped.set_attn_implementation(PACKED)
    right = demo_measure.grade(shipped, processor, FAMILY, samples)
    shipped.set_attn_implementation("sdpa")
    for sample in samples:
        assert (demo_measure.generate(shipped, processor, sample) == sample.answers[0]) == all(right[sample.id])


@pytest.mark.parametrize("size", [4096, 192 * 128])
def test_shipped_checkpoint_answers_at_other_sizes(shipped, size):
    """Single pictures of 64 px at their own size (16 tokens), and larger."""
    processor = AutoProcessor.from_pretrained(SHIPPED)
    processor.image_processor.size = {"shortest_edge": size, "longest_edge": size}
    every = data.easy_vqa("test")
    samples = every[:: len(every) // 20]
    right = [demo_measure.generate(shipped, processor, sample) == sample.answers[0] for sample in samples]
    assert sum(right) >= 0.8 * len(right)


def test_shipped_checkpoint_is_small_and_measured(shipped):
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 8e6
    accuracy = json.loads((SHIPPED / "accuracy.json").read_text())
    assert accuracy["easy-vqa"]["all"]["count"] == 9673
    assert accuracy["easy-vqa"]["all"]["accuracy"] >= 0.99
    for kind in ("shape-of-color", "color-of-shape", "exists-color", "exists-pair"):
        assert accuracy["collage"][kind]["accuracy"] >= 0.95
    assert accuracy["generate"]["agreement"]["accuracy"] >= 0.95
    assert (SHIPPED / "README.md").read_text() == demo_qwen2_vl.model_card(accuracy, shipped.num_parameters())
