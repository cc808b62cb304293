"""The shipped Qwen2-VL through its saved processors: pictures of any size, several in a prompt, videos, with and without methods."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import transformers as hf
from PIL import Image

import vlmaccel
from vlmaccel.evals.easy_vqa import easy_vqa, make_collage
from vlmaccel.methods import (
    EVS,
    DivPrune,
    MixedPrecisionKV,
    Pool,
    PyramidDrop,
    SnapKV,
    Uniform,
    ZipVL,
)
from vlmaccel.run import Modality

SHIPPED = Path(vlmaccel.__file__).parent / "assets" / "tiny-qwen2-vl"
OWN_SIZE = {"size": {"shortest_edge": 64 * 64, "longest_edge": 192 * 192}}  # pictures of these sizes are not resized
METHODS = [
    PyramidDrop(ratio=0.5),
    Uniform(layer=0, ratio=0.25),
    DivPrune(ratio=0.3),
    Pool(layer=1, ratio=0.25),
    SnapKV(budget=0.3, window=8),
    MixedPrecisionKV(residual=16),
    ZipVL(tau=0.9),
    [Uniform(layer=0, ratio=0.6), PyramidDrop(ratio=0.6), SnapKV(budget=0.5, window=8)],
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name if hasattr(m, "name") else "together")


@pytest.fixture(scope="module")
def model():
    return hf.AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor():
    return hf.AutoProcessor.from_pretrained(SHIPPED)


def collage(seed: int) -> Image.Image:
    return Image.fromarray(make_collage("test", random.Random(seed)).pixels)


def user(*pictures, question: str) -> list[dict]:
    parts = [
        {"type": "video", "video": p} if isinstance(p, np.ndarray) else {"type": "image", "image": p} for p in pictures
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def chats() -> list[list[dict]]:
    """Pictures of 16 to 144 tokens: one shape, part of a collage, a whole one, a photo."""
    part = collage(2).crop((0, 0, 192, 128))
    photo = Image.fromarray(skimage.data.astronaut()).resize((160, 96))
    return [
        user(easy_vqa()[0].image, question="what shape does the image contain?"),
        user(part, question="describe the image."),
        user(collage(3), question="is there a red shape?"),
        user(photo, question="what color is the circle?"),
    ]


def prepared(processor, chats, **images):
    kwargs = {"padding": True, "return_tensors": "pt", "images_kwargs": images}
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=kwargs
    )


def answers(model, processor, chats, **images) -> list[str]:
    """In one batch."""
    inputs = prepared(processor, chats, **images)
    written = model.generate(**inputs, max_new_tokens=18, do_sample=False)
    return processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def one_by_one(model, processor, chats, **images) -> list[str]:
    return [answers(model, processor, [chat], **images)[0] for chat in chats]


def test_pictures_of_several_sizes_are_padded_on_the_left(processor, chats):
    inputs = prepared(processor, chats, **OWN_SIZE)
    tokens = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    assert tokens == [16, 96, 144, 60]
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()


def test_native_sizes_are_understood(model, processor):
    """A picture of 64 px at 16 tokens."""
    samples = easy_vqa()[::400]
    asked = [user(sample.image, question=sample.question) for sample in samples]
    given = answers(model, processor, asked, **OWN_SIZE)
    assert np.mean([text == sample.answers[0] for text, sample in zip(given, samples, strict=True)]) > 0.85


@every_method
def test_a_batch_of_several_sizes_answers_like_single_prompts(model, processor, chats, method):
    unpatched = one_by_one(model, processor, chats, **OWN_SIZE)
    assert answers(model, processor, chats, **OWN_SIZE) == unpatched
    with vlmaccel.patched(model, method):
        singles = one_by_one(model, processor, chats, **OWN_SIZE)
        stats = vlmaccel.stats(model)
        assert stats.kv_bytes < stats.kv_bytes_full
        assert answers(model, processor, chats, **OWN_SIZE) == singles
    assert answers(model, processor, chats, **OWN_SIZE) == unpatched


def test_keeping_all_changes_nothing(model, processor, chats):
    inputs = prepared(processor, chats, **OWN_SIZE)
    with torch.no_grad():
        expected = model(**inputs).logits
        with vlmaccel.patched(model, "pyramiddrop", ratio=1.0):
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", [None, PyramidDrop(ratio=0.5), SnapKV(budget=0.3, window=8)])
def test_pipeline(model, processor, chats, method):
    """The pipeline's pictures have the size that the saved processor makes of them."""
    pipe = hf.pipeline("image-text-to-text", model=model, processor=processor)

    def asked(batch_size):
        options = {"max_new_tokens": 18, "do_sample": False}
        out = pipe(text=chats, batch_size=batch_size, generate_kwargs=options, return_full_text=False)
        return [one[0]["generated_text"].strip() for one in out]

    with vlmaccel.patched(model, method) if method else torch.no_grad():
        expected = one_by_one(model, processor, chats)
        assert asked(4) == asked(1) == expected


@every_method
def test_several_pictures_in_a_prompt(model, processor, method):
    several = [
        user(easy_vqa()[0].image, collage(4), question="describe the image."),
        user(collage(5).crop((0, 0, 64, 128)), question="is there a blue shape?"),
    ]
    with vlmaccel.patched(model, method):
        assert answers(model, processor, several, **OWN_SIZE) == one_by_one(model, processor, several, **OWN_SIZE)
        answers(model, processor, several, **OWN_SIZE)
        stats = vlmaccel.stats(model)
    assert stats.nominal_visual_tokens == (16 + 144 + 32) / 2
    images = stats.token_map.image
    assert [int((images[0] == number).sum()) for number in (0, 1)] == [16, 144]
    assert int((images[1] == 0).sum()) == 32


def test_a_still_video_is_the_picture(model, processor):
    """Two equal frames are what a picture is to the vision tower, and stand where it does."""
    picture = collage(6)
    with torch.no_grad():
        still = np.stack([np.asarray(picture)] * 2)
        video, image = (
            model(**prepared(processor, [user(what, question="what is the red shape?")])).logits[0, -1]
            for what in (still, picture)
        )
    torch.testing.assert_close(video, image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method", [*METHODS, EVS(ratio=0.5)], ids=lambda m: m.name if hasattr(m, "name") else "together"
)
def test_video(model, processor, method):
    """A shape that moves over a collage, in a batch with a picture."""
    scene, shape = np.asarray(collage(7)), np.asarray(collage(8))[:64, :64]
    frames = np.stack([scene] * 8)
    for i, frame in enumerate(frames):
        frame[64:128, 16 * i : 16 * i + 64] = shape
    asked = [user(frames, question="is there a blue shape?"), user(collage(9), question="what is the red shape?")]
    inputs = prepared(processor, asked)
    assert inputs["video_grid_thw"].tolist() == [[4, 24, 24]]
    with vlmaccel.patched(model, method):
        together = answers(model, processor, asked)
        stats = vlmaccel.stats(model)
        assert together == one_by_one(model, processor, asked)
    tokens = stats.token_map
    assert int((tokens.modality == Modality.VIDEO).sum()) == 4 * 144
    assert tokens.grid[0][tokens.modality[0] == Modality.VIDEO][:, 0].unique().tolist() == [0, 1, 2, 3]
    assert stats.kv_bytes < stats.kv_bytes_full
