import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vlmaccel
from tests.support.tiny_vqa import TOKENS, tiny_llava
from vlmaccel.cli import app
from vlmaccel.evals.multi_turn import CONVERSATION, MODES, SHARED_PREFIX, conversations, converse
from vlmaccel.evals.multi_turn_eval import evaluate_turns, read_turn_answers
from vlmaccel.evals.samples import VQASample
from vlmaccel.evals.vqa import evaluate

NEW = 5
ASKED = {
    "what is the red shape?": "circle",
    "is there a blue circle?": "yes",
    "describe the image.": "red circle blue triangle",
    "what color is the triangle?": "blue",
}


@pytest.fixture(scope="module")
def tiny():
    return tiny_llava()


@pytest.fixture(scope="module")
def samples():
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "teal", "white")]
    pictures[2].paste((10, 20, 90), (8, 8, 40, 40))
    return [
        VQASample(f"p{p}/{i}", picture, question, (answer,), image_id=f"p{p}")
        for i, (question, answer) in enumerate(ASKED.items())
        for p, picture in enumerate(pictures)
        if p < 2 or i < 2  # the last picture has two questions only
    ]


@pytest.fixture
def watched(tiny, monkeypatch):
    """The model, which notes the ids that each call of generate returns, the prompt, and the pictures encoded."""
    model, _ = tiny
    seen = {"prompts": [], "new": [], "pictures": 0}
    generate = model.generate

    def watch(input_ids, **inputs):
        written = generate(input_ids=input_ids, **inputs)
        ids = written if isinstance(written, torch.Tensor) else written.sequences
        seen["prompts"].append(input_ids[0].tolist())
        seen["new"].append(ids[0, input_ids.shape[1] :].tolist())
        return written

    def count(*call):
        seen["pictures"] += 1

    monkeypatch.setattr(model, "generate", watch)
    handle = model.model.vision_tower.register_forward_hook(count)
    yield model, seen
    handle.remove()


@pytest.mark.parametrize("mode", MODES)
def test_unpatched_turns_equal_prefilling_all_again(tiny, watched, samples, mode):
    (_, processor), (model, seen) = tiny, watched
    different = set()
    for questions in conversations(samples, 3).questions:
        for found in seen["prompts"], seen["new"]:
            found.clear()
        seen["pictures"] = 0
        answers = list(converse(model, processor, questions, NEW, mode))
        assert seen["pictures"] == 1
        prompts, new = list(seen["prompts"]), list(seen["new"])
        said = []
        for turn, (sample, answer) in enumerate(zip(questions, answers, strict=True)):
            text = f"USER: <image>\n{sample.question} ASSISTANT:"
            inputs = processor(images=sample.image, text=text, return_tensors="pt")
            ids = inputs["input_ids"][0].tolist()
            if said:
                text = f"</s>USER: {sample.question} ASSISTANT:"
                ids = said + processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert prompts[turn] == ids
            inputs = {"input_ids": torch.tensor([ids]), "pixel_values": inputs["pixel_values"]}
            again = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            assert again[0].tolist() == ids + new[turn]
            assert answer.answer == processor.tokenizer.decode(new[turn], skip_special_tokens=True).strip()
            assert (answer.id, answer.turn) == (sample.id, turn + 1)
            assert answer.kv_bytes == answer.kv_bytes_full > 0
            if mode == CONVERSATION:
                said = ids + new[turn]
        different |= {tuple(ids) for ids in new}
    assert len(different) > 2


def test_an_answer_that_ended_is_ended_once(tiny, watched, samples, monkeypatch):
    """The end token that was generated does not come twice where the chat template writes it too."""
    (_, processor), (model, seen) = tiny, watched
    (first, second, *_) = conversations(samples, 3).questions[0]
    list(converse(model, processor, [first], NEW))
    monkeypatch.setattr(model.generation_config, "eos_token_id", seen["new"][0][2])
    list(converse(model, processor, [first, second], NEW, CONVERSATION))
    prompt, answer, prompt_2 = seen["prompts"][1], seen["new"][1], seen["prompts"][2]
    assert answer == seen["new"][0][: len(answer)] and len(answer) <= 3
    assert prompt_2[: len(prompt) + len(answer) - 1] == prompt + answer[:-1]
    words = processor.tokenizer.convert_ids_to_tokens(prompt_2[len(prompt) + len(answer) - 1 :])
    assert "".join(words) == f"</s>user:{second.question.replace(' ', '')}assistant:"


def test_a_shared_prefix_with_dropped_tokens(tiny, samples):
    """A method that drops whatever the question leaves every question with what it would have if it came alone."""
    model, processor = tiny
    talks = conversations(samples, 3)
    unpatched = evaluate_turns(model, processor, talks, NEW)
    with vlmaccel.patched(model, "uniform", layer=1, ratio=0.25):
        result = evaluate_turns(model, processor, talks, NEW)
        alone = evaluate(model, processor, [s for q in talks.questions for s in q], 1, NEW)
    assert [a.answer for a in result.answers] == [a.answer for a in alone.answers]
    assert [a.answer for a in result.answers] != [a.answer for a in unpatched.answers]
    held, full = result.kv_bytes()
    assert held < full
    assert unpatched.kv_bytes() == (full, full)


def test_a_conversation_with_dropped_tokens(tiny, samples):
    """Every turn adds its text to the cache, and to what is left of the picture, which is not put in again."""
    model, processor = tiny
    talks = conversations(samples, 3)
    with vlmaccel.patched(model, "uniform", layer=1, ratio=0.25):
        result = evaluate_turns(model, processor, talks, NEW, CONVERSATION)
    text = model.config.text_config
    of_token = 2 * text.hidden_size * 4  # bytes in a layer, keys and values in float32
    saved = (TOKENS - TOKENS // 4) * of_token * (text.num_hidden_layers - 1)
    for first, _, last in zip(*[iter(result.answers)] * 3, strict=True):
        grown = last.kv_bytes_full - first.kv_bytes_full
        assert 10 <= grown / (of_token * text.num_hidden_layers) < TOKENS
        for answer in (first, last):  # the cache also holds which tokens are left, and has room for more
            assert 0 < answer.kv_bytes_full - answer.kv_bytes <= saved


def test_scores_by_turn(tiny, samples):
    model, processor = tiny
    talks = conversations(samples, 2)
    first = evaluate_turns(model, processor, talks, NEW)
    right = [
        VQASample(s.id, s.image, s.question, (a.answer if a.turn == 2 else "no such answer",), s.kind, s.image_id)
        for s, a in zip([s for q in talks.questions for s in q], first.answers, strict=True)
    ]
    marked = talks._replace(questions=[right[i : i + 2] for i in range(0, 12, 2)])
    result = evaluate_turns(model, processor, marked, NEW)
    assert {turn: part.score for turn, part in result.by_turn().items()} == {1: (0, 0, 6), 2: (1, 1, 6)}
    other = {answer.id: answer.answer if answer.turn == 1 else "something else" for answer in first.answers}
    assert result.loyalty(other) == {1: 1, 2: 0}
    summary = json.loads(json.dumps(result.summary()))
    assert summary["turns"]["2"]["exact_match"] == 1 and summary["left_out"] == 0
    assert summary["settings"]["turn_mode"] == SHARED_PREFIX


def test_every_turn_asks_the_same_questions(samples):
    talks = conversations(samples, 3, seed=1)
    assert talks.left_out == 1 and [len(questions) for questions in talks.questions] == [3] * 6
    for i in (0, 3):
        orders = talks.questions[i : i + 3]
        asked = {turn: {s.question for s in one} for turn, one in enumerate(zip(*orders, strict=True), start=1)}
        assert asked[1] == asked[2] == asked[3] and len(asked[1]) == 3
        assert "describe the image." in asked[1]  # the longest answer
        assert len({s.id for questions in orders for s in questions}) == 9
        assert {s.image_id for questions in orders for s in questions} == {f"p{i // 3}"}
        assert [s.id.rpartition("/")[2] for s in orders[1]] == ["turn-1", "turn-2", "turn-3"]


def test_the_seed_chooses_questions(samples):
    talks = conversations(samples, 3, seed=1)
    assert talks == conversations(samples, 3, seed=1)
    assert talks.questions[3:] == conversations([s for s in samples if s.image_id != "p0"], 3, seed=1).questions
    assert len({tuple(s.id for s in conversations(samples, 3, seed=seed).questions[0]) for seed in range(9)}) > 3
    assert conversations(samples, 2, limit=11).questions == conversations(samples, 2).questions[:4]


@pytest.mark.parametrize(
    ("turns", "limit", "message"),
    [
        (0, None, "must be at least 1, not 0"),
        (5, None, "no picture has 5 questions, the most is 4: ask for fewer turns"),
        (3, 8, "3 turns ask 9 questions about each picture: raise the limit of 8"),
    ],
)
def test_wrong_numbers(samples, turns, limit, message):
    with pytest.raises(ValueError, match=message):
        conversations(samples, turns, limit=limit)


def test_errors(tiny, samples, monkeypatch):
    model, processor = tiny
    questions = conversations(samples, 2).questions[0]
    with pytest.raises(ValueError, match="unknown turn mode 'chat'; choose from shared-prefix and conversation"):
        list(converse(model, processor, questions, NEW, "chat"))
    monkeypatch.setattr(processor, "chat_template", processor.chat_template.replace("'assistant'", "'nobody'"))
    with pytest.raises(ValueError, match="the chat template leaves earlier answers out"):
        list(converse(model, processor, questions, NEW, CONVERSATION))


class Interrupted(Exception):
    pass


def test_resume(tiny, samples, tmp_path):
    model, processor = tiny
    talks, out = conversations(samples, 2), tmp_path / "answers.jsonl"
    whole = evaluate_turns(model, processor, talks, NEW)

    def interrupt(count):
        raise Interrupted

    with pytest.raises(Interrupted):
        evaluate_turns(model, processor, talks, NEW, out=out, tick=interrupt)
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    out.write_text("".join(lines[:2]))  # a conversation that is there in part is held again
    ticks = []
    assert evaluate_turns(model, processor, talks, NEW, out=out, tick=ticks.append) == whole
    assert ticks == [2] * 6
    with torch.no_grad():
        model.lm_head.weight.neg_()
        try:  # nothing is asked again, so the changed model does not show
            assert evaluate_turns(model, processor, talks, NEW, out=out) == whole
        finally:
            model.lm_head.weight.neg_()
    with pytest.raises(ValueError, match="made with turn_mode 'shared-prefix' instead of 'conversation'"):
        evaluate_turns(model, processor, talks, NEW, CONVERSATION, out)


def test_command(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": question, "answers": answer} for question, answer in ASKED.items()]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = f"eval vqa --model {tmp_path} --data {tmp_path}/data.jsonl --turns 2 --max-new-tokens 2 --device cpu"
    plain = f"--out {tmp_path}/plain.jsonl"
    first = CliRunner().invoke(app, [*arguments.split(), *plain.split()])
    assert first.exit_code == 0, first.output
    others = read_turn_answers(
        tmp_path / "plain.jsonl",
        {"data": f"{tmp_path}/data.jsonl", "turns": 2, "turn_mode": SHARED_PREFIX, "seed": 0},
    )
    assert len(others) == 4
    more = f"--method uniform --option ratio=0.5 --loyal-to {tmp_path}/plain.jsonl"
    second = CliRunner().invoke(app, [*arguments.split(), *more.split()])
    assert second.exit_code == 0, second.output
    assert "loyalty" in second.output and "KV cache after the last turn" in second.output
    wrong = CliRunner().invoke(app, [*arguments.split(), *more.split(), "--seed", "1"])
    assert wrong.exit_code == 2 and "seed 0 instead of 1" in wrong.output
