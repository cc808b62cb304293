"""The benchmark of vision transformers: what it compares computes the same, and its rows say what was run."""

import pytest
import torch

from vlmaccel.evals.bench_operations import ways_to_attend, ways_to_match, ways_to_merge
from vlmaccel.evals.bench_vit import render, run_vit_bench
from vlmaccel.kernels.bipartite_match import bipartite_match


def test_all_ways_to_merge_and_to_attend_give_the_same():
    torch.manual_seed(0)
    metric, x = torch.randn(2, 13, 8), torch.randn(2, 13, 6)
    keep, group = bipartite_match(metric, 4, 1)
    query, key, value = (torch.randn(2, 3, 13, 8) for _ in range(3))
    attend = ways_to_attend(query, key, value, torch.rand(2, 13))
    attend.pop("torch's fused attention, no bias")
    for ways in (ways_to_merge(x, group, keep.shape[1]), attend):
        ours, *others = (call() for call in ways.values())
        for other in others:
            assert torch.allclose(other.reshape(ours.shape), ours, atol=1e-5)


def test_all_ways_to_match_choose_the_same_tokens():
    metric = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0))
    (_, group), (left, source, target), _ = (call() for call in ways_to_match(metric, 4).values())
    merged = [(2 * source[b, i, 0], 2 * target[b, i, 0] + 1) for b in range(2) for i in range(4)]
    assert all(group[n // 4, a] == group[n // 4, b] for n, (a, b) in enumerate(merged))
    assert left.shape[1] == 3


def test_rows_say_what_was_run():
    result = run_vit_bench("vit_tiny_patch16_224", 1, [8], ["float32"], repeats=1)
    (row,) = result.rows
    assert row.tokens == (197, 197 - 12 * 8)
    assert 1.3 < row.flops < 1.4
    assert row.peak_ours < 1 < row.peak_published
    assert 0 < row.merging.median < row.beside.median < 1
    assert max(result.attention_error["float32"]) < 1e-5
    assert render(result).row_count == 1


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("nope", "float32", "no model 'nope'"),
        ("deit3_small_patch16_224", "float32", "no LayerScale"),
        ("vit_tiny_patch16_224", "int8", "dtype must be one of"),
    ],
)
def test_what_cannot_be_compared(name, dtype, message):
    with pytest.raises(ValueError, match=message):
        run_vit_bench(name, 1, [8], [dtype], repeats=1)
