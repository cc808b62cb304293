"""The benchmark of sparse prefill: what it counts, what it times, and what it says of both."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import vlmaccel
from vlmaccel.cli import app
from vlmaccel.evals.bench import first_logits
from vlmaccel.evals.bench_sparse import (
    Prefill,
    Row,
    SparseBench,
    Stopwatch,
    attention_flops,
    default_methods,
    render,
    run_sparse_bench,
    short_name,
)
from vlmaccel.evals.shapes import build
from vlmaccel.evals.timing import Spread
from vlmaccel.flops import count_flops, decoder_flops
from vlmaccel.methods import SnapKV, ZipVL, make


def inputs_of(n):
    ids = torch.randint(3, 60, (1, n), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def tiny():
    said = []
    result = run_sparse_bench("tiny-llama", [200], ["float32"], repeats=2, progress=said.append)
    return result, said


def test_rows(tiny):
    result, said = tiny
    (prefill,) = result.prefills
    assert (prefill.dtype, prefill.tokens, result.depth) == ("float32", 200, 2)
    assert [row.method for row in prefill.rows] == [repr(method) for method in default_methods()]
    zipvl = [row for row in prefill.rows if row.method.startswith("ZipVL")]
    assert [row.attended for row in zipvl] == sorted((row.attended for row in zipvl), reverse=True)
    assert [row.bound for row in zipvl] == sorted(row.bound for row in zipvl)
    for row in prefill.rows:
        assert 0 < row.attended <= 1 and row.speedup.low > 0 and 0 < row.choosing.median < 1 and row.peak > 0
        assert row.efficiency.median == pytest.approx(row.speedup.median / row.bound)
        assert row.efficiency_causal.median == pytest.approx(row.speedup.median / row.bound_causal)
    for row in zipvl:
        assert row.kv < 1
        assert 1 < row.bound_causal < row.bound
    assert prefill.scoring.median > 0 and prefill.unpatched.median > 0
    assert any("turn 2 of 2, FlexPrefill" in text for text in said)


def test_flops_are_those_of_the_attention_that_is_computed():
    model, inputs = build("tiny-llama", 2), inputs_of(200)
    config = model.config
    full, square = count_flops(lambda: first_logits(model, inputs)), attention_flops(config, 200, 1)
    assert square == 2 * (decoder_flops([200] * 2, 64, 96) - decoder_flops([200] * 2, 64, 96, attended=[0, 0]))
    with vlmaccel.patched(model, ZipVL(tau=0.6, recent=8, random=8)):
        zipvl = count_flops(lambda: first_logits(model, inputs))
        stats = vlmaccel.stats(model)
    kept = [layer // (2 * 2 * 16 * 4) for layer in stats.kv_bytes_by_layer]
    scoring = 2 * 2 * 64 * 16 * 200
    assert full - zipvl == pytest.approx(square * (1 - sum(stats.attended) / 2) - scoring, rel=0.01)
    assert sum((n / 200) ** 2 for n in kept) / 2 == pytest.approx(sum(stats.attended) / 2, rel=0.1)
    for method in (make("block-sparse", mass=0.4), make("vertical-slash", vertical=10, slash=20)):
        with vlmaccel.patched(model, method):
            sparse = count_flops(lambda: first_logits(model, inputs))
            stats = vlmaccel.stats(model)
        choosing = sparse - (full - square * (1 - sum(stats.attended) / 2))
        assert 0 < choosing < 0.2 * full


def test_a_stopwatch_sees_every_layer_and_leaves_no_trace():
    model, method = build("tiny-llama", 3), ZipVL(tau=0.6)
    watch = Stopwatch(method, "cpu")
    with vlmaccel.patched(model, method):
        with watch.running():
            first_logits(model, inputs_of(40))
        spent = watch.spent
        assert spent.cpu > 0 and "sparse_attention" not in vars(method)
        with pytest.raises(ZeroDivisionError), watch.running():
            raise ZeroDivisionError
        assert "sparse_attention" not in vars(method)


def text_of(result):
    console = Console(width=200, record=True, file=StringIO())
    for part in render(result):
        console.print(part, soft_wrap=isinstance(part, str))
    return console.export_text()


def made(efficiency, scoring):
    one = Spread(1, 1, 1)
    row = Row("ZipVL(tau=0.9, rule='mass')", 0.5, 1.0, 1.0, Spread(efficiency, 0.1, 9), one, 0.5, 1.0)
    prefill = Prefill("float32", 100, one, 10, 10, 10, Spread(scoring, 0, 1), (row,))
    facts = {"name": "x", "threads": 1, "load": 0, "torch": "2"}
    return SparseBench("tiny", 2, 1, 1, "cpu", (prefill,), facts)


def test_goals_are_said():
    good, bad = text_of(made(0.85, 0.02)), text_of(made(0.7, 0.05))
    assert "takes 2.00% of a layer's prefill (as it should: at most 3%)" in good
    assert "ZipVL's efficiency is at least 0.85 (as it should: 0.8)" in good
    assert "takes 5.00% of a layer's prefill (not as it should" in bad and "0.70 (not as it should" in bad


def test_table_and_json(tiny):
    text = text_of(tiny[0])
    for part in ("ZipVL tau=0.84", "VerticalSlash vertical=700 slash=100", "BlockSparse mass=0.5", "of 2. attention"):
        assert part in text
    facts = json.loads(json.dumps(tiny[0].facts()))
    rows = facts["prefills"][0]["rows"]
    assert rows[0]["efficiency"]["median"] == tiny[0].prefills[0].rows[0].efficiency.median
    assert short_name("ZipVL(tau=0.9, rule='mass')") == "ZipVL tau=0.9"


def test_command(tmp_path):
    file = tmp_path / "sparse.json"
    options = ["--shape", "tiny-llava", "--tokens", "64", "--dtype", "float32", "--repeats", "1", "--out", str(file)]
    result = CliRunner().invoke(app, ["bench", "sparse", *options, "--method", "zipvl:tau=0.7,kv=full"])
    assert result.exit_code == 0, result.output
    (bench,) = json.loads(file.read_text())
    (row,) = bench["prefills"][0]["rows"]
    assert "tau=0.7" in row["method"] and row["kv"] == pytest.approx(1, abs=0.1)
    both = CliRunner().invoke(app, ["bench", "sparse", *options, "--method", "zipvl", "--tau", "0.5"])
    assert both.exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "nope"}, "no shape"),
        ({"dtypes": ["int8"]}, "dtype must be one of"),
        ({"methods": [SnapKV(budget=0.5)]}, "has no sparse attention"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        run_sparse_bench(**{"shape": "tiny-llama", "tokens": [8], "dtypes": ["float32"], **options})
