"""The benchmark of operators: torch's ways give what ours give, a broken operator is a row that says so, no GPU is said."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from vlmaccel.cli import app
from vlmaccel.evals import bench_kernels
from vlmaccel.evals.bench_kernels import OURS, KernelBench, Roof, Row, attempt, event_times, render, run_kernel_bench
from vlmaccel.evals.kernel_cases import (
    OPERATORS,
    Case,
    Draw,
    Work,
    bias_case,
    block_case,
    causal_pairs,
    chosen,
    cpu_cases,
    decode_case,
    dequantize_case,
    farthest_case,
    flex_mask,
    gpu_cases,
    greedy_case,
    lines_case,
    match_case,
    merge_case,
    quantize_case,
    relative_error,
    score_case,
    token_case,
)
from vlmaccel.evals.timing import Spread, Timing
from vlmaccel.kernels import dispatch

SMALL = (
    match_case(2, 33),
    merge_case(2, 33, 8),
    farthest_case(40, 0.5),
    greedy_case(40, 0.5),
    bias_case("vit-l", 2, 20),
    bias_case("qwen2-vl-2b", 2, 20, causal=True),
    score_case("llava-next-7b", 40, 8),
    score_case("qwen2-vl-2b", 40, batch=2),
    score_case("qwen2-vl-2b", 40, 8, known=True),
    token_case("qwen2-vl-2b", 50, 0.5, batch=2),
    block_case("qwen2-vl-2b", 300, 0.5, block=64),
    lines_case("qwen2-vl-2b", 300, 20, 40),
    quantize_case(4, -2, 64),
    quantize_case(2, -1, 64),
    dequantize_case(2, -2, 64),
    dequantize_case(8, -1, 64),
    decode_case("qwen2-vl-2b", 256, 2, {2: 0.5, 4: 0.5}),
)


def ids(case):
    return f"{case.operator} {case.shape}"


@pytest.mark.parametrize("case", SMALL, ids=ids)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_torchs_ways_give_the_same(case, dtype, most):
    work = case.make(Draw("cpu", dtype))
    ours = OPERATORS[case.operator](*work.arguments)
    assert work.torch
    for name, way in work.torch.items():
        assert (work.error or relative_error)(ours, way()) < most, name
    for way in work.replaces.values():
        assert way().shape == ours.shape


def test_flex_attention_gets_the_same_lists():
    blocks = block_case("qwen2-vl-2b", 300, 0.5, block=64).make(Draw("cpu", torch.float32)).arguments[3]
    mask = flex_mask(blocks, 64, 300)
    listed = (blocks[..., None] == torch.arange(5)).any(3)
    assert torch.equal(mask.to_dense().bool(), listed)
    assert (mask.kv_num_blocks == 1).all() and torch.equal(mask.kv_indices[0, :, :, 0], torch.arange(5).repeat(12, 1))
    assert torch.equal(mask.full_kv_num_blocks, listed.sum(3) - 1)


def test_lists_hold_the_share_that_is_asked_for():
    work = block_case("qwen2-vl-2b", 2048, 0.25, block=64).make(Draw("cpu", torch.bfloat16))
    assert work.flops == pytest.approx(4 * 12 * 128 * 0.25 * causal_pairs(2048), rel=0.1)
    work = token_case("qwen2-vl-2b", 200, 0.5).make(Draw("cpu", torch.bfloat16))
    assert work.flops == 4 * 12 * 128 * causal_pairs(100)


def test_every_operator_has_cases():
    for cases in (gpu_cases(), cpu_cases()):
        assert {case.operator for case in cases} == set(OPERATORS)
    only = chosen(gpu_cases(), ["score_rows", "merge_tokens"])
    assert [case.operator for case in only] == sorted(case.operator for case in only)
    assert {case.operator for case in only} == {"score_rows", "merge_tokens"}


@pytest.fixture(scope="module")
def small():
    one_each = {case.operator: case for case in SMALL}.values()
    return run_kernel_bench("cpu", dtypes=["float32"], cases=one_each, repeats=2)


@pytest.fixture(autouse=True, scope="module")
def short_turns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_kernels, "TURN", 0.001)
        yield


def test_rows(small):
    assert [row.operator for row in small.rows] == list(OPERATORS)
    for row in small.rows:
        assert row.problem is None and not row.failed and row.form == "CPU" and row.roof is None
        assert row.seconds[row.torch].median == min(
            s.median for way, s in row.seconds.items() if way not in (OURS, row.replaces)
        )
        assert row.ratio.low > 0 and 0 <= row.error < 1e-4
        assert set(row.memory) == set(row.seconds) and row.memory[OURS] > 0
    decode = small.rows[-1]
    assert decode.replaces == "SDPA, nothing in few bits" and decode.replaces_ratio.median > 0
    assert decode.memory[OURS] < decode.memory[decode.torch]


def test_the_speed_up_is_that_of_ours(monkeypatch):
    x = torch.ones(300, 300)
    monkeypatch.setitem(OPERATORS, "score_rows", lambda x: x @ x)
    ways = {
        "slower": lambda: torch.stack([x @ x for _ in range(12)]),
        "slow": lambda: torch.stack([x @ x for _ in range(4)]),
    }
    case = Case("score_rows", "x", lambda draw: Work((x,), ways, {"other": lambda: x @ x @ x}))
    (row,) = run_kernel_bench("cpu", dtypes=["float32"], cases=[case], repeats=5).rows
    assert row.torch == "slow" and 2 < row.ratio.median < 8 and 1 < row.replaces_ratio.median < 4
    assert row.memory["slow"] == 8 * row.memory[OURS] == 8 * x.nbytes


def text_of(result):
    console = Console(width=200, record=True, file=StringIO())
    for part in render(result):
        console.print(part, soft_wrap=isinstance(part, str))
    return console.export_text()


def test_the_table_has_every_operator(small):
    text = text_of(small)
    for name in OPERATORS:
        assert name in text
    assert "by processor time" in text and "TB/s" not in text
    assert f"{small.rows[0].ratio.median:.2f}x" in text


def test_an_operator_that_fails_does_not_stop_the_others(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setitem(OPERATORS, "merge_tokens", broken)
    bad_way = Case("score_rows", "half", lambda draw: Work((1,), {"works": lambda: torch.ones(1), "fails": broken}))
    monkeypatch.setitem(OPERATORS, "score_rows", lambda x: torch.ones(1))
    result = run_kernel_bench("cpu", dtypes=["float32"], cases=[*SMALL[:2], bad_way], repeats=1)
    fine, failed, half = result.rows
    assert fine.ratio and failed.problem == "RuntimeError: no such" and failed.ratio is None
    assert half.torch == "works" and half.failed == {"fails": "RuntimeError: no such"}
    text = text_of(result)
    assert "RuntimeError: no such" in text and "torch's way failed: score_rows, half: fails:" in text
    json.dumps(result.facts())


def test_inputs_that_cannot_be_made_are_a_row_too():
    result = run_kernel_bench("cpu", dtypes=["float32"], cases=[Case("score_rows", "none", lambda draw: 1 / 0)])
    assert result.rows[0].problem == "ZeroDivisionError: division by zero"


def test_limit():
    result = run_kernel_bench("cpu", dtypes=["float32"], cases=SMALL[:2], repeats=1, limit=0)
    assert [row.problem for row in result.rows] == ["not run: 0 s are over"] * 2


def test_no_gpu_is_said_plainly(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert result.exit_code == 0
    assert "no GPU: the Triton forms have not been measured" in result.output
    assert "--device cpu" in result.output
    with pytest.raises(ValueError, match="no GPU"):
        run_kernel_bench("cuda")


def test_command(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_kernels, "cpu_cases", lambda: SMALL[:2])
    file = tmp_path / "kernels.json"
    command = ["bench", "kernels", "--device", "cpu", "--op", "merge_tokens", "--repeats", "1", "--json", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [(row["operator"], row["dtype"]) for row in rows] == [
        ("merge_tokens", "float32"),
        ("merge_tokens", "bfloat16"),
    ]
    assert CliRunner().invoke(app, ["bench", "kernels", "--device", "cpu", "--op", "nope"]).exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"operators": ["nope"]}, "no operator 'nope'; there are: bipartite_match"), ({"dtypes": ["int8"]}, "dtype must")],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        run_kernel_bench("cpu", **options)


# what can be checked of the GPU's side without one


class Event:
    """One that takes as many milliseconds as calls were made in between."""

    calls = 0

    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = Event.calls

    def elapsed_time(self, end):
        return end.at - self.at


def test_events_time_calls_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(bench_kernels, "CACHE", 8)
    order = []

    def way(name, cost):
        order.append(name)
        Event.calls += cost

    ways = {"a": lambda: way("a", 20), "b": lambda: way("b", 10)}
    times = event_times(ways, None, "cpu")
    assert order == ["a", "b"] * 11  # once to see how long it takes, then 0.3 s
    assert times.seconds["a"]["total"] == [Timing(0.02, 0.02)] * 10
    assert times.speedup("b", "a") == Spread(2, 2, 2)


def test_the_roof_is_the_larger_time():
    roof = Roof(copy=1e12, products=1e14)
    assert roof.seconds(1e9, 1e10) == 1e-3 and roof.seconds(1e9, 1e12) == 1e-2
    spread = Spread(4e-3, 4e-3, 5e-3)
    row = Row("score_rows", "x", "bfloat16", "Triton", {OURS: spread}, error=1e-3, roof=(1e-3, "bytes"))
    assert row.of_roof == 0.25
    machine = {"name": "card", "torch": "2", "triton": "3"}
    text = text_of(KernelBench("cuda", "wall", roof, (row,), machine))
    assert "25% b" in text and "torch form" not in text and "1.00 TB/s" in text and "CUDA events" in text


def test_the_torch_form_on_a_gpu(monkeypatch):
    supported = dispatch._supported
    assert bench_kernels.without_triton(lambda: dispatch._supported(0)) is False
    assert dispatch._supported is supported
    found, problem = attempt(lambda: bench_kernels.without_triton(lambda: 1 / 0))
    assert found is None and problem.startswith("ZeroDivisionError") and dispatch._supported is supported
