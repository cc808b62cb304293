"""transformers pipelines take a patched model as it is."""

import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import vlmaccel
from tests.support.models import build
from tests.support.tiny_vqa import tiny_llava
from vlmaccel.methods import PyramidDrop, Uniform

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
