"""transformers pipelines take a patched model as it is."""

from pathlib import Path

import pytest
import skimage.data
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import vlmaccel.pipelines
from tests.support import qwen_vl
from tests.support.models import IMAGE, VIDEO, VOCAB, build
from tests.support.tiny_vqa import tiny_llava
from tests.support.vits import PATCHES, SIDE
from tests.support.vits import build as build_vit
from vlmaccel.methods import PyramidDrop, ToMe, Uniform

QUESTIONS = ("what color is the circle?", "is there a red shape?")


def messages(color, question):
    picture = {"type": "image", "image": Image.new("RGB", (40, 30), color)}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("method", [PyramidDrop(ratio=0.5), Uniform(layer=0, ratio=0.25)], ids=lambda m: m.name)
def test_image_text_to_text(method):
    model, processor = tiny_llava()
    chats = [messages("red", QUESTIONS[0]), messages("blue", QUESTIONS[1])]

    def answers(batch_size):
        pipe = hf.pipeline("image-text-to-text", model=model, processor=processor)
        assert pipe.model is model
        out = pipe(
            text=chats,
            batch_size=batch_size,
            generate_kwargs={"max_new_tokens": 6, "do_sample": False},
            return_full_text=False,
        )
        return [one[0]["generated_text"] for one in out]

    unpatched = answers(1)
    with vlmaccel.patched(model, "pyramiddrop", ratio=1.0):
        assert answers(1) == unpatched
    with vlmaccel.patched(model, method):
        singles = answers(1)
        assert vlmaccel.stats(model).mean_visual_tokens < vlmaccel.stats(model).nominal_visual_tokens
        assert answers(2) == singles
    assert answers(1) == unpatched


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen3-vl"])
def test_image_text_to_text_with_pictures_of_any_size(kind):
    model, processor = build(kind), qwen_vl.processor(kind, IMAGE, VIDEO, VOCAB)
    chats = []
    for sizes in ([(24, 32), (40, 16)], [(32, 32)], [(64, 16)]):
        pictures = [{"type": "image", "image": Image.new("RGB", size, "red")} for size in sizes]
        content = [{"type": "text", "text": "w5 w6 "}, *pictures, {"type": "text", "text": " w7 w8 w9"}]
        chats.append([{"role": "user", "content": content}])

    def answers(batch_size):
        pipe = hf.pipeline("image-text-to-text", model=model, processor=processor)
        assert pipe.model is model
        options = {"max_new_tokens": 6, "do_sample": False}
        out = pipe(text=chats, batch_size=batch_size, generate_kwargs=options, return_full_text=False)
        return [one[0]["generated_text"] for one in out]

    unpatched = answers(1)
    with vlmaccel.patched(model, "pyramiddrop", ratio=1.0):
        assert answers(3) == answers(1) == unpatched
    for method in (PyramidDrop(ratio=0.3), Uniform(layer=0, ratio=0.25)):
        with vlmaccel.patched(model, method):
            singles = answers(1)
            assert vlmaccel.stats(model).mean_visual_tokens < vlmaccel.stats(model).nominal_visual_tokens
            assert answers(3) == singles
            assert singles != unpatched
    assert answers(1) == unpatched


ASSET = Path(vlmaccel.__file__).parent / "assets" / "tiny-llava"


def answer(pipe, **kwargs):
    return pipe(text=messages("red", QUESTIONS[1]), return_full_text=False, **kwargs)[0]["generated_text"]


def test_the_task_vlmaccel_patches_the_model_it_loads():
    pipe = hf.pipeline("vlmaccel", model=str(ASSET), method="fastv", options={"layer": 2, "ratio": 0.25})
    plain = hf.pipeline("image-text-to-text", model=str(ASSET))
    assert vlmaccel.patching.is_patched(pipe.model) and not vlmaccel.patching.is_patched(plain.model)
    with vlmaccel.patched(plain.model, "fastv", layer=2, ratio=0.25):
        assert answer(pipe) == answer(plain)
    assert vlmaccel.stats(pipe.model).visual_tokens == [576, 576, 144, 144, 144, 144]


@pytest.mark.parametrize(
    ("given", "added"), [({}, ()), ({"method": "snapkv", "options": {"budget": 0.5}}, ("SnapKV",))]
)
def test_the_task_vlmaccel_takes_a_patched_model(given, added):
    model, processor = tiny_llava()
    vlmaccel.patch(model, "uniform", ratio=0.5)
    pipe = hf.pipeline("vlmaccel", model=model, processor=processor, **given)
    answer(pipe, max_new_tokens=2)
    assert pipe.model is model
    used = vlmaccel.stats(model).methods
    assert [method.partition("(")[0] for method in used] == ["Uniform", *added]


def test_the_task_vlmaccel_uses_the_familys_default():
    model, processor = tiny_llava()
    hf.pipeline("vlmaccel", model=model, processor=processor)
    assert vlmaccel.patching.is_patched(model)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "fastvv"}, ValueError, "there is no method 'fastvv'"),
        ({"method": "fastv", "options": {"share": 1}}, TypeError, "fastv has no option share"),
        ({"method": "fastv", "options": {"ratio": 2}}, ValueError, "ratio"),
    ],
)
def test_the_task_vlmaccel_says_what_is_wrong(given, error, message):
    model, processor = tiny_llava()
    with pytest.raises(error, match=message):
        hf.pipeline("vlmaccel", model=model, processor=processor, **given)
    assert not vlmaccel.patching.is_patched(model)


def test_a_method_is_not_for_one_call():
    model, processor = tiny_llava()
    pipe = hf.pipeline("vlmaccel", model=model, processor=processor)
    with pytest.raises(TypeError, match="method go into pipeline"):
        answer(pipe, method="fastv")


def test_text_generation():
    words = {f"w{i}": i for i in range(2, 100)} | {"<pad>": 0, "<unk>": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    model = build("llama")
    prompts = [" ".join(f"w{i}" for i in range(5, 25)), " ".join(f"w{i}" for i in range(40, 52))]

    def texts(batch_size):
        pipe = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
        out = pipe(prompts, batch_size=batch_size, max_new_tokens=6, do_sample=False, return_full_text=False)
        return [one[0]["generated_text"] for one in out]

    unpatched = texts(1)
    with vlmaccel.patched(model, "fastv", ratio=1.0):
        assert texts(2) == texts(1) == unpatched
    with vlmaccel.patched(model, "fastv", layer=1, ratio=0.3), torch.no_grad():
        singles = texts(1)
        assert vlmaccel.stats(model).stages
        assert texts(2) == singles
        assert singles != unpatched


def test_image_classification():
    model = build_vit("hf-vit")
    processor = hf.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    photographs = [Image.fromarray(photo) for photo in (skimage.data.astronaut(), skimage.data.chelsea())]

    def scores(batch_size=1):
        pipe = hf.pipeline("image-classification", model=model, image_processor=processor)
        assert pipe.model is model
        return [{row["label"]: row["score"] for row in rows} for rows in pipe(photographs, batch_size=batch_size)]

    unpatched = scores()
    with vlmaccel.patched(model, ToMe(r=0)):
        assert scores() == unpatched
    with vlmaccel.patched(model, ToMe(keep=0.5)):
        merged = scores()
        assert vlmaccel.stats(model).tokens[-1] == 1 + PATCHES // 2
        assert scores(batch_size=2) == [pytest.approx(one, abs=1e-5) for one in merged]
    assert merged != unpatched
    assert scores() == unpatched


@pytest.mark.parametrize("kind", ["hf-clip-model", "hf-siglip-model"])
def test_zero_shot_image_classification(kind):
    words = {f"w{i}": i for i in range(3, 60)} | {"<pad>": 0, "<unk>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=16
    )
    model = build_vit(kind)
    edge = {"height": SIDE, "width": SIDE}
    processor = hf.CLIPImageProcessor(size=edge, crop_size=edge)
    photograph = Image.fromarray(skimage.data.astronaut())

    def scores():
        pipe = hf.pipeline(
            "zero-shot-image-classification", model=model, tokenizer=tokenizer, image_processor=processor
        )
        assert pipe.model is model
        rows = pipe(photograph, candidate_labels=["w7", "w9", "w11"], hypothesis_template="w3 {} </s>")
        return {row["label"]: row["score"] for row in rows}

    unpatched = scores()
    with vlmaccel.patched(model, ToMe(r=0)):
        assert scores() == unpatched
    with vlmaccel.patched(model, ToMe(r=8)):
        assert scores() != unpatched
        assert vlmaccel.stats(model).tokens[-1] < vlmaccel.stats(model).tokens[0]
    assert scores() == unpatched
