import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tests.support.tiny_vqa import DEPTH, TOKENS, tiny_llava, tiny_qwen2_vl
from vlmaccel.cli import app
from vlmaccel.evals import budgets, demo, demo_report
from vlmaccel.evals.demo_report import standard_error
from vlmaccel.evals.vqa import answer, load, prepare


@pytest.fixture(scope="module", params=[tiny_llava, tiny_qwen2_vl])
def tiny(request):
    return request.param()


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = tiny
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Counted:
    """A progress bar that remembers."""

    def __init__(self):
        self.parts = [["", 0, 0]]

    def start(self, what, total):
        self.parts.append([what, total, 0])

    def advance(self, count):
        self.parts[-1][2] += count


def test_subset_is_fixed_and_spread():
    first, second = demo.subset(20, seed=0), demo.subset(20, seed=0)
    assert [s.id for s in first[0]] == [s.id for s in second[0]]
    assert len(first[0]) == 20 and len({s.image_id for s in first[0]}) == 4
    assert len(first[1]) == 2
    numbers = [int(s.id.split("/")[-1]) for s in first[1]]
    assert 2000 < numbers[0] < 3000 and 7000 < numbers[1] < 8000
    assert [s.question for s in demo.subset(20, seed=1)[0]] != [s.question for s in first[0]]


def test_encoded_pictures_give_the_same_answers(tiny):
    model, processor = tiny
    samples = demo.subset(10, seed=3)[0]
    task = demo.encode(model, processor, samples, Counted())
    assert all("pixel_values" not in batch.inputs for batch in task.batches)
    straight = {a.id: a for batch in answer(model, processor, prepare(processor, samples, 4), 3) for a in batch}
    encoded = {a.id: a for batch in answer(model, processor, task.batches, 3) for a in batch}
    assert straight == encoded
    assert len({a.answer for a in straight.values()}) > 1


def test_faster_of_two_dtypes_is_a_clean_load(checkpoint):
    model, _ = demo.load_faster(str(checkpoint), demo.subset(5, seed=0)[0])
    assert model.dtype in (torch.float32, torch.bfloat16)
    straight, _ = load(str(checkpoint), str(model.dtype).removeprefix("torch."))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), straight.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), straight.parameters(), strict=True))


@pytest.mark.parametrize("tiny", [tiny_llava, pytest.param(tiny_qwen2_vl, marks=pytest.mark.slow)], indirect=True)
def test_demo_end_to_end(checkpoint, tmp_path, monkeypatch):
    for name, value in {"KEPT": (0.5, 0.25), "SEEDS": (0, 1)}.items():
        monkeypatch.setattr(budgets, name, value)
    for name in ("TURNS", "MAX_NEW_TOKENS"):
        monkeypatch.setattr(demo, name, 1)
    results = tmp_path / "results"
    ran = CliRunner().invoke(app, ["demo", "--questions", "8", "--model", str(checkpoint), "--out", str(results)])
    assert ran.exit_code == 0, ran.output
    out = results / checkpoint.name
    assert f"{checkpoint.name}: 10 collage and 1 easy-VQA questions, a part of the test split" in ran.output
    lines = [line.strip() for line in ran.output.splitlines()]
    for method in budgets.METHODS:
        assert sum(line.startswith(method + " ") for line in lines) == 2
    written = (out / "demo.md").read_text()
    assert written.count("| pool | ") == 2 and "| unpatched | 100 % |" in written
    report = json.loads((out / "demo.json").read_text())
    assert len(report["rows"]) == 2 * len(budgets.METHODS)
    assert report["questions"] == {"collage": 10, "easy-vqa": 1}
    assert report["settings"]["seed"] == 0 and report["machine"]["torch"] == torch.__version__
    base = report["unpatched"]
    assert base["visual_tokens"] == TOKENS and base["flops_ratio"] == 1
    for row in report["rows"]:
        mean = budgets.mean_kept({1: row["kept"] / TOKENS}, DEPTH)
        assert row["visual_tokens"] == pytest.approx(TOKENS * mean, abs=1.5)
        assert row["flops_ratio"] < 1 and row["kv_bytes"] < base["kv_bytes"]
        assert 0 <= row["loyalty"] <= 1
        assert set(row["prefill_speedup"]) == {"median", "low", "high"}
        assert len(row["runs"]) == (2 if row["method"] == "random" else 1)
        assert row["core"] == pytest.approx(sum(run["core"] for run in row["runs"]) / len(row["runs"]))
    for name in ("demo-accuracy.png", "demo-patches.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_demo_errors(tmp_path):
    with pytest.raises(ValueError, match="at least one question, not 0"):
        demo.run(Counted(), questions=0)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        demo.run(Counted(), checkpoint=tmp_path / "nowhere")


def test_demo_shows_every_shipped_model(monkeypatch, tmp_path):
    """Without --model; what a run gives is tested above."""
    ran, written = [], []
    monkeypatch.setattr(demo, "run", lambda *args: ran.append(args[-1]) or SimpleNamespace(report={}))
    monkeypatch.setattr(demo_report, "write", lambda result, out: written.append(out) or [out])
    for name in ("table", "notes"):
        monkeypatch.setattr(demo_report, name, lambda report: "")
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path)]).exit_code == 0
    assert written == [tmp_path / "tiny-llava", tmp_path / "tiny-qwen2-vl"]
    assert all((checkpoint / "model.safetensors").is_file() for checkpoint in ran)


def test_standard_error():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1, 7) == 0
