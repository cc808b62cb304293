import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmaccel.evals.easy_vqa as data
from vlmaccel.training import demo_llava, demo_llava_stages
from vlmaccel.training.demo_llava_model import (
    PACKED,
    VISUAL_TOKENS,
    VOCABULARY,
    answer_logits,
    build_model,
    build_processor,
    pack,
)

SHIPPED = Path(demo_llava.__file__).parents[1] / "assets" / "tiny-llava"


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32)


def test_every_word_of_the_data_is_in_the_vocabulary(processor):
    samples = data.easy_vqa("test") + data.collages("test", images=30)
    texts = {text for sample in samples for text in (sample.question, *sample.answers)}
    unknown = processor.tokenizer.unk_token_id
    assert all(unknown not in processor.tokenizer.encode(text) for text in texts)
    assert len(VOCABULARY) <= 64


def test_packed_prompt_is_the_processors_prompt(processor):
    sample = data.collages("test", images=1)[0]
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(images=sample.image, text=prompt)["input_ids"][0]
    positions = torch.arange(VISUAL_TOKENS)[None]
    packed = pack(processor.tokenizer, [[(sample.question, sample.answers[0])]], positions)
    asked = packed.ids[packed.labels < 0].tolist()
    image = [processor.image_token_id] * VISUAL_TOKENS
    assert [*packed.start.tolist(), *image, *asked] == expected
    plain = processor.apply_chat_template(
        [{"role": "user", "content": "describe the image."}, {"role": "assistant", "content": "red circle"}]
    )
    assert plain == "USER: describe the image. ASSISTANT: red circle</s>"


@torch.no_grad()
def test_packed_questions_do_not_see_one_another(processor):
    """The logits of every answer are those of the question alone behind the picture, by plain SDPA."""
    torch.manual_seed(0)
    model = build_model()
    dialogue = [(sample.question, sample.answers[0]) for sample in data.collages("test", images=1, questions=4)]
    visual = torch.randn(1, VISUAL_TOKENS, model.config.text_config.hidden_size)
    positions = torch.arange(VISUAL_TOKENS)[None]
    model.set_attn_implementation(PACKED)
    packed = pack(processor.tokenizer, [dialogue], positions)
    together = answer_logits(model, visual, packed)[0].split(packed.lengths)
    model.set_attn_implementation("sdpa")
    decoder = model.model.language_model
    for pair, logits in zip(dialogue, together, strict=True):
        alone = pack(processor.tokenizer, [[pair]], positions)
        text = decoder.embed_tokens(alone.ids)
        embeddings = torch.cat([decoder.embed_tokens(alone.start)[None], visual, text], dim=1)
        hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        answer = len(logits)
        torch.testing.assert_close(model.lm_head(hidden[0, -answer - 1 : -1]), logits, rtol=1e-4, atol=1e-4)


def test_patch_labels_mark_the_objects():
    collage = data.make_collage("train", random.Random(0))
    shapes, colors = demo_llava_stages.patch_labels(collage)
    for cell in range(data.CELLS):
        inside = cell == demo_llava_stages.CELL_OF_PATCH
        found_colors = set(colors[inside].tolist()) - {len(data.COLORS)}
        found_shapes = set(shapes[inside].tolist()) - {len(data.SHAPES)}
        if cell in collage.objects:
            color, shape = collage.objects[cell]
            assert found_colors == {data.COLORS.index(color)}
            assert found_shapes == {data.SHAPES.index(shape)}
        else:
            assert not found_colors
            assert not found_shapes


def test_some_patches_cover_every_object():
    collage = data.make_collage("train", random.Random(0))
    generator = torch.Generator().manual_seed(0)
    kept = demo_llava_stages.some_patches(collage, per_object=2, background=3, limit=40, generator=generator)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == 2 * len(collage.objects) + 3
    assert set(demo_llava_stages.CELL_OF_PATCH[kept].tolist()) >= set(collage.objects)


def test_miniature_training_run(tmp_path, monkeypatch):
    for batch in ("VISION_BATCH", "BINDING_BATCH", "JOINT_BATCH"):
        monkeypatch.setattr(demo_llava_stages, batch, 2)
    out, work = tmp_path / "out", tmp_path / "work"
    demo_llava.train(out, work, steps_scale=0.001)
    trained = {
        stage: (work / stage / "model.safetensors").stat().st_mtime_ns for stage in ("vision", "binding", "joint")
    }
    results = demo_llava.evaluate(out, pictures=2, collage_count=1, generated=1)
    assert results["collage"]["all"]["count"] == demo_llava.QUESTIONS_EACH
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
    right = [demo_llava.generate(shipped, processor, sample) == sample.answers[0] for sample in samples]
    assert sum(right) >= len(right) - 1


def test_shipped_checkpoint_is_small_and_measured():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 8e6
    accuracy = json.loads((SHIPPED / "accuracy.json").read_text())
    assert accuracy["easy-vqa"]["all"]["count"] == 9673
    assert accuracy["easy-vqa"]["all"]["accuracy"] >= 0.99
    for kind in ("shape-of-color", "color-of-shape", "exists-color", "exists-pair"):
        assert accuracy["collage"][kind]["accuracy"] >= 0.95
