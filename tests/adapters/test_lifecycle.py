"""Patch and unpatch leave no trace, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

import vlmaccel
from tests.support.drops import KeepAll
from tests.support.lifecycle import GREEDY, MODELS, anatomy, drop, outcome, same
from tests.support.models import DEPTH, KINDS, build, inputs
from vlmaccel.methods import FastV, Uniform


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [None, "fixed"])
def test_unpatch_leaves_nothing(kind: str, method: str | None) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before, clean = outcome(model, batch), anatomy(model)
    assert vlmaccel.patch(model, drop(kind, batch) if method else None) is model
    assert anatomy(model) != clean
    assert not same(outcome(model, batch), before)
    assert vlmaccel.unpatch(model) is model
    assert anatomy(model) == clean
    assert same(outcome(model, batch), before)
    assert vlmaccel.unpatch(model) is model  # once more does no harm
    with pytest.raises(RuntimeError, match="not patched"):
        vlmaccel.stats(model)


class Stop(Exception):
    """Raised on purpose."""


def explode_after(calls: int) -> Any:
    """A callable for generate's plug-ins that raises in its n-th call."""
    count = 0

    def explode(input_ids: Tensor, scores: Any = None, **_: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise Stop
        return scores

    return explode


def stopping(calls: int) -> Any:
    """A stopping criterion that raises in its n-th call."""
    explode = explode_after(calls)

    def criterion(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        explode(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return criterion


@contextmanager
def broken_layer(model: Any, layer: int, calls: int) -> Iterator[dict[str, Any]]:
    """One decoder layer raises in its n-th call, so a forward ends half way."""
    explode = explode_after(calls)
    text = getattr(model.model, "language_model", model.model)
    handle = text.layers[layer].mlp.register_forward_pre_hook(lambda module, args: explode(args[0]))
    try:
        yield {}
    finally:
        handle.remove()


@contextmanager
def plug_in(option: str, make: Any, calls: int) -> Iterator[dict[str, Any]]:
    """Options of generate with a plug-in that raises."""
    yield {option: StoppingCriteriaList([make(calls)]) if option == "stopping_criteria" else [make(calls)]}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("where", ["criterion", "processor-first", "processor", "layer-prefill", "layer-decode"])
def test_generate_that_raised_half_way(kind: str, where: str) -> None:
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before, clean = outcome(model, batch), anatomy(model)
    vlmaccel.patch(model, drop(kind, batch))
    right = outcome(model, batch)
    trouble = {
        "criterion": lambda: plug_in("stopping_criteria", stopping, 2),
        "processor-first": lambda: plug_in("logits_processor", explode_after, 0),
        "processor": lambda: plug_in("logits_processor", explode_after, 2),
        "layer-prefill": lambda: broken_layer(model, 3, 0),
        "layer-decode": lambda: broken_layer(model, 4, 2),
    }[where]
    with trouble() as options, pytest.raises(Stop):
        model.generate(**batch, **GREEDY, **options)
    assert same(outcome(model, batch), right)  # nothing of the run that broke is left in the next
    with trouble() as options, pytest.raises(Stop):
        model.generate(**batch, **GREEDY, **options)
    vlmaccel.unpatch(model)
    assert anatomy(model) == clean
    assert same(outcome(model, batch), before)


def test_a_method_that_raises() -> None:
    class Broken(KeepAll):
        def decoder_layer(self, at: Any) -> Any:
            raise Stop

    model, batch = build("llama"), inputs("llama", 3, pad=True)
    before, clean = outcome(model, batch), anatomy(model)
    with pytest.raises(Stop), vlmaccel.patched(model, Broken((2,))):
        model.generate(**batch, **GREEDY)
    assert anatomy(model) == clean
    assert same(outcome(model, batch), before)


def test_patched_undoes_itself_also_after_an_exception() -> None:
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before, clean = outcome(model, batch), anatomy(model)
    with pytest.raises(Stop), vlmaccel.patched(model, drop(kind, batch)) as inside:
        assert inside is model
        model.generate(**batch, **GREEDY)
        raise Stop
    assert anatomy(model) == clean
    assert same(outcome(model, batch), before)


def test_patched_inside_a_patched_model_gives_back_the_outer_patch() -> None:
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    vlmaccel.patch(model, drop(kind, batch))
    outer = outcome(model, batch)
    with vlmaccel.patched(model, "uniform", layer=2, ratio=0.25):
        assert not same(outcome(model, batch), outer)
        assert len(vlmaccel.stats(model).methods) == 2
    assert same(outcome(model, batch), outer)


def test_patching_twice_composes_and_refuses_the_same_method() -> None:
    kind = "llava-clip-llama"
    model, batch = build(kind), inputs(kind, 3, pad=True)
    before, clean = outcome(model, batch), anatomy(model)
    vlmaccel.patch(model, "fastv", layer=1, ratio=0.5)
    one = outcome(model, batch)
    hooked = anatomy(model)
    with pytest.raises(ValueError, match="fastv"):
        vlmaccel.patch(model, "fastv", layer=3)
    assert anatomy(model) == hooked and same(outcome(model, batch), one)
    vlmaccel.patch(model, "uniform", layer=4, ratio=0.25)
    two = outcome(model, batch)
    tokens = vlmaccel.stats(model).visual_tokens
    assert tokens[0] > tokens[1] == tokens[3] > tokens[4] == tokens[5]
    vlmaccel.unpatch(model)
    assert anatomy(model) == clean and same(outcome(model, batch), before)
    with vlmaccel.patched(model, [FastV(layer=1, ratio=0.5), Uniform(layer=4, ratio=0.25)]):
        assert same(outcome(model, batch), two)


def test_what_cannot_be_patched_is_left_as_it_was() -> None:
    model, batch = build("llama"), inputs("llama", 3, pad=True)
    clean = anatomy(model)
    for method, error in (
        ("no-such-method", ValueError),
        (KeepAll((DEPTH,)), ValueError),
        (3, TypeError),
        ([], TypeError),
        ([KeepAll((0,)), KeepAll((1,))], ValueError),
    ):
        with pytest.raises(error):
            vlmaccel.patch(model, method)
        assert anatomy(model) == clean
    with pytest.raises(TypeError, match="ration"):
        vlmaccel.patch(model, "fastv", ration=0.5)
    with pytest.raises(TypeError, match="ratio"):
        vlmaccel.patch(model, KeepAll((0,)), ratio=0.5)
    with pytest.raises(NotImplementedError, match="Linear"):
        vlmaccel.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="str"):
        vlmaccel.patch("llava-hf/llava-1.5-7b-hf")  # type: ignore[arg-type]
    assert anatomy(model) == clean
    outcome(model, batch)
