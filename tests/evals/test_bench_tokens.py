"""The benchmark of methods that drop or merge visual tokens."""

import json
from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlmaccel.cli import app
from vlmaccel.evals.bench import first_logits
from vlmaccel.evals.bench_tokens import (
    Row,
    TokenBench,
    decoder,
    default_methods,
    render,
    run_token_bench,
    training_step,
)
from vlmaccel.evals.shapes import build, prompt
from vlmaccel.evals.timing import Spread
from vlmaccel.flops import count_flops
from vlmaccel.methods import Uniform, VisionZip


@pytest.mark.parametrize("shape", ["tiny-qwen2-vl", pytest.param("tiny-llava", marks=pytest.mark.slow)])
def test_rows(shape):
    said = []
    result = run_token_bench(shape, depth=3, repeats=1, progress=said.append)
    assert [row.method for row in result.rows] == [repr(method) for method in default_methods(3, 36)]
    for row in result.rows:
        assert (
            0 < row.visual < 0.6
            and 1 < row.bound_causal < row.bound
            and row.speedup.low > 0
            and 0 < row.choosing.median < 1
        )
        assert row.efficiency.median == pytest.approx(row.speedup.median / row.bound)
        assert row.efficiency_causal.median == pytest.approx(row.speedup.median / row.bound_causal)
    assert {row.method.split("(")[0] for row in result.rows if row.from_pixels} == {"VisionZip", "VisPruner"}
    assert result.visual_tokens == 36 and any("turn 1 of 1, Uniform" in text for text in said)
    assert json.loads(json.dumps(result.facts()))["rows"][0]["efficiency"]["median"] > 0


def test_training_steps():
    result = run_token_bench("tiny-llava", training=True, depth=4, repeats=1)
    assert [row.method.split("(")[0] for row in result.rows] == ["PyramidDrop", "Registers"]
    for row in result.rows:
        assert row.bound > 1.2 and row.peak < 1 and row.speedup.low > 0
    table, said = render(result)
    assert table.title.startswith("training step of tiny-llava") and "efficiency of 0.85" in said


def test_a_training_step_is_forward_and_backward_of_the_decoder():
    model = build("tiny-llava", 2, vision_depth=1)
    inputs = prompt(model, "tiny-llava")
    model.requires_grad_(False)
    decoder(model).requires_grad_(True)
    forward = count_flops(lambda: first_logits(model, inputs))
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert names and all("language_model" in name for name in names)
    tower = count_flops(lambda: model.get_image_features(inputs["pixel_values"]))
    # first_logits makes the logits of one token only
    assert count_flops(lambda: training_step(model, inputs)) > 2.5 * (forward - tower)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_vision_tower_is_in_both_or_in_neither():
    plain, pixels = run_token_bench("tiny-llava", [Uniform(layer=0, ratio=0.25), VisionZip(ratio=0.25)], repeats=1).rows
    assert plain.visual == pixels.visual == 0.25
    assert pixels.bound < plain.bound  # a tower that costs the same either way


def test_goals_are_said():
    def said(efficiency, choosing):
        row = Row("Uniform(ratio=0.5)", 0.5, False, 1.25, 1.0, Spread(efficiency, 0, 2), Spread(choosing, 0, 1), 0.5)
        facts = {"name": "x", "threads": 1, "load": 0, "torch": "2"}
        console = Console(width=200, record=True, file=StringIO())
        for part in render(TokenBench("prefill", "tiny", "float32", 1, 1, 9, 1, "cpu", Spread(1, 1, 1), (row,), facts)):
            console.print(part, soft_wrap=isinstance(part, str))
        return console.export_text()

    assert "reached by all" in said(0.9, 0.01)
    assert "not reached by Uniform" in said(0.8, 0.01) and "not reached by Uniform" in said(0.9, 0.04)


def test_command(tmp_path):
    file = tmp_path / "tokens.json"
    options = ["--shape", "tiny-qwen2-vl", "--depth", "2", "--repeats", "1", "--out", str(file)]
    result = CliRunner().invoke(app, ["bench", "tokens", *options, "--method", "divprune:ratio=0.5"])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())[0]["rows"][0]["visual"] == 0.5
    assert CliRunner().invoke(app, ["bench", "tokens", "--shape", "tiny-llama"]).exit_code == 2
