import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmaccel.evals.easy_vqa as data
from vlmaccel.training import demo_llava, demo_llava_stages, demo_measure, demo_stages
from vlmaccel.training.demo_llava_model import VOCABULARY, build_processor

SHIPPED = Path(demo_llava.__file__).parents[1] / "assets" / "tiny-llava"


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32)


def test_chat_template_writes_answers():
    plain = build_processor().apply_chat_template(
        [{"role": "user", "content": "describe the image."}, {"role": "assistant", "content": "red circle"}]
    )
    assert plain == "USER: describe the image. ASSISTANT: red circle</s>"
    assert len(VOCABULARY) <= 64


def test_miniature_training_run(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_stages, "BINDING_BATCH", 2)
    for batch in ("VISION_BATCH", "JOINT_BATCH"):
        monkeypatch.setattr(demo_llava_stages, batch, 2)
    out, work = tmp_path / "out", tmp_path / "work"
    demo_llava.train(out, work, steps_scale=0.001)
    trained = {
        stage: (work / stage / "model.safetensors").stat().st_mtime_ns for stage in ("vision", "binding", "joint")
    }
    results = demo_llava.evaluate(out, pictures=2, collage_count=1, generated=1)
    assert results["collage"]["all"]["count"] == demo_measure.QUESTIONS_EACH
    assert json.loads((out / "accuracy.json").read_text()) == results
    assert "license: apache-2.0" in (out / "README.md").read_text()
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.bfloat16
    # a second run finds every stage done
    demo_llava.train(out, work, steps_scale=0.001)
    assert trained == {stage: (work / stage / "model.safetensors").stat().st_mtime_ns for stage in trained}


def test_shipped_checkpoint_answers(shipped):
    processor = AutoProcessor.from_pretrained(SHIPPED)
    easy, hard = data.easy_vqa("test"), data.collages("test", describe=False)
    samples = [*easy[:: len(easy) // 3], *hard[:: len(hard) // 4]]
    right = [demo_measure.generate(shipped, processor, sample) == sample.answers[0] for sample in samples]
    assert sum(right) >= len(right) - 1


def test_shipped_checkpoint_is_small_and_measured(shipped):
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 8e6
    accuracy = json.loads((SHIPPED / "accuracy.json").read_text())
    assert accuracy["easy-vqa"]["all"]["count"] == 9673
    assert accuracy["easy-vqa"]["all"]["accuracy"] >= 0.99
    for kind in ("shape-of-color", "color-of-shape", "exists-color", "exists-pair"):
        assert accuracy["collage"][kind]["accuracy"] >= 0.95
    assert (SHIPPED / "README.md").read_text() == demo_llava.model_card(accuracy, shipped.num_parameters())
