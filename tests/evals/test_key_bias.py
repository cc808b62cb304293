import json
import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from tests.support.models import VOCAB, build
from vlmaccel.cache import KeyBias, kv_bytes
from vlmaccel.evals import key_bias
from vlmaccel.evals.key_bias import (
    BANDS,
    BASE,
    KEPT,
    NORMS,
    STAND_IN,
    compare,
    given_cache,
    plant,
    simulate,
    stand_in,
    to_qwen2,
    ways,
)
from vlmaccel.evals.smollm2 import default_directory
from vlmaccel.evals.text import Perplexity, perplexity
from vlmaccel.methods import MixedPrecisionKV

TOKEN, CHANNEL, CHANNEL_OFF, TOKEN_OFF = key_bias.QUANTISERS


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, VOCAB - 8, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def simulated():
    return {(row["quantiser"], row["bits"]): row for row in simulate(heads=4, tokens=256, rows=32)}


@pytest.mark.parametrize("bits", [4, 2])
def test_without_a_bias_taking_it_off_changes_nothing(simulated, bits):
    for plain, off in ((TOKEN, TOKEN_OFF), (CHANNEL, CHANNEL_OFF)):
        assert simulated[plain, bits]["no bias"] == simulated[off, bits]["no bias"]


@pytest.mark.parametrize("bits", [4, 2])
def test_with_the_bias_off_keys_are_as_easy_as_without_one(simulated, bits):
    for off in (TOKEN_OFF, CHANNEL_OFF):
        row = simulated[off, bits]
        assert all(row[band] < 1.2 * row["no bias"] for band in BANDS)


@pytest.mark.parametrize(("bits", "mid", "high"), [(4, 1.5, 30), (2, 1.5, 15)])
def test_the_bias_costs_bits(simulated, bits, mid, high):
    assert all(simulated[TOKEN, bits][band] > 100 * simulated[TOKEN_OFF, bits][band] for band in BANDS if BANDS[band])
    channel, off = simulated[CHANNEL, bits], simulated[CHANNEL_OFF, bits]
    assert channel["low"] < 1.1 * off["low"]  # it hardly moves within a group, and goes into its zero
    assert channel["mid"] > mid * off["mid"]
    assert channel["high"] > high * off["high"]


def test_a_llama_as_a_qwen2(ids):
    llama = build("llama")
    qwen = to_qwen2(llama)
    assert isinstance(qwen, hf.Qwen2ForCausalLM)
    with torch.inference_mode():
        assert (llama(ids).logits - qwen(ids).logits).abs().max() < 1e-4
    assert all(not layer.self_attn.k_proj.bias.any() for layer in qwen.model.layers)


def test_a_qwen2_in_another_dtype_keeps_its_rotary_embedding():
    qwen = build("qwen2")
    assert qwen.model.layers[0].self_attn.k_proj.bias.any()
    half = to_qwen2(qwen, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, x in qwen.state_dict().items():
        assert torch.equal(half.state_dict()[name], x.bfloat16())


def test_what_is_no_qwen2():
    config = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    for options, message in (
        ({"attention_bias": True}, "biases of its own"),
        ({"head_dim": 16}, "share the hidden size"),
    ):
        with pytest.raises(ValueError, match=message):
            to_qwen2(hf.LlamaForCausalLM(hf.LlamaConfig(**config, **options)))


@pytest.mark.parametrize(("layer", "norm", "effect"), [(0, 605.0, 1.0), (-1, 921.0, 3.0)])
def test_planting(ids, layer, norm, effect):
    plain = to_qwen2(build("llama"))
    model = to_qwen2(plain)
    plant(model, ids, {layer: norm}, effect)
    attention = model.model.layers[layer].self_attn
    bias = attention.k_proj.bias.detach()
    assert bias.norm().item() == pytest.approx(norm, rel=1e-4)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, plain.state_dict()[name])}
    prefix = f"model.layers.{layer % len(model.model.layers)}.self_attn"
    assert changed == {f"{prefix}.k_proj.bias", f"{prefix}.q_proj.weight"}

    # what it adds to logits, at distances so far that any angle is as likely
    queries = []
    attention.q_proj.register_forward_hook(lambda module, args, out: queries.append(out))
    with torch.inference_mode():
        model(ids)
    far = torch.randint(0, 10**6, (1, 1, 1, 400), generator=torch.Generator().manual_seed(1))
    added = KeyBias(bias.unflatten(0, (2, 8)), model.model.rotary_emb, apply_rotary_pos_emb).at(far)[0]
    query = queries[0].unflatten(-1, (2, 2, 8)).flatten(0, 1)  # (tokens, H_kv, heads of each, head_dim)
    logits = torch.einsum("tghd,gnd->gthn", query, added) / math.sqrt(8)
    assert torch.allclose(logits.square().mean((1, 2, 3)).sqrt(), torch.tensor(effect), rtol=0.1)


def test_layers_are_measured_in_their_own_queries(ids):
    """The order in which norms are given does not matter."""
    one, other = (to_qwen2(build("llama")) for _ in range(2))
    plant(one, ids, {0: 5.0, -1: 5.0})
    plant(other, ids, {-1: 5.0, 0: 5.0})
    norms = [[m.model.layers[i].self_attn.q_proj.weight.norm().item() for i in (0, -1)] for m in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_stand_in_holds_what_transformers_quantised_cache_does(ids):
    model = to_qwen2(build("llama"))
    with torch.inference_mode(), given_cache(model, lambda: stand_in(model.config)):
        out = model(ids[:, :40], use_cache=True)
        layer = out.cache.layers[0]
        assert type(layer) is key_bias.PerTokenLayer
        assert layer.keys.numel() == 0 and layer.get_seq_length() == 40
        codes, scale, *_ = layer._quantized_keys
        assert codes.shape == (2, 2, 40, 4) and scale.shape == (2, 2, 40, 1)
        again = model(ids[:, 40:41], use_cache=True, cache=out.cache)
        assert again.cache is out.cache and kv_bytes(out.cache)[1] > 0
        exact = model(ids[:, :41], use_cache=False).logits[:, -1]
    assert 0 < (again.logits[:, -1] - exact).abs().max() < 0.2 * exact.abs().max()
    with torch.inference_mode():
        assert type(model(ids[:, :4], use_cache=True).cache) is hf.DynamicCache


def test_planted_it_is_the_cache_without_the_remedy_that_fails(ids):
    model = to_qwen2(build("llama"))
    plant(model, ids, effect=3.0)
    compared = {name: replace(way, dtype=torch.float32) for name, way in ways(residual=0, quanto=False).items()}
    names = [BASE, *(f"{bits} bits, window 0{tail}" for bits in (4, 2) for tail in ("", KEPT))]
    names.append(STAND_IN)
    found = compare(model, ids, {name: compared[name] for name in names}, told=lambda line: None)
    assert list(found) == names

    def off(name):
        return sum(abs(a - b) for a, b in zip(found[name].losses, found[BASE].losses, strict=True))

    ours, left_in, ours_2, left_in_2, theirs = (off(name) for name in names[1:])
    assert ours < left_in and ours_2 < 0.7 * left_in_2 and ours < 0.2 * theirs


def test_the_command(monkeypatch, tmp_path, capsys):
    assert key_bias.main(["--only", "simulation", "--out", str(tmp_path / "a" / "out.json")]) == 0
    assert CHANNEL in capsys.readouterr().out
    rows = json.loads((tmp_path / "a" / "out.json").read_text())["simulation"]
    assert len(rows) == 8 and set(BANDS) < set(rows[0])
    monkeypatch.setattr(key_bias, "default_directory", lambda: tmp_path / "nothing")
    assert key_bias.main(["--only", "perplexity"]) == 1
    assert "python -m vlmaccel.evals.smollm2" in capsys.readouterr().err


@pytest.mark.slow
def test_the_stand_in_is_close_to_quanto():
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    theirs, ours = hf.cache_utils.QuantoQuantizedLayer(), key_bias.PerTokenLayer()
    (a, b) = (layer._dequantize(layer._quantize(x, 0)) for layer in (theirs, ours))
    assert (b - x).norm().item() == pytest.approx((a - x).norm().item(), rel=0.2)


@pytest.mark.slow
def test_real_weights():
    if not default_directory().is_dir():
        pytest.skip("needs SmolLM2: python -m vlmaccel.evals.smollm2 gets it")
    from vlmaccel.evals.text import cut, load, text_source, tokens_of

    llama, tokenizer = load(str(default_directory()), "float32")
    windows = cut(tokens_of(tokenizer, text_source()), 192, 2)
    qwen = to_qwen2(llama)
    with torch.inference_mode():
        assert (llama(windows).logits - qwen(windows).logits).abs().max() < 1e-4
    plant(qwen, windows)
    assert qwen.model.layers[-1].self_attn.k_proj.bias.norm().item() == pytest.approx(NORMS[-1], rel=1e-4)
    ours = MixedPrecisionKV(by="position", residual=32)
    compared = {BASE: key_bias.Way(), "ours": key_bias.Way(method=ours), "theirs": key_bias.Way(cache=stand_in)}
    found = compare(qwen, windows, compared)
    assert abs(found["ours"].change(found[BASE])[0]) < 0.03
    assert found["theirs"].change(found[BASE])[0] > 0.1
    assert found[BASE].ppl < 1.2 * perplexity(llama, windows).ppl


def test_the_table():
    exact, worse = Perplexity((1.0, 1.2), 8), Perplexity((1.1, 1.2), 8)
    table = key_bias.perplexity_table({"a": {BASE: exact}, "b": {BASE: exact, "few": worse}}, "title")
    cells = [list(column.cells) for column in table.columns]
    assert cells == [[BASE, "few"], ["ppl 3.004", "-"], ["ppl 3.004", "+5.13% ± 5.26"]]
    assert key_bias.facts({"a": {BASE: exact, "few": worse}})["a"]["few"]["losses"] == (1.1, 1.2)
