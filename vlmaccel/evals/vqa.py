"""Visual question answering: asks a model every question of a data set and scores the answers.

The prompts come from the processor's chat template, batches are padded on the left, decoding is greedy. Finished
answers go to a file as they come, so that an interrupted run can go on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import vlmaccel
from vlmaccel.evals.answer_file import AnswerFile
from vlmaccel.evals.samples import VQASample
from vlmaccel.evals.vqa_accuracy import exact_match, vqa_accuracy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
# a checkpoint's own sampling settings would only be warned about
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
COSTS = ("visual_tokens", "nominal_visual_tokens", "flops", "flops_full", "kv_bytes", "kv_bytes_full")


@dataclass(frozen=True)
class Answer:
    """What the model answered to one question.

    accuracy is the VQA accuracy, 0 to 1. cost is empty for an unpatched model, else the `COSTS` of the prompt's
    prefill, each the average over the questions of its batch.
    """

    id: str
    kind: str
    question: str
    answer: str
    accuracy: float
    exact: bool
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Score(NamedTuple):
    """Means over `questions` questions, 0 to 1."""

    accuracy: float
    exact_match: float
    questions: int


@dataclass(frozen=True)
class VQAResult:
    """All answers in the order of the questions, and the settings they were made with."""

    answers: tuple[Answer, ...]
    settings: Mapping[str, Any]

    @property
    def score(self) -> Score:
        return _score(self.answers)

    def by_kind(self) -> dict[str, Score]:
        """The score of every kind of question."""
        kinds = sorted({answer.kind for answer in self.answers})
        return {kind: _score([answer for answer in self.answers if answer.kind == kind]) for kind in kinds}

    def cost(self) -> dict[str, float]:
        """Means of the `COSTS` over all questions; empty for an unpatched model."""
        known = [answer.cost for answer in self.answers if answer.cost]
        return {name: statistics.fmean(cost[name] for cost in known) for name in COSTS if known}

    def texts(self) -> dict[str, str]:
        """What was answered, by the question's id."""
        return {answer.id: answer.answer for answer in self.answers}

    def loyalty(self, other: Mapping[str, str]) -> float:
        """Share of the questions answered as in `other` (the `texts` of another result), right or wrong."""
        if missing := self.texts().keys() - other.keys():
            raise ValueError(f"there is no other answer to {len(missing)} questions, e.g. {min(missing)}")
        return statistics.fmean(text == other[name] for name, text in self.texts().items())

    def summary(self) -> dict[str, Any]:
        """Settings, scores and costs as plain data."""
        by_kind = {kind: score._asdict() for kind, score in self.by_kind().items()}
        return {
            "settings": dict(self.settings),
            **self.score._asdict(),
            "kinds": by_kind,
            "cost": self.cost(),
        }


def _score(answers: Sequence[Answer]) -> Score:
    accuracy = statistics.fmean(answer.accuracy for answer in answers)
    return Score(accuracy, statistics.fmean(answer.exact for answer in answers), len(answers))


@dataclass(frozen=True)
class Batch:
    """Questions and the model inputs made of them, padded on the left."""

    samples: Sequence[VQASample]
    inputs: Mapping[str, Any]


def load(model: str, dtype: str = "auto", device: str | None = None, device_map: str | None = None) -> tuple[Any, Any]:
    """A vision-language model and its processor, from a local directory or a hub id.

    dtype: one of `DTYPES`; "auto" is that of the checkpoint. device: the GPU if there is one, else the CPU.
    device_map: given to accelerate instead of `device`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if device and device_map:
        raise ValueError("give either a device or a device map, not both")
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ValueError(f"there is no model directory {model}")
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=DTYPES[dtype], **options).eval()
    if not device_map:
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded, AutoProcessor.from_pretrained(model)


def prepare(processor: Any, samples: Sequence[VQASample], batch_size: int, instruction: str = "") -> Iterator[Batch]:
    """Batches of model inputs; pictures of a size and questions of a length come together, so that little is padded.

    instruction: put behind every question, on a line of its own, e.g. LLaVA-1.5's "Answer the question using a single
    word or phrase."
    """
    order = sorted(samples, key=lambda s: (_size(s), len(processor.tokenizer(s.question)["input_ids"])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        chats = [_chat(sample, instruction) for sample in batch]
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
        )
        yield Batch(batch, inputs)


def _size(sample: VQASample) -> tuple[int, int]:
    if isinstance(sample.image, Image.Image):
        return sample.image.size
    with _open(sample) as image:  # reads the header only
        return image.size


def _open(sample: VQASample) -> Image.Image:
    if isinstance(sample.image, Image.Image):
        return sample.image
    try:
        return Image.open(sample.image)
    except OSError as error:
        raise ValueError(f"question {sample.id}: cannot read its image {sample.image}: {error}") from error


def _chat(sample: VQASample, instruction: str) -> list[dict[str, Any]]:
    text = f"{sample.question}\n{instruction}" if instruction else sample.question
    picture = {"type": "image", "image": _open(sample).convert("RGB")}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


@torch.inference_mode()
def answer(model: Any, processor: Any, batches: Iterable[Batch], max_new_tokens: int) -> Iterator[list[Answer]]:
    """The greedy answers to each batch."""
    for batch in batches:
        inputs = {name: place(value, model) for name, value in batch.inputs.items()}
        written = model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens)
        new = written[:, inputs["input_ids"].shape[1] :]
        cost = _cost(model, len(batch.samples))
        texts = processor.batch_decode(new, skip_special_tokens=True)
        yield [marked(sample, text, cost) for sample, text in zip(batch.samples, texts, strict=True)]


def place(value: Any, model: Any) -> Any:
    """A model input on the model's device, in its dtype if it is a floating point tensor."""
    if not isinstance(value, torch.Tensor):
        return dict(value) if isinstance(value, Mapping) else value  # generate() fills in what it encodes
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _cost(model: Any, batch: int) -> dict[str, float]:
    try:
        stats = vlmaccel.stats(model)
    except RuntimeError:  # not patched
        return {}
    assert isinstance(stats, vlmaccel.Stats)  # a model that answers questions has a decoder
    of_batch = ("flops", "flops_full", "kv_bytes", "kv_bytes_full")
    cost = {name: getattr(stats, name) / batch for name in of_batch}
    return cost | {
        "visual_tokens": stats.mean_visual_tokens,
        "nominal_visual_tokens": stats.nominal_visual_tokens,
    }


def marked(sample: VQASample, text: str, cost: Mapping[str, float]) -> Answer:
    """The answer `text` with its accuracies; cost: as in `Answer`."""
    text = text.strip()
    right = vqa_accuracy(text, sample.answers), exact_match(text, sample.answers)
    return Answer(sample.id, sample.kind, sample.question, text, *right, cost)


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[VQASample],
    batch_size: int = 8,
    max_new_tokens: int = 16,
    out: Path | None = None,
    instruction: str = "",
    settings: Mapping[str, Any] | None = None,
    tick: Callable[[int], object] | None = None,
) -> VQAResult:
    """Ask every question and score the answers.

    out: file that gets one JSON line for every finished answer, after a line with the settings. If it exists, the
        answers in it are not asked again; a file that was made with other settings is refused.
    settings: what else the answers depend on, e.g. the names of the model, the method and the data.
    tick: called with the number of newly finished questions, for a progress bar.
    """
    by_id = {sample.id: sample for sample in samples}
    if not samples or len(by_id) < len(samples):
        raise ValueError("there are no questions" if not samples else "several questions have the same id")
    made_with = {
        "model": getattr(model.config, "name_or_path", ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "instruction": instruction,
        **(settings or {}),
    }
    report = tick or (lambda count: None)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(AnswerFile(out, made_with)) if out else None
        done = _finished(file.rows, by_id) if file else {}
        report(len(done))
        left = [sample for sample in samples if sample.id not in done]
        for finished in answer(model, processor, prepare(processor, left, batch_size, instruction), max_new_tokens):
            if file:
                file.write(dataclasses.asdict(new) for new in finished)
            done |= {new.id: new for new in finished}
            report(len(finished))
    return VQAResult(tuple(done[sample.id] for sample in samples), made_with)


def _finished(rows: Iterable[Mapping[str, Any]], by_id: Mapping[str, VQASample]) -> dict[str, Answer]:
    """Answers from a file to those questions that are asked; their marks are worked out anew."""
    done = {}
    for row in rows:
        sample = by_id.get(row["id"])
        if sample is not None:
            if row["question"] != sample.question:
                raise ValueError(f"the file has an answer to another question {sample.id}: {row['question']!r}")
            done[sample.id] = marked(sample, row["answer"], row["cost"])
    return done
