"""Several questions about a picture, one after the other over the same KV cache.

What a method drops or evicts while it reads the first question is gone when the next one comes: accuracy by turn tells
whether its choice fits that first question only (the question of SCBench, arXiv 2412.10319, put to pictures).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationMixin

from vlmaccel.adapters.decoder import cache_of
from vlmaccel.cache import kv_bytes
from vlmaccel.evals.samples import VQASample
from vlmaccel.evals.vqa import GREEDY, Answer, marked, place, prepare

_TAKEN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
SHARED_PREFIX, CONVERSATION = MODES = ("shared-prefix", "conversation")
ANSWER = "\ue000"  # stands for an answer in the chat template, which must not take it for white space
# what generate() calls its KV cache: `past_key_values` until transformers 5.23
CACHE = next(name for name in ("cache", "past_key_values") if name in _TAKEN)


class Conversations(NamedTuple):
    """Questions in the order they are asked, a list for every conversation, and how many pictures have too few."""

    questions: list[list[VQASample]]
    left_out: int


@dataclass(frozen=True)
class TurnAnswer(Answer):
    """An answer, the number of its turn from 1, and the bytes of the KV cache after it.

    kv_bytes_full: what an unpatched cache of the same tokens holds; kv_bytes is the same if the model is not patched.
    """

    turn: int = 1
    kv_bytes: int = 0
    kv_bytes_full: int = 0


def conversations(samples: Iterable[VQASample], turns: int, seed: int = 0, limit: int | None = None) -> Conversations:
    """`turns` conversations about each picture, which put the same `turns` questions in rotated order.

    So every turn has the same questions, and what differs between turns is the method's doing. Ids get the turn's
    number, e.g. "collage/test/0/7/3/turn-2". Which questions, and their first order, is random, but the same for the
    same seed and questions; the one with the longest answer is always among them: most can go wrong there.
    limit: the most questions to ask in all, `turns` ** 2 about each picture.
    Raises ValueError if no picture has that many questions, or the limit leaves no picture.
    """
    if turns < 1:
        raise ValueError(f"the number of turns must be at least 1, not {turns}")
    if limit is not None and limit < turns**2:
        raise ValueError(f"{turns} turns ask {turns**2} questions about each picture: raise the limit of {limit}")
    by_picture: dict[Any, list[VQASample]] = {}
    for sample in samples:
        picture = sample.image if isinstance(sample.image, str) else id(sample.image)
        by_picture.setdefault(sample.image_id or picture, []).append(sample)
    chosen = [_choose(found, turns, seed) for found in by_picture.values() if len(found) >= turns]
    if not chosen:
        most = max(map(len, by_picture.values()), default=0)
        raise ValueError(f"no picture has {turns} questions, the most is {most}: ask for fewer turns")
    asked = chosen if limit is None else chosen[: limit // turns**2]
    rotated = [questions[k:] + questions[:k] for questions in asked for k in range(turns)]
    named = [
        [replace(sample, id=f"{sample.id}/turn-{turn}") for turn, sample in enumerate(questions, start=1)]
        for questions in rotated
    ]
    return Conversations(named, len(by_picture) - len(chosen))


def _choose(found: Sequence[VQASample], turns: int, seed: int) -> list[VQASample]:
    # a generator for every picture: its questions do not change with what other pictures there are
    rng = random.Random(f"{seed}/{found[0].id}")
    order = rng.sample(found, len(found))
    longest = max(order, key=lambda sample: max(len(answer.split()) for answer in sample.answers))
    return rng.sample([longest, *(sample for sample in order if sample is not longest)][:turns], turns)


@torch.inference_mode()
def converse(
    model: Any,
    processor: Any,
    questions: Sequence[VQASample],
    max_new_tokens: int,
    mode: str = SHARED_PREFIX,
    instruction: str = "",
) -> Iterator[TurnAnswer]:
    """The greedy answers to questions about one picture, which is encoded and prefilled once, with the first of them.

    mode: "conversation" appends every question and answer to what was said before. "shared-prefix" takes a question
        and its answer out of the cache again before the next one, which thus follows the picture, or what is left of
        it, as when a server shares the cache of a picture between questions.
    Raises ValueError for another mode, and if the cache cannot be cut back to the picture.
    """
    if mode not in MODES:
        raise ValueError(f"unknown turn mode {mode!r}; choose from {' and '.join(MODES)}")
    (batch,) = prepare(processor, questions[:1], 1, instruction)
    inputs: dict[str, Any] = {name: place(value, model) for name, value in batch.inputs.items()}
    for turn, sample in enumerate(questions, start=1):
        written = model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
        cache = cache_of(written)
        if cache is None:
            raise ValueError("several turns need a KV cache: set model.generation_config.use_cache = True")
        new = written.sequences[:, inputs["input_ids"].shape[1] :]
        answer = marked(sample, processor.batch_decode(new, skip_special_tokens=True)[0], {})
        held, full = kv_bytes(cache)
        yield TurnAnswer(**vars(answer), turn=turn, kv_bytes=held, kv_bytes_full=full)
        if turn < len(questions):
            if mode == SHARED_PREFIX:
                (batch,) = prepare(processor, [questions[turn]], 1, instruction)
                ids = place(batch.inputs["input_ids"], model)
                _cut_back(cache, _picture_end(model, ids))
            else:
                said = _without_end(model, written.sequences)
                ids = torch.cat([said, _next_turn(processor, questions[turn], instruction).to(said)], 1)
            # generate() leaves out those of the ids that the cache has seen, and the picture is among them
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache}


def _picture_end(model: Any, ids: Tensor) -> int:
    """How many tokens (1, N) the prompt has up to its picture's last one."""
    found = (ids[0] == model.config.image_token_id).nonzero()
    if not len(found):
        raise ValueError("the prompt has no visual tokens: the chat template leaves the picture out")
    return int(found[-1]) + 1


def _cut_back(cache: Any, tokens: int) -> None:
    try:
        cache.crop(tokens - cache.get_seq_length())
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"this KV cache cannot be cut back to the picture ({error}); use the turn mode {CONVERSATION!r}"
        ) from error


def _without_end(model: Any, ids: Tensor) -> Tensor:
    """What was said, (1, N), without the end token, which the chat template writes if it wants one there."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return ids[:, :-1] if int(ids[0, -1]) in ends else ids


def _next_turn(processor: Any, sample: VQASample, instruction: str) -> Tensor:
    """(1, n), what the chat template puts between an answer and the next one.

    The answer itself keeps the tokens that were generated: the tokenizer might split its text in another way.
    """
    question = {"type": "text", "text": f"{sample.question}\n{instruction}" if instruction else sample.question}
    chat = [
        {"role": "user", "content": [{"type": "image"}, question]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": [question]},
    ]
    _, found, after = processor.apply_chat_template(chat, add_generation_prompt=True).rpartition(ANSWER)
    if not found:
        raise ValueError("the chat template leaves earlier answers out: it does not do for a conversation")
    return processor.tokenizer(after, add_special_tokens=False, return_tensors="pt")["input_ids"]
