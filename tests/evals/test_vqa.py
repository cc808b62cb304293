import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import vlmaccel
from tests.support.tiny_vqa import DEPTH, TOKENS, tiny_llava
from vlmaccel.evals import answer_file
from vlmaccel.evals.answer_file import AnswerFile, read_answers
from vlmaccel.evals.samples import VQASample
from vlmaccel.evals.vqa import evaluate, load, prepare
from vlmaccel.evals.vqa_data import read_jsonl, read_samples
from vlmaccel.training.demo_llava_model import IMAGE

QUESTIONS = [
    "what is the red shape?",
    "is there a blue circle?",
    "describe the image.",
    "what color is the triangle?",
]


@pytest.fixture(scope="module")
def tiny():
    return tiny_llava()


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny[1]


@pytest.fixture
def samples():
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "teal", "white")]
    pictures[2].paste((10, 20, 90), (8, 8, 40, 40))
    return [
        VQASample(f"q{i}", pictures[i % 3], QUESTIONS[i % 4], ("yes",), "yes/no" if i % 2 else "what", f"p{i % 3}")
        for i in range(7)
    ]


def ask_one(model, processor, sample, new):
    """An answer the long way round: one prompt, no padding."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=sample.image, text=text, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_batches_answer_like_single_prompts(model, processor, samples):
    result = evaluate(model, processor, samples, batch_size=3, max_new_tokens=4)
    assert [answer.id for answer in result.answers] == [sample.id for sample in samples]
    assert [answer.answer for answer in result.answers] == [ask_one(model, processor, s, 4) for s in samples]
    assert len({answer.answer for answer in result.answers}) > 1
    assert result.answers[0].cost == {}


def test_prompts_are_padded_on_the_left(processor, samples):
    batches = list(prepare(processor, samples, 4))
    assert [len(batch.samples) for batch in batches] == [4, 3]
    lengths = [n for batch in batches for n in batch.inputs["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths) and len(set(lengths)) == 2
    for batch in batches:
        mask = batch.inputs["attention_mask"]
        assert (mask.diff(dim=1) >= 0).all()
        assert ((batch.inputs["input_ids"] == IMAGE).sum(1) == TOKENS).all()
        ids = batch.inputs["input_ids"][0][mask[0] == 1]
        words = processor.tokenizer.convert_ids_to_tokens(ids[ids != IMAGE])
        assert "".join(words) == "<s>user:" + batch.samples[0].question.replace(" ", "") + "assistant:"


def test_instruction_follows_the_question(processor, samples):
    batch = next(prepare(processor, samples, 1, "a shape present?"))
    ids = batch.inputs["input_ids"][0]
    words = processor.tokenizer.convert_ids_to_tokens(ids[ids != IMAGE])
    assert words[-6:] == ["a", "shape", "present", "?", "assistant", ":"]


def test_scores(model, processor, samples):
    said = evaluate(model, processor, samples, max_new_tokens=2)
    right = [
        VQASample(s.id, s.image, s.question, (a.answer,) if i % 2 else ("no such answer",), s.kind, s.image_id)
        for i, (s, a) in enumerate(zip(samples, said.answers, strict=True))
    ]
    result = evaluate(model, processor, right, max_new_tokens=2)
    assert result.score == (3 / 7, 3 / 7, 7)
    assert result.by_kind() == {"what": (0, 0, 4), "yes/no": (1, 1, 3)}
    assert result.loyalty(said.texts()) == 1
    summary = json.loads(json.dumps(result.summary()))
    assert summary["kinds"]["yes/no"] == {"accuracy": 1, "exact_match": 1, "questions": 3}
    assert summary["settings"]["max_new_tokens"] == 2


def test_loyalty_counts_answers_that_differ(model, processor, samples):
    first = evaluate(model, processor, samples, max_new_tokens=3)
    other = evaluate(model, processor, samples, max_new_tokens=1)
    same = [a.answer == b.answer for a, b in zip(first.answers, other.answers, strict=True)]
    assert first.loyalty(other.texts()) == sum(same) / 7 < 1
    fewer = evaluate(model, processor, samples[:2], max_new_tokens=1)
    assert fewer.loyalty(other.texts()) == 1
    with pytest.raises(ValueError, match=r"no other answer to 5 questions, e\.g\. q2"):
        first.loyalty(fewer.texts())


def test_cost_of_a_patched_model(model, processor, samples):
    with vlmaccel.patched(model, "uniform", layer=1, ratio=0.25):
        cost = evaluate(model, processor, samples, batch_size=4, max_new_tokens=1).cost()
    assert cost["nominal_visual_tokens"] == TOKENS
    assert cost["visual_tokens"] == pytest.approx(TOKENS * (1 + 0.25 * (DEPTH - 1)) / DEPTH)
    assert cost["flops"] < 0.7 * cost["flops_full"]
    assert cost["kv_bytes"] < 0.7 * cost["kv_bytes_full"]
    assert evaluate(model, processor, samples[:1], max_new_tokens=1).cost() == {}


class Interrupted(Exception):
    pass


def interrupt_after(count):
    def tick(finished):
        nonlocal count
        count -= finished
        if count <= 0:
            raise Interrupted

    return tick


def test_resume(model, processor, samples, tmp_path):
    whole = evaluate(model, processor, samples, batch_size=2, max_new_tokens=3)
    out = tmp_path / "answers.jsonl"
    with pytest.raises(Interrupted):
        evaluate(model, processor, samples, 2, 3, out, tick=interrupt_after(4))
    assert len(out.read_text().splitlines()) == 5
    with out.open("a") as file:
        file.write('{"id": "q0", "ans')  # the line being written when the power went

    ticks = []
    resumed = evaluate(model, processor, samples, 2, 3, out, tick=ticks.append)
    assert ticks == [4, 2, 1]
    assert resumed == whole
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["id"] for row in rows[1:]) == [sample.id for sample in samples]

    with torch.no_grad():
        model.lm_head.weight.neg_()
        try:  # nothing is asked again, so the changed model does not show
            assert evaluate(model, processor, samples, 2, 3, out) == whole
        finally:
            model.lm_head.weight.neg_()


def test_a_larger_limit_goes_on(model, processor, samples, tmp_path):
    out = tmp_path / "answers.jsonl"
    evaluate(model, processor, samples[:3], 4, 1, out)
    ticks = []
    result = evaluate(model, processor, samples, 4, 1, out, tick=ticks.append)
    assert ticks == [3, 4]
    assert len(result.answers) == 7
    assert len(evaluate(model, processor, samples[:2], 4, 1, out).answers) == 2


def test_answers_of_other_settings_are_refused(model, processor, samples, tmp_path):
    out = tmp_path / "answers.jsonl"
    evaluate(model, processor, samples[:1], 1, 1, out, settings={"method": "none"})
    before = out.read_bytes()
    with pytest.raises(ValueError, match="made with method 'none' instead of 'pool'; name another file"):
        evaluate(model, processor, samples[:1], 1, 1, out, settings={"method": "pool"})
    with pytest.raises(ValueError, match="made with max_new_tokens 1 instead of 2"):
        evaluate(model, processor, samples[:1], 1, 2, out, settings={"method": "none"})
    changed = [VQASample("q0", samples[0].image, "is there a shape?", ("yes",))]
    with pytest.raises(ValueError, match="answer to another question q0: 'what is the red shape"):
        evaluate(model, processor, changed, 1, 1, out, settings={"method": "none"})
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"id": "q0"}\n', "[1]\n", "\n"])
def test_other_files_are_not_overwritten(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a file of answers"):
        AnswerFile(path, {})
    assert path.read_text() == content


def test_damaged_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, {}) as file:
        file.write([{"id": "a"}])
    path.write_text(path.read_text() + "oops\n" + '{"id": "b"}\n')
    with pytest.raises(ValueError, match="damaged in line 3"):
        AnswerFile(path, {})


def test_read_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, {}) as file:
        file.write([{"id": "a", "answer": "yes"}])
    assert read_answers(path) == {"a": "yes"}
    with pytest.raises(FileNotFoundError, match="there is no file of answers"):
        read_answers(tmp_path / "b.jsonl")
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="is not a file of answers"):
        read_answers(path)


@pytest.mark.parametrize("length", [0, 1, 10])
def test_a_file_cut_off_in_its_first_line_starts_again(tmp_path, length):
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, {"model": "x"}).__exit__()
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    AnswerFile(path, {"model": "x"}).__exit__()
    assert path.read_bytes() == whole


def test_answers_survive_a_killed_process(tmp_path):
    path = tmp_path / "answers.jsonl"
    code = (
        f"import os, pathlib, runpy; file = runpy.run_path({answer_file.__file__!r})['AnswerFile'];"
        f"file(pathlib.Path({str(path)!r}), {{}}).write([{{'id': 'a'}}]); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert AnswerFile(path, {}).rows == [{"id": "a"}]


def test_evaluate_needs_questions_with_different_ids(model, processor, samples):
    with pytest.raises(ValueError, match="there are no questions"):
        evaluate(model, processor, [])
    with pytest.raises(ValueError, match="several questions have the same id"):
        evaluate(model, processor, [samples[0], samples[0]])


def write_lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (30, 20), 200).save(tmp_path / "images" / "a.png")
    return "images/a.png"


def test_jsonl(model, processor, tmp_path, picture):
    path = write_lines(
        tmp_path / "data.jsonl",
        {
            "image": picture,
            "question": "is there a shape?",
            "answers": ["yes", "no"],
            "id": 7,
            "kind": "yesno",
        },
        "",
        {"image": picture, "question": "what color?", "answers": "gray"},
    )
    samples = read_samples(str(path))
    assert [(s.id, s.kind, s.answers) for s in samples] == [
        ("7", "yesno", ("yes", "no")),
        ("data.jsonl:3", "", ("gray",)),
    ]
    assert samples[0].image == str(tmp_path / picture)
    assert len(evaluate(model, processor, samples, max_new_tokens=1).answers) == 2


GOOD = {"image": "images/a.png", "question": "?", "answers": "yes"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "line 2: Expecting property name"),
        ("[]", "line 2: not a JSON object"),
        ({"question": "?", "answers": "yes"}, "line 2: no field 'image'"),
        ({"image": "images/a.png", "answers": "yes"}, "line 2: no field 'question'"),
        (GOOD | {"answers": []}, "line 2: answers must be a string or a list of strings, not empty"),
        (GOOD | {"answers": [3]}, "line 2: answers must be"),
        (GOOD | {"question": 3}, "line 2: question must be a string"),
        (GOOD | {"image": "images/b.png"}, r"line 2: there is no image .*images/b\.png"),
        (GOOD | {"id": "first"}, "line 2: id 'first' is that of line 1"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, picture, row, message):
    path = write_lines(tmp_path / "data.jsonl", GOOD | {"id": "first"}, row)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)


def test_jsonl_without_questions(tmp_path):
    with pytest.raises(ValueError, match="has no questions"):
        read_jsonl(write_lines(tmp_path / "data.jsonl", "", ""))


def test_unreadable_image(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    path = write_lines(tmp_path / "data.jsonl", {"image": "a.png", "question": "?", "answers": "yes"})
    with pytest.raises(ValueError, match=r"question data\.jsonl:1: cannot read its image"):
        list(prepare(processor, read_jsonl(path), 1))


def test_unknown_data():
    with pytest.raises(ValueError, match="unknown data 'vqa-v3': neither easy-vqa, nor collage, nor a JSONL file"):
        read_samples("vqa-v3")


@pytest.mark.parametrize(("data", "count"), [("easy-vqa", 9673), ("collage", 2500)])
def test_data_sets_by_name(data, count):
    assert len(read_samples(data)) == count


def test_load(model, processor, samples, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu")
    assert loaded[0].dtype == torch.float32 and not loaded[0].training
    expected = evaluate(model, processor, samples[:3], max_new_tokens=2)
    assert evaluate(*loaded, samples[:3], max_new_tokens=2).answers == expected.answers
    assert load(str(tmp_path), dtype="bfloat16", device_map="cpu")[0].dtype == torch.bfloat16


def test_load_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown dtype 'fp8'; choose from float32, bfloat16, float16, auto"):
        load(str(tmp_path), dtype="fp8")
    with pytest.raises(ValueError, match="not both"):
        load(str(tmp_path), device="cpu", device_map="auto")
