"""The front door: what it takes, what it refuses and in which words, and that a refusal changes nothing."""

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest
import torch
import transformers as hf
from torch import nn

import vlmaccel
from tests.support.models import DEPTH, build, inputs
from vlmaccel.adapters import base
from vlmaccel.hooks import Method
from vlmaccel.methods import FastV, Pool, PyramidDrop, Random, registry
from vlmaccel.reduction import Reduction

VLM = "llava-clip-llama"


def hooks(model):
    """How many hooks all modules have together."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def tiny(family, config=None):
    """Makes a small random causal language model of a family."""
    sizes = {
        "vocab_size": 9,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    return lambda: getattr(hf, f"{family}ForCausalLM")(getattr(hf, config or f"{family}Config")(**sizes))


def test_names_and_lines():
    assert set(vlmaccel.methods()) >= {
        "pyramiddrop",
        "fastv",
        "attention-sum",
        "magnitude",
        "neighbour-cosine",
        "random",
        "uniform",
        "pool",
        "zipvl",
        "vertical-slash",
        "block-sparse",
        "cdpruner",
        "divprune",
        "duplicates",
        "sparsevlm",
        "sparsevlm-plus",
        "visionzip",
        "vispruner",
        "evs",
        "flexprefill",
    }
    assert set(vlmaccel.adapters()) >= {"llava", "text"}
    for line in (*vlmaccel.methods().values(), *vlmaccel.adapters().values()):
        assert 10 < len(line) < 130
        assert "\n" not in line


@pytest.mark.parametrize("kind", [VLM, "llama"])
def test_patch_without_a_method_is_the_familys_default(kind):
    model = build(kind)
    assert vlmaccel.patch(model) is model
    model(**inputs(kind, 1))
    assert len(vlmaccel.stats(model).stages) >= 1
    vlmaccel.unpatch(model)
    vlmaccel.patch(model, ratio=1.0)  # options go to the default
    model(**inputs(kind, 1))
    assert vlmaccel.stats(model).stages == ()
    vlmaccel.unpatch(model)


def test_every_way_to_name_a_method():
    for method in ("fastv", FastV(), ["fastv"], [FastV(), "random"], (Random(),)):
        with vlmaccel.patched(build("llama"), method) as model:
            model(**inputs("llama", 1))
            assert vlmaccel.stats(model).stages


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("fastvv", {}, ValueError, "no method 'fastvv'; there are .*fastv"),
        ("fastv", {"rate": 1}, TypeError, "no option rate; it has layer, ratio"),
        ("fastv", {"ratio": 1.5}, ValueError, "number from 0 to 1, not 1.5"),
        ("fastv", {"ratio": "half"}, ValueError, "number from 0 to 1, not 'half'"),
        ("fastv", {"ratio": float("nan")}, ValueError, "number from 0 to 1, not nan"),
        ("fastv", {"layer": 0}, ValueError, "1 or more, not 0"),
        ("random", {"layer": -1}, ValueError, "0 or more, not -1"),
        ("random", {"layer": 1.5}, ValueError, "not 1.5"),
        ("random", {"layer": DEPTH}, ValueError, f"layer {DEPTH}, but this model has layers 0 to {DEPTH - 1}"),
        ("random", {"target": "audio"}, ValueError, "target must be one of None, 'image', 'text', not 'audio'"),
        (
            "random",
            {"positions": "gap"},
            ValueError,
            "positions must be one of None, 'keep', 'renumber', 'calibrated', not 'gap'",
        ),
        ("pyramiddrop", {"layers": (3, 2)}, ValueError, "must increase"),
        ("pyramiddrop", {"layers": (1, 2), "ratios": (0.5,)}, ValueError, "2 stages need as many ratios, not 1"),
        ("pyramiddrop", {"ratios": (0.2, 0.5, 0.1)}, ValueError, "cannot grow"),
        ("pyramiddrop", {"layers": (1, 99)}, ValueError, "layer 99, but this model"),
        (FastV(), {"ratio": 0.5}, TypeError, "go with a method's name"),
        ([], {}, TypeError, "a name, a Method or a non-empty list"),
        (3, {}, TypeError, "a name, a Method or a non-empty list"),
        (FastV, {}, TypeError, "a name, a Method or a non-empty list"),
        (["fastv", FastV()], {}, ValueError, "fastv already"),
    ],
)
def test_bad_input_says_what_is_allowed_and_changes_nothing(method, options, error, words):
    model = build("llama")
    before = hooks(model)
    with pytest.raises(error, match=words):
        vlmaccel.patch(model, method, **options)
    assert hooks(model) == before
    assert not hasattr(model, "_vlmaccel")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: nn.Linear(2, 2), NotImplementedError, "no adapter for Linear. There are: .*llava.*text"),
        (lambda: "a string", TypeError, "needs a torch.nn.Module, not str"),
        (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)),
            NotImplementedError,
            "no adapter for GPT2LMHeadModel",
        ),
        (tiny("Phi3"), NotImplementedError, "Phi3Model is not a decoder .*: it has no Phi3Attention.q_proj"),
        (tiny("Olmo2"), NotImplementedError, "no Olmo2DecoderLayer.input_layernorm"),
        (tiny("Gemma2"), NotImplementedError, "no plain softmax in its attention"),
        (tiny("StableLm"), NotImplementedError, "no rotary positions over whole heads"),
        (tiny("Gemma3", "Gemma3TextConfig"), NotImplementedError, "no single rotary embedding"),
    ],
)
def test_models_that_cannot_be_patched(make, error, words):
    with pytest.raises(error, match=words):
        vlmaccel.patch(make())


def test_stats_before_there_are_any():
    model = build("llama")
    with pytest.raises(RuntimeError, match="not patched"):
        vlmaccel.stats(model)
    with vlmaccel.patched(model, "random"), pytest.raises(RuntimeError, match="has not run yet"):
        vlmaccel.stats(model)


def test_patching_again_adds_and_refuses_the_same_kind():
    model = build("llama")
    vlmaccel.patch(model, "random", ratio=0.5)
    vlmaccel.patch(model, "fastv", layer=3, ratio=0.3)
    model(**inputs("llama", 1))
    assert [s.layer for s in vlmaccel.stats(model).stages] == [0, 3]
    with pytest.raises(ValueError, match="random already: vlmaccel.unpatch"):
        vlmaccel.patch(model, "random", ratio=0.1)
    with vlmaccel.patched(model, "magnitude", layer=4, ratio=0.2):
        model(**inputs("llama", 1))
        assert [s.layer for s in vlmaccel.stats(model).stages] == [0, 3, 4]
    model(**inputs("llama", 1))
    assert [s.layer for s in vlmaccel.stats(model).stages] == [0, 3]
    vlmaccel.unpatch(model)
    assert vlmaccel.unpatch(model) is model  # once more does nothing


def test_pictures_that_do_not_fill_the_prompts():
    batch = inputs(VLM, 3, pad=True)
    with vlmaccel.patched(build(VLM), "random") as model:
        with pytest.raises(ValueError, match="sample 2 has 9 image tokens"):
            model(**{**batch, "pixel_values": batch["pixel_values"][:-1]})
        with pytest.raises(ValueError, match="5 pictures were given, but .* are filled by 4"):
            model(**{**batch, "pixel_values": batch["pixel_values"][[0, 1, 2, 3, 3]]})
        model(**batch)  # and the model is still usable


@torch.no_grad()
def test_nan_is_named():
    model = build("llama")
    weight = model.get_input_embeddings().weight
    kept = weight[7].clone()
    weight[7] = float("nan")
    try:
        with vlmaccel.patched(model, "magnitude"), pytest.raises(ValueError, match="magnitude: .* layer 2 are NaN"):
            model(input_ids=torch.tensor([[1, 7, 8, 9, 10, 11, 12]]))
    finally:
        weight[7] = kept


@dataclass(frozen=True)
class WrongShape(Method):
    """Answers for the wrong number of tokens."""

    name = "wrong-shape"

    def decoder_layers(self, depth):
        return (1,)

    def decoder_layer(self, at):
        return Reduction.identity(1, 3)


@dataclass(frozen=True)
class InVision(Method):
    """Acts where a text model has nothing."""

    name = "in-vision"

    def vision_block(self, at):
        return None


def test_a_method_is_told_what_is_wrong_with_it():
    with (
        vlmaccel.patched(build("llama"), WrongShape()) as model,
        pytest.raises(ValueError, match=r"of \(1, 3\) tokens"),
    ):
        model(**inputs("llama", 1))
    with pytest.raises(NotImplementedError, match="acts at vision_block, which the adapter 'text' does not have"):
        vlmaccel.patch(build("llama"), InVision())


@dataclass(frozen=True)
class KeepLast(Method):
    """A method as another package would write it: only the last `n` tokens stay in the cache of every layer."""

    name = "keep-last"
    n: int = 4

    def cache_layers(self, depth):
        return range(depth)

    def cache(self, at):
        m = at.entries.keys.shape[2]
        wanted = (torch.arange(m) >= m - self.n).expand(at.entries.keys.shape[0], -1)
        return Reduction.select(wanted)


class AnyLlama(base.Adapter):
    """An adapter as another package would write it."""

    name = "any-llama"
    summary = "whatever calls itself Llama"

    def matches(self, model):
        return type(model).__name__.startswith("Llama")

    def parts(self, model):
        from vlmaccel.adapters.text import decoder_parts

        return decoder_parts(model.model, model.model)

    def default(self, depth):
        return KeepLast()


def test_entry_points_of_other_packages(monkeypatch):
    points = {
        "vlmaccel.methods": [EntryPoint("keep-last", f"{__name__}:KeepLast", "vlmaccel.methods")],
        "vlmaccel.adapters": [EntryPoint("any-llama", f"{__name__}:ANY_LLAMA", "vlmaccel.adapters")],
    }
    monkeypatch.setitem(sys.modules, __name__, ModuleType(__name__))
    monkeypatch.setattr(sys.modules[__name__], "KeepLast", KeepLast, raising=False)
    monkeypatch.setattr(sys.modules[__name__], "ANY_LLAMA", AnyLlama(), raising=False)
    monkeypatch.setattr(sys.modules["vlmaccel.methods"], "entry_points", lambda group: points[group])
    monkeypatch.setattr(base, "entry_points", lambda group: points[group])
    registry.cache_clear()
    base._installed.cache_clear()
    try:
        assert vlmaccel.methods()["keep-last"].startswith("A method as another package")
        assert vlmaccel.adapters()["any-llama"] == "whatever calls itself Llama"
        with vlmaccel.patched(build("llama")) as model:
            out = model(**inputs("llama", 1), use_cache=True)
        assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [4] * DEPTH
        assert out.past_key_values.get_seq_length() == inputs("llama", 1)["input_ids"].shape[1]
    finally:
        registry.cache_clear()
        base._installed.cache_clear()


def test_registering_an_adapter_needs_a_name():
    with pytest.raises(ValueError, match="a name and a one-line summary"):
        base.register(base.Adapter())


def test_methods_are_hashable_and_show_their_options():
    assert repr(PyramidDrop(layers=[1, 2])) == repr(PyramidDrop(layers=(1, 2)))
    assert hash(Pool()) == hash(Pool())
    with vlmaccel.patched(build("llama"), Random(ratio=0.25, seed=3)) as model:
        model(**inputs("llama", 1))
        stats = vlmaccel.stats(model)
    assert "Random(layer=0, ratio=0.25" in str(stats)
    assert stats.flops_ratio < 1
    assert stats.kv_bytes < stats.kv_bytes_full
