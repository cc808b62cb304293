"""What `vlmaccel eval text` does: perplexity, needles and decode rate of a text LLM, unpatched and with each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import vlmaccel
from vlmaccel.evals.needle import Found, Needle, find, hide
from vlmaccel.evals.text import Perplexity, check_positions, cut, perplexity, tokens_of
from vlmaccel.evals.text_result import UNPATCHED, TextResult, TextSettings
from vlmaccel.evals.timing import Measured, clock_for, machine, measure_in_turn, time_generate
from vlmaccel.hooks import Method

if TYPE_CHECKING:
    from vlmaccel.evals.demo import Progress


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    ways: Mapping[str, Method],
    settings: TextSettings,
    progress: Progress,
    facts: Mapping[str, Any] | None = None,
) -> TextResult:
    """Measure an unpatched model, and the same with the method of each way.

    text: see `vlmaccel.evals.text.text_source`. ways: methods by the names that they have in the result.
    facts: what else is to be kept with the settings, e.g. the text's name.
    Raises ValueError for settings that the text or the model is too short for, before anything is measured.
    """
    _check(model, ways, settings)
    tokens = tokens_of(tokenizer, text)
    windows = cut(tokens, settings.context, settings.windows) if settings.windows else None
    lengths = settings.lengths if settings.needles else ()
    hidden = {length: hide(tokenizer, tokens, length, settings.needles, settings.seed) for length in lengths}
    prompt = cut(tokens, settings.timed_prompt, 1) if settings.turns else None

    perplexities: dict[str, Perplexity] = {}
    found: dict[str, dict[int, list[Found]]] = {}
    for way, method in (UNPATCHED, None), *ways.items():
        with _patched(model, method):
            if windows is not None:
                perplexities[way] = _perplexity(model, windows, settings, progress, way)
            found[way] = _needles(model, tokenizer, hidden, progress, way)
    measured = None if prompt is None else _speed(model, prompt, ways, settings, progress)
    known = dataclasses.asdict(settings) | dict(facts or {}) | {"methods": {way: repr(m) for way, m in ways.items()}}
    facts_of_machine = machine(model) | {"clock": clock_for(model.device), "vlmaccel": vlmaccel.__version__}
    return TextResult(perplexities, found, measured, known, facts_of_machine)


def _check(model: Any, ways: Mapping[str, Method], settings: TextSettings) -> None:
    if UNPATCHED in ways:
        raise ValueError(f"no method can be called {UNPATCHED!r}")
    if ways and settings.windows and not settings.prefill:
        raise ValueError(
            "without a prefill a window is scored in one forward, where a method finds no cache to compress and a token "
            "that it drops predicts nothing: give no method, or a prefill above 0"
        )
    needed = [settings.context] if settings.windows else []
    needed += settings.lengths if settings.needles else ()
    needed += [settings.timed_prompt + settings.timed_tokens] if settings.turns else []
    if not needed:
        raise ValueError("nothing is to be measured: ask for windows, needles or turns")
    check_positions(model, max(needed))


def _patched(model: Any, method: Method | None) -> AbstractContextManager[Any]:
    return vlmaccel.patched(model, method) if method else nullcontext()


def _perplexity(model: Any, windows: Tensor, settings: TextSettings, progress: Progress, way: str) -> Perplexity:
    first = max(1, round(settings.prefill * settings.context))
    progress.start(f"{way}: perplexity", len(windows) * (settings.context - first))
    return perplexity(model, windows, settings.prefill, settings.step, settings.batch_size, progress.advance)


def _needles(
    model: Any, tokenizer: Any, hidden: Mapping[int, list[Needle]], progress: Progress, way: str
) -> dict[int, list[Found]]:
    found = {}
    for length, needles in hidden.items():
        progress.start(f"{way}: needles in {length} tokens", len(needles))
        found[length] = find(model, tokenizer, needles, progress.advance)
    return found


def _speed(
    model: Any, prompt: Tensor, ways: Mapping[str, Method], settings: TextSettings, progress: Progress
) -> Measured:
    """Time to first token and time of a decode step of one sequence, all ways in turn."""
    inputs = {"input_ids": prompt.to(model.device), "attention_mask": torch.ones_like(prompt).to(model.device)}

    @torch.inference_mode()
    def run() -> dict[str, Any]:
        # generate() warns of sampling settings that a checkpoint has and greedy decoding has no use for
        return time_generate(model, inputs, settings.timed_tokens, temperature=None, top_p=None, top_k=None)

    progress.start("decode rate", (settings.turns + 1) * (1 + len(ways)))
    return measure_in_turn(
        dict.fromkeys([UNPATCHED, *ways], run),
        settings.turns,
        contexts={way: lambda method=method: vlmaccel.patched(model, method) for way, method in ways.items()},  # type: ignore[misc]
        device=model.device,
        progress=lambda name, turn: progress.advance(1),
    )
