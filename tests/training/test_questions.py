"""Several questions behind one picture are the questions one by one."""

import json
import random

import pytest
import torch
from PIL import Image

import vlmaccel
from tests.support.models import build
from tests.support.tiny_vqa import TOKENS, tiny_llava
from vlmaccel.evals.easy_vqa import collages
from vlmaccel.evals.vqa import GREEDY, prepare
from vlmaccel.methods import Registers
from vlmaccel.training.questions import IGNORED, PADDING, SHARED, Dialogue, Packer, dialogues, packed, right, source


@pytest.fixture(scope="module")
def tiny():
    return tiny_llava()


@pytest.fixture(scope="module")
def talks():
    return dialogues(collages("test", images=2, questions=4))


def test_a_row_is_a_prefix_and_its_questions():
    prefix = torch.tensor([7, 8])
    rows = [(prefix, [(torch.tensor([1, 2, 3]), 2), (torch.tensor([4, 5]), 1)]), (prefix, [(torch.tensor([6]), 0)])]
    inputs, labels, question = packed(rows)
    assert inputs["input_ids"].tolist() == [[7, 8, 1, 2, 3, 4, 5], [7, 8, 6, 0, 0, 0, 0]]
    assert inputs["position_ids"].tolist()[0] == [0, 1, 2, 3, 4, 2, 3]
    assert labels.tolist()[0] == [IGNORED] * 4 + [3, IGNORED, 5]
    assert question.tolist() == [[SHARED, SHARED, 0, 0, 0, 1, 1], [SHARED, SHARED, 0, *[PADDING] * 4]]
    sees = inputs["attention_mask"][:, 0]
    assert sees[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    assert not sees[1, :3, 3:].any() and sees[1].any(1).all()


@pytest.mark.parametrize("method", [None, Registers(4, layer=2)])
@torch.no_grad()
def test_packed_answers_are_those_of_ordinary_prompts(tiny, talks, method):
    model, processor = tiny
    batch = Packer(model, processor)(talks)
    samples = [sample for sample in collages("test", images=2, questions=4)]
    if method is not None:
        vlmaccel.patch(model, method)
    try:
        logits = model(**batch.inputs).logits
        for number, sample in enumerate(samples):
            prompt = next(prepare(processor, [sample], 1)).inputs
            alone = model(**prompt).logits[0]
            row, question = divmod(number, 4)
            here = (batch.question[row] == question).nonzero().flatten()
            given = int((batch.labels[row, here] == IGNORED).sum())
            behind = prompt["input_ids"].shape[1] - given
            assert torch.equal(batch.inputs["input_ids"][row, here[:given]], prompt["input_ids"][0, behind:])
            assert torch.allclose(logits[row, here[:given]], alone[behind:], atol=1e-4)
    finally:
        vlmaccel.unpatch(model)


@torch.no_grad()
def test_right_is_what_generate_says(tiny, talks):
    """Questions whose answers are set to what the model says are right, others are not."""
    model, processor = tiny
    samples = collages("test", images=2, questions=4)
    said = []
    for sample in samples:
        inputs = next(prepare(processor, [sample], 1)).inputs
        written = model.generate(**inputs, **GREEDY, max_new_tokens=2)[0, inputs["input_ids"].shape[1] :]
        said.append(written.tolist())
    batch = Packer(model, processor)(talks)
    for number, words in enumerate(said):
        row, question = divmod(number, 4)
        here = ((batch.question[row] == question) & (batch.labels[row] != IGNORED)).nonzero().flatten()
        if number % 2:
            here = here[:2]
            batch.labels[row][(batch.question[row] == question)] = IGNORED
            batch.labels[row, here] = torch.tensor(words[: len(here)])
            batch.inputs["input_ids"][row, here] = torch.tensor(words[: len(here)])
    found = right(model(**batch.inputs).logits, batch)
    assert found[1::2] == [True] * 4
    assert len(found) == 8


def test_labels_are_the_answer_and_its_end(tiny, talks):
    model, processor = tiny
    batch = Packer(model, processor)(talks)
    tokenizer = processor.tokenizer
    for row, talk in enumerate(talks):
        for number, (_, answer) in enumerate(talk.questions):
            mine = batch.labels[row, (batch.question[row] == number) & (batch.labels[row] != IGNORED)]
            assert mine[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(mine[:-1]) == answer
    assert (batch.inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [TOKENS] * 2


def test_collages_are_drawn_anew_for_each_step_but_the_same_for_the_same():
    draw = source("collage")
    first, again, other = (draw(random.Random(seed), 2, 3) for seed in ("0/1", "0/1", "0/2"))
    assert [talk.questions for talk in first] == [talk.questions for talk in again]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, again, strict=True))
    assert first[0].image.tobytes() != other[0].image.tobytes()
    assert all(len(talk.questions) == 3 for talk in first)


def test_questions_of_a_file(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": f"q{i}?", "answers": [f"a{i}", "b"]} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (talk,) = source(str(tmp_path / "data.jsonl"))(random.Random(0), 1, 2)
    assert isinstance(talk, Dialogue)
    assert talk.image.getpixel((0, 0)) == (255, 0, 0)
    assert len(talk.questions) == 2 and set(talk.questions) <= {(f"q{i}?", f"a{i}") for i in range(3)}
    with pytest.raises(ValueError, match="unknown data"):
        source("nowhere")


def test_models_with_three_positions_a_token_are_refused(tiny):
    with pytest.raises(NotImplementedError, match="in Qwen2VLForConditionalGeneration a token has three"):
        Packer(build("qwen2-vl"), tiny[1])


def test_attention_that_takes_no_such_mask_is_refused(tiny):
    with pytest.raises(NotImplementedError, match='load it with attn_implementation="sdpa"'):
        Packer(build("llava-clip-llama", "eager"), tiny[1])
