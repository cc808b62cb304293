import json
from dataclasses import asdict
from io import StringIO

import pytest
import torch
from rich.console import Console

from vlmaccel.evals.bench import encode, first_logits, render, run_bench
from vlmaccel.evals.shapes import build, prompt
from vlmaccel.flops import decoder_flops

SMALL = {"vision_depth": 1, "text_tokens": 10, "new_tokens": 3, "repeats": 2}


@pytest.fixture(scope="module")
def llava():
    said = []
    return run_bench("tiny-llava", "pyramiddrop", depth=4, batch=2, progress=said.append, **SMALL), said


@pytest.fixture(scope="module")
def keep_all():
    return run_bench("tiny-llava", "pyramiddrop", {"ratios": (0.5, 0.2, 0.1)}, depth=4, keep_all=True, **SMALL)


def test_tokens_flops_and_bytes(llava):
    result, _ = llava
    visual = [36, 18, 9, 4]
    tokens = [v + 10 for v in visual]
    assert (
        result.method.startswith("PyramidDrop(ratio=0.5")
        and result.visual_tokens_nominal == 36
        and result.tokens_nominal == 46
    )
    assert result.visual_tokens == visual and result.tokens == tokens
    full, kept = decoder_flops([46] * 4, 64, 96), decoder_flops(tokens, 64, 96)
    assert result.flops_ratio_closed == pytest.approx(full / kept)
    # counted: two for a multiply-add, keys and values half as wide, and the head for one token
    head, narrower = 64 * 128, 2 * 64 * 32
    assert result.flops_unpatched == 2 * 2 * (full - 4 * 46 * narrower + head)
    layers = 2 * 2 * (kept - sum(tokens) * narrower + head)
    scoring = result.flops_patched - layers  # one query row, and keys, for each of three stages
    assert 0 < scoring <= 2 * 2 * sum(n * 64 * 32 + 64 * 64 + n * 64 for n in tokens[:3])
    assert result.flops_ratio == result.flops_unpatched / result.flops_patched
    assert result.kv_unpatched == 2 * 4 * 46 * 2 * 32 * 4
    values = 2 * sum(tokens) * 2 * 32 * 4
    assert values <= result.kv_patched <= values + 2 * sum(tokens) * 2 * 8
    assert result.peak_unpatched > result.kv_unpatched and result.peak_patched > result.kv_patched
    assert result.max_logit_difference > 0


def test_speeds_are_measured_in_turn(llava):
    result, said = llava
    turns = [text for text in said if "patched" in text]
    assert turns == ["warm-up, unpatched", "warm-up, patched"] + [
        f"turn {turn} of 2, {way}" for turn in (1, 2) for way in ("unpatched", "patched")
    ]
    for phase in (result.prefill, result.decode):
        for spread in asdict(phase).values():
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert result.clock == "cpu"
    assert result.efficiency.median == pytest.approx(result.prefill.speedup.median / result.flops_ratio)
    assert result.overhead == pytest.approx(1 / result.prefill.speedup.median - 1)


def test_keep_all_changes_nothing(keep_all):
    assert keep_all.options == {"ratio": 1.0} and keep_all.keep_all
    assert keep_all.max_logit_difference == 0
    assert keep_all.flops_ratio == keep_all.flops_ratio_closed == 1
    assert keep_all.tokens == [46] * 4 and keep_all.visual_tokens == [36] * 4
    assert keep_all.kv_patched >= keep_all.kv_unpatched


def test_text_model_and_single_token():
    result = run_bench("tiny-llama", "fastv", {"layer": 1, "ratio": 0.5}, depth=2, **SMALL | {"new_tokens": 1})
    assert result.decode is None and result.vision_depth == 0 and result.visual_tokens_nominal == 0
    assert result.tokens[0] == 10 > result.tokens[1] and result.flops_ratio > 1
    assert "decode step" not in text_of(result) and "visual by layer" not in text_of(result)
    assert "1 x 10 tokens, from text;" in text_of(result)


def test_views_and_the_tower():
    options = SMALL | {"new_tokens": 1, "repeats": 1, "warmup": 0}
    decoder, whole = (
        run_bench("tiny-llava-next", "uniform", {"layer": 1, "ratio": 0.25}, depth=2, include_tower=tower, **options)
        for tower in (False, True)
    )
    assert decoder.visual_tokens == whole.visual_tokens == [192, 48]
    tower = whole.flops_unpatched - decoder.flops_unpatched
    assert tower > 0 and whole.flops_patched == decoder.flops_patched + tower
    assert decoder.peak_patched <= decoder.peak_unpatched
    assert whole.include_tower and "vision tower of 1 layers included" in text_of(whole)


def test_encoded_pictures_give_the_same_logits():
    for name in ("tiny-llava", "tiny-llava-next", "tiny-llava-onevision"):
        model = build(name, depth=2, vision_depth=2)
        inputs = prompt(model, name, text_tokens=7, batch=2)
        encoded = encode(model, inputs)
        assert "pixel_values" not in encoded
        with torch.no_grad():
            assert torch.equal(first_logits(model, encoded), model(**inputs, logits_to_keep=1).logits[:, -1])
        first_logits(model, encoded)  # and can be used again


def text_of(result):
    console = Console(width=200, record=True, file=StringIO())
    console.print(render(result))
    return " ".join(console.export_text().split())


def test_table(llava, keep_all):
    text = text_of(llava[0])
    for part in (
        "tiny-llava, 4 layers, PyramidDrop(ratio=0.5",
        "prefill, processor s",
        "decode step, wall s",
        "2 x 46 tokens (36 visual), from encoded pictures; float32, sdpa",
        "36 x1, 18 x1, 9 x1, 4 x1",
        f"{llava[0].flops_ratio:.3f}x (closed form {llava[0].flops_ratio_closed:.3f}x)",
        "of 2 turns; ratios by processor time",
    ):
        assert part in text
    assert "overhead" not in text
    assert "overhead of prefill" in text_of(keep_all) and "46 x4" in text_of(keep_all)


def test_json(llava, tmp_path):
    result, path = llava[0], tmp_path / "bench.json"
    result.save(path)
    facts = json.loads(path.read_text())
    assert facts["flops_ratio"] == result.flops_ratio and facts["tokens"] == [46, 28, 19, 14]
    assert facts["prefill"]["speedup"]["median"] == result.prefill.speedup.median
    assert facts["machine"]["torch"] == torch.__version__


def test_errors():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, not 'int8'"):
        run_bench("tiny-llama", "fastv", dtype="int8")
    with pytest.raises(ValueError, match="keep_all needs the name of one method, or None, not "):
        run_bench("tiny-llama", ["fastv"], keep_all=True)
    with pytest.raises(ValueError, match="no shape 'llama'"):
        run_bench("llama", "fastv")
    said = []
    with pytest.raises(ValueError, match="fastv"):
        run_bench("tiny-llama", "no-such-method", progress=said.append)
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        run_bench("tiny-llama", "fastv", {"ratio": 2}, progress=said.append)
    assert said == []
