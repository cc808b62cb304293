"""The benchmark of decode steps over a smaller cache: what is timed is what it says."""

import pytest
import torch

import vlmaccel
from vlmaccel.cache import kv_bytes
from vlmaccel.evals.bench_cache import fill, render, run_cache_bench, time_steps
from vlmaccel.evals.shapes import build
from vlmaccel.methods import SnapKV


def test_caches_hold_what_was_asked_for():
    model = build("tiny-llama", 1)
    plain, small = fill(model, 2, 40, None), fill(model, 2, 40, 7)
    assert plain.layers[0].keys.shape[2] == 40 and small.layers[0].keys.shape[2] == 7
    assert small.get_seq_length() == plain.get_seq_length() == 40
    index = small.layers[0].slots.index.long()
    heads, dim = plain.layers[0].keys.shape[1], plain.layers[0].keys.shape[3]
    expected = plain.layers[0].keys.gather(2, index.expand(-1, heads, -1)[..., None].expand(-1, -1, -1, dim))
    assert torch.equal(small.layers[0].keys, expected)
    held, full = kv_bytes(small)
    assert held == full * 7 // 40 + index.numel() * 4


def test_steps_append_tokens_in_every_way():
    model = build("tiny-llama", 1)
    for keep in (None, 39, 7):
        cache = fill(model, 2, 40, keep)
        with vlmaccel.patched(model, SnapKV(budget=0.1)):
            time_steps(model, cache, 2, 40, steps=3)
        assert cache.get_seq_length() == 44
        assert cache.layers[0].keys.shape[2] == (keep or 40) + 4


def test_rows():
    result = run_cache_bench("tiny-llama", [64], ["float32", "bfloat16"], depth=1, batch=2, steps=2, repeats=1)
    assert [row.dtype for row in result.rows] == ["float32", "bfloat16"]
    for row in result.rows:
        assert 1 < row.bound < 10 and row.kv < 0.13 * row.kv_full
        assert row.speedup.median == pytest.approx(row.form.median * row.size.median)
    assert render(result).row_count == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "nope"}, "no shape"),
        ({"dtypes": ["int8"]}, "dtype must be one of"),
        ({"budget": 1.0}, "budget is a share"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        run_cache_bench(**{"shape": "tiny-llama", "prompts": [8], "dtypes": ["float32"], **options})
