"""Questions with their answers to train on: several behind one picture in one forward, as if each had a prompt of its own."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmaccel.evals.samples import VQASample
from vlmaccel.evals.vqa import place
from vlmaccel.evals.vqa_data import read_samples

IGNORED = -100  # the label of a token that is no answer, as transformers has it
SHARED, PADDING = -1, -2  # in place of a question's number


@dataclass(frozen=True)
class Dialogue:
    """A picture, and questions with the answer to each."""

    image: Any
    questions: tuple[tuple[str, str], ...]


Source = Callable[[random.Random, int, int], list[Dialogue]]


@dataclass(frozen=True, eq=False)
class Packed:
    """Inputs of one forward over a batch of dialogues.

    inputs: what the model is called with: `input_ids` (B, N), padded on the right, `attention_mask` (B, 1, N, N) bool,
        `position_ids` (B, N), and the pictures. labels: (B, N) int64, the answers with what ends them, `IGNORED` elsewhere.
    question: (B, N) int64, number of the question that a token belongs to, `SHARED` up to the picture's end, or `PADDING`.
    """

    inputs: dict[str, Any]
    labels: Tensor
    question: Tensor


def source(data: str) -> Source:
    """Where training draws dialogues from: "collage" (new ones of easy-VQA's training pictures, without end) or a JSONL file, see
    `vlmaccel.evals.vqa_data`. It is called with a random generator, how many pictures, and questions about each, at most."""
    if data == "collage":
        return draw_collages
    groups: dict[str, list[VQASample]] = defaultdict(list)
    for sample in read_samples(data):
        groups[sample.image_id].append(sample)
    pictures = list(groups.values())

    def draw(rng: random.Random, count: int, questions: int) -> list[Dialogue]:
        drawn = [rng.choice(pictures) for _ in range(count)]
        return [dialogue(rng.sample(samples, min(questions, len(samples)))) for samples in drawn]

    return draw


def draw_collages(rng: random.Random, count: int, questions: int) -> list[Dialogue]:
    """See `source`."""
    from vlmaccel.evals.easy_vqa import collage_questions, make_collage

    drawn = []
    for _ in range(count):
        collage = make_collage("train", rng)
        asked = collage_questions(collage.objects, rng, questions)
        drawn.append(Dialogue(Image.fromarray(collage.pixels), tuple((q.text, q.answer) for q in asked)))
    return drawn


def dialogue(samples: Sequence[VQASample]) -> Dialogue:
    """The questions about one picture, each with its first answer."""
    image = samples[0].image
    opened = Image.open(image).convert("RGB") if isinstance(image, str) else image
    return Dialogue(opened, tuple((sample.question, sample.answers[0]) for sample in samples))


def dialogues(samples: Sequence[VQASample]) -> list[Dialogue]:
    """All questions, picture by picture."""
    groups: dict[str, list[VQASample]] = defaultdict(list)
    for sample in samples:
        groups[sample.image_id].append(sample)
    return [dialogue(group) for group in groups.values()]


class Packer:
    """Makes the inputs of a model with one position a token out of dialogues.

    processor: of the model, with a chat template. model: the model, for its device, dtype and image token.
    Raises NotImplementedError for a model in which a token has several positions (M-RoPE), or whose attention is not sdpa.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        text = model.config.get_text_config()
        if "mrope_section" in (getattr(text, "rope_parameters", None) or {}):
            raise NotImplementedError(
                f"questions are packed behind one picture by their positions, and in {type(model).__name__} a token has three "
                "(time, row, column): this trains models with one position a token, such as LLaVA"
            )
        if text._attn_implementation != "sdpa":
            raise NotImplementedError(
                "which tokens of packed questions see one another is a mask that only sdpa attention takes, and this model has "
                f'"{text._attn_implementation}": load it with attn_implementation="sdpa"'
            )
        self.model, self.processor = model, processor
        self.image_token = model.config.image_token_id
        self._parts = functools.lru_cache(maxsize=65536)(self._split)

    def __call__(self, batch: Sequence[Dialogue]) -> Packed:
        """The inputs of one forward over a batch."""
        first = self.processor(
            images=[one.image for one in batch],
            text=[self._text(*one.questions[0]) for one in batch],
            padding=True,
            return_tensors="pt",
        )
        rows = []
        for one, ids, mask in zip(batch, first.pop("input_ids"), first.pop("attention_mask"), strict=True):
            ids = ids[mask.bool()]
            end = int((ids == self.image_token).nonzero()[-1]) + 1
            rows.append((ids[:end], [self._parts(*pair) for pair in one.questions]))
        inputs, labels, question = packed(rows)
        inputs |= {name: place(value, self.model) for name, value in first.items()}
        inputs = {name: place(value, self.model) for name, value in inputs.items()}
        return Packed(inputs, labels.to(self.model.device), question.to(self.model.device))

    def _text(self, question: str, answer: str | None) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.processor.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)

    def _split(self, question: str, answer: str) -> tuple[Tensor, int]:
        """Tokens of question and answer behind the picture, and how many of them are the question."""
        prompt, whole = (self._behind(self._text(question, text)) for text in (None, answer))
        shared = 0
        while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
            shared += 1
        return torch.tensor(whole), shared

    def _behind(self, text: str) -> list[int]:
        ids = self.processor.tokenizer(text)["input_ids"]
        if self.image_token not in ids:
            raise ValueError(f"the chat template writes no image token into {text!r}")
        return ids[len(ids) - ids[::-1].index(self.image_token) :]


def packed(rows: Sequence[tuple[Tensor, Sequence[tuple[Tensor, int]]]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Text inputs, labels and question numbers, see `Packed`, of rows: a prefix (n,) that all questions of the row follow, and
    each question's tokens (m,) with how many of them are no answer."""
    longest = max(len(prefix) + sum(len(tokens) for tokens, _ in asked) for prefix, asked in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    position, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    question = torch.full_like(ids, PADDING)
    for b, (prefix, asked) in enumerate(rows):
        end = len(prefix)
        ids[b, :end], position[b, :end], question[b, :end] = prefix, torch.arange(end), SHARED
        for number, (tokens, given) in enumerate(asked):
            here = slice(end, end + len(tokens))
            ids[b, here], question[b, here] = tokens, number
            position[b, here] = len(prefix) + torch.arange(len(tokens))
            labels[b, end + given : end + len(tokens)] = tokens[given:]
            end += len(tokens)
    same = (question[:, :, None] == question[:, None]) | (question[:, None] == SHARED)
    mask = same & torch.ones(longest, longest, dtype=torch.bool).tril()
    return {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": position}, labels, question


def right(logits: Tensor, batch: Packed) -> list[bool]:
    """Whether each question, row by row, gets its whole answer when every token is the likeliest given the right ones before it:
    the same as a right answer from greedy decoding. logits: (B, N, vocab)."""
    wrong = (logits[:, :-1].argmax(-1) != batch.labels[:, 1:]) & (batch.labels[:, 1:] != IGNORED)
    found = []
    for missed, question in zip(wrong, batch.question[:, 1:], strict=True):
        found += [not bool(missed[question == number].any()) for number in range(int(question.max()) + 1)]
    return found
