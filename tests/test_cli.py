import ast
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import vlmaccel
from tests.support.tiny_vqa import tiny_llava
from vlmaccel import cli
from vlmaccel.cli import app
from vlmaccel.cli.common import parse_options


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llava")
    for part in tiny_llava():
        part.save_pretrained(folder)
    return str(folder)


def run(*args):
    return CliRunner().invoke(app, args)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["demo"],
        ["eval"],
        ["eval", "vqa"],
        ["eval", "cache"],
        ["eval", "text"],
        ["bench"],
        ["bench", "cache"],
        ["train"],
        ["train", "registers"],
        ["train", "distill"],
        ["visualize"],
        ["methods"],
        ["adapters"],
    ],
)
def test_help(args):
    ran = run(*args, "--help")
    assert ran.exit_code == 0
    assert "Usage" in ran.output


def test_lists():
    for command, known in (("methods", vlmaccel.methods()), ("adapters", vlmaccel.adapters())):
        ran = run(command)
        assert ran.exit_code == 0
        assert known and all(name in ran.stdout for name in known)


def test_eval_vqa_writes_and_resumes(checkpoint, tmp_path):
    out = tmp_path / "answers.jsonl"
    args = ["--model", checkpoint, "--data", "collage", "--max-new-tokens", "1", "--out", str(out)]
    method = ["--method", "fastv", "--option", "layer=1", "--option", "ratio=0.25"]
    first = run("eval", "vqa", *args, *method, "--limit", "4")
    assert first.exit_code == 0, first.output
    assert "VQA accuracy" in first.stdout and "exact match" in first.stdout and "FLOPs" in first.stdout
    settings, *rows = map(json.loads, out.read_text().splitlines())
    assert len(rows) == 4
    assert "FastV(layer=1, ratio=0.25" in json.dumps(settings)
    more = run("eval", "vqa", *args, *method, "--limit", "6")
    assert more.exit_code == 0, more.output
    assert out.read_text().splitlines()[:5] == [json.dumps(line) for line in (settings, *rows)]
    assert len(out.read_text().splitlines()) == 7

    again = run("eval", "vqa", *args, *method, "--limit", "4", "--loyal-to", str(out))
    assert "loyalty: 100.00%" in again.stdout
    other = run("eval", "vqa", *args, "--limit", "4")
    assert other.exit_code == 2
    assert other.stderr.strip().splitlines()[-1].startswith(f"vlmaccel: {out} was made with method")
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "fasv"], "there is no method 'fasv'; there are"),
        (
            ["--method", "fastv", "--option", "layer=0"],
            "layer is the number of a decoder layer, 1 or more, not 0",
        ),
        (["--method", "fastv", "--option", "ration=0.5"], "fastv has no option ration; it has layer, ratio"),
        (["--method", "fastv", "--option", "ratio"], "--option takes key=value, e.g. ratio=0.5, not 'ratio'"),
        (["--option", "ratio=0.5"], "--option goes with --method"),
        (["--data", "imagenet"], "unknown data 'imagenet'"),
        (["--model", "./nowhere"], "there is no model directory ./nowhere"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
    ],
)
def test_user_errors_are_one_line(checkpoint, args, message):
    ran = run("eval", "vqa", "--model", checkpoint, "--data", "collage", "--limit", "1", *args)
    assert ran.exit_code == 2
    assert ran.stderr.startswith("vlmaccel: ") and message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert "Traceback" not in ran.output


def test_errors_with_traceback(checkpoint, monkeypatch):
    monkeypatch.setenv("VLMACCEL_TRACEBACK", "1")
    ran = run("eval", "vqa", "--model", checkpoint, "--data", "imagenet")
    assert isinstance(ran.exception, ValueError)


def test_broken_data_file(checkpoint, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"image": "a.png", "question": "?", "answers": "yes"}\n')
    ran = run("eval", "vqa", "--model", checkpoint, "--data", str(path))
    assert ran.exit_code == 2
    assert f"{path}, line 1: there is no image {tmp_path / 'a.png'}" in ran.stderr


def test_bench(tmp_path):
    out = tmp_path / "bench.json"
    args = [
        "--shape",
        "qwen2-0.5b",
        "--depth",
        "1",
        "--text-tokens",
        "32",
        "--repeats",
        "1",
        "--new-tokens",
        "2",
    ]
    ran = run("bench", *args, "--method", "uniform", "--option", "ratio=0.5", "--out", str(out))
    assert ran.exit_code == 0, ran.output
    assert "efficiency" in ran.stdout
    assert json.loads(out.read_text())["options"] == {"ratio": 0.5}


def test_bench_unknown_shape():
    ran = run("bench", "--shape", "llava-9000")
    assert ran.exit_code == 2
    assert "llava-9000" in ran.stderr and len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("ratio=0.5", 0.5),
        ("layers=1,3,4", (1, 3, 4)),
        ("layers=[1, 3]", [1, 3]),
        ("target=text", "text"),
        ("target=None", None),
        ("by_query=false", False),
        ("prop_attn=TRUE", True),
        ("name=a=b", "a=b"),
    ],
)
def test_parse_options(pair, value):
    assert parse_options([pair]) == {pair.split("=")[0]: value}


@pytest.mark.parametrize("pair", ["ratio", "=1", "a b=1", ""])
def test_parse_options_refuses(pair):
    with pytest.raises(ValueError, match="--option takes key=value"):
        parse_options([pair])


@pytest.mark.parametrize("path", sorted(Path(cli.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_commands_load_what_they_need_when_they_run(path):
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} <= {
        "typer",
        *(f"vlmaccel.cli{part}" for part in ("", ".common", ".benches", ".evals", ".trains")),
    }


def test_visualize_writes_a_picture(checkpoint, tmp_path):
    image, out = tmp_path / "in.png", tmp_path / "groups.png"
    Image.linear_gradient("L").save(image)
    ran = run("visualize", str(image), "--option", "r=16", "--block", "0", "--block", "7", "--out", str(out))
    assert ran.exit_code == 0, ran.output
    assert str(out) in ran.stdout
    three = Image.open(out).size
    args = ["--model", checkpoint, "--prompt", "is it red?", "--method", "fastv", "--option", "layer=1"]
    ran = run("visualize", str(image), *args, "--out", str(out))
    assert ran.exit_code == 0, ran.output
    assert Image.open(out).size[0] < three[0]

    wrong = run("visualize", str(image), "--block", "8", "--out", str(out))
    assert wrong.exit_code == 2
    assert wrong.stderr.strip() == "vlmaccel: there is no block 8: blocks of this tower are 0 to 7"
