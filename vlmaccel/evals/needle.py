"""A needle in a haystack: one sentence with a number, somewhere in a long text, and a question about it at the end.

After https://github.com/gkamradt/LLMTest_NeedleInAHaystack, with a needle whose answer can be checked to the letter.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vlmaccel
from vlmaccel.evals.text import check_positions

NEEDLE = "The secret number of {city} is {code}."
QUESTION = "What is the secret number of {city}?"
ANSWER = "The secret number of {city} is"  # what a model without a chat template is to go on with
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Prague", "Quito", "Vienna", "Nairobi")
MAX_NEW_TOKENS = 20


@dataclass(frozen=True)
class Needle:
    """ids: (1, N) int64, the whole prompt. code: the five digits to find. depth: 0 (start of the text) to 1 (end)."""

    ids: Tensor
    code: str
    depth: float


@dataclass(frozen=True)
class Found:
    """What was answered to one needle.

    hit: whether the code is in the answer. prompt: its tokens. kv_bytes, kv_bytes_full: of the KV cache after the
    prompt, as it is and as an unpatched model's; 0 for an unpatched model.
    """

    depth: float
    code: str
    answer: str
    hit: bool
    prompt: int
    kv_bytes: int = 0
    kv_bytes_full: int = 0


def hide(tokenizer: Any, tokens: Tensor, length: int, count: int = 5, seed: int = 0) -> list[Needle]:
    """`count` needles at depths spread evenly from 0 to 1 (one: in the middle), each in another piece of the text.

    tokens: (N,) int64, the text to hide them in. length: tokens of prompt and answer together; the prompt is at most a
    few tokens shorter. The prompt is the chat template's, or plain text if the tokenizer has none.
    Raises ValueError if `length` leaves no room for text, or the text is too short for it.
    """
    made = []
    for i in range(count):
        depth = i / (count - 1) if count > 1 else 0.5
        rng = random.Random(f"{seed} {length} {i}")
        city, code = CITIES[i % len(CITIES)], str(rng.randrange(10_000, 100_000))
        room = length - MAX_NEW_TOKENS - _prompt(tokenizer, "", city, code, depth).shape[1]
        if room < 1:
            raise ValueError(f"a needle, its question and its answer need more than {length} tokens")
        if room > len(tokens):
            raise ValueError(f"the text has {len(tokens)} tokens, too few for a haystack of {room}")
        start = rng.randint(0, len(tokens) - room)
        ids = _prompt(tokenizer, tokenizer.decode(tokens[start : start + room].tolist()), city, code, depth)
        # where the cut text meets the template, tokens can come out otherwise, and be a few more
        while (over := ids.shape[1] + MAX_NEW_TOKENS - length) > 0:
            room -= over
            ids = _prompt(tokenizer, tokenizer.decode(tokens[start : start + room].tolist()), city, code, depth)
        made.append(Needle(ids, code, depth))
    return made


def _prompt(tokenizer: Any, haystack: str, city: str, code: str, depth: float) -> Tensor:
    """(1, N) int64: the haystack with the needle on a line of its own at `depth`, and the question behind it."""
    place = round(depth * len(haystack))
    place = haystack.find("\n", place) if "\n" in haystack[place:] else len(haystack)
    text = f"{haystack[:place]}\n{NEEDLE.format(city=city, code=code)}\n{haystack[place:].lstrip(chr(10))}".strip()
    asked = f"{text}\n\n{QUESTION.format(city=city)}"
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": asked}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer(f"{asked}\n{ANSWER.format(city=city)}", verbose=False)["input_ids"]
    return torch.tensor([ids])


@torch.inference_mode()
def find(
    model: Any, tokenizer: Any, needles: Sequence[Needle], tick: Callable[[int], object] | None = None
) -> list[Found]:
    """The model's greedy answer to every needle, patched or not. tick: called with 1 after each.

    Raises ValueError for prompts longer than the model's positions.
    """
    found = []
    for needle in needles:
        check_positions(model, needle.ids.shape[1] + MAX_NEW_TOKENS)
        ids = needle.ids.to(model.device)
        # a checkpoint's own sampling settings would only be warned about
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, **greedy)
        answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
        prompt = ids.shape[1]
        found.append(Found(needle.depth, needle.code, answer, hit(answer, needle.code), prompt, *_kv_bytes(model)))
        if tick:
            tick(1)
    return found


def hit(answer: str, code: str) -> bool:
    """Whether the code is in the answer, exactly and not as part of a longer number."""
    return re.search(rf"(?<!\d){re.escape(code)}(?!\d)", answer) is not None


def _kv_bytes(model: Any) -> tuple[int, int]:
    try:
        stats = vlmaccel.stats(model)
    except RuntimeError:  # not patched
        return 0, 0
    assert isinstance(stats, vlmaccel.Stats)  # a model that answers has a decoder
    return stats.kv_bytes, stats.kv_bytes_full
