"""The benchmark of operators on a GPU: every operator runs, with torch's ways beside it, and nothing fails."""

from __future__ import annotations

from vlmaccel.evals.bench_kernels import OURS, run_kernel_bench
from vlmaccel.evals.kernel_cases import (
    OPERATORS,
    bias_case,
    decode_case,
    dequantize_case,
    farthest_case,
    greedy_case,
    lines_case,
    match_case,
    merge_case,
    quantize_case,
    score_case,
    token_case,
)

CASES = (
    match_case(2, 197),
    merge_case(2, 197, 768),
    farthest_case(576, 0.25),
    greedy_case(576, 0.25),
    bias_case("vit-l", 2, 197),
    score_case("qwen2-vl-2b", 500, 64),
    token_case("qwen2-vl-2b", 500, 0.5),
    lines_case("qwen2-vl-2b", 500, 20, 40),
    quantize_case(4, -2, 512),
    dequantize_case(4, -2, 512),
    decode_case("qwen2-vl-2b", 1024, 2, {2: 0.5, 4: 0.5}),
)


def test_every_operator_runs():
    result = run_kernel_bench("cuda", cases=CASES, repeats=3)
    assert [row.operator for row in result.rows] == list(OPERATORS)
    assert result.roof.copy > 1e11 and result.roof.products > 1e13
    for row in result.rows:
        assert row.problem is None and not row.failed, row
        assert row.error < 2e-2 and row.seconds[OURS].median > 0 and 0 < row.of_roof < 1.5, row
        assert row.form == "Triton", row
