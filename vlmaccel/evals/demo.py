"""The demo: a small LLaVA and a small Qwen2-VL answer real questions, unpatched and with every method, at equal numbers of
visual tokens.

Every picture goes through the vision tower once: no method here changes what comes out.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vlmaccel
from vlmaccel.evals.budgets import Variant, variants
from vlmaccel.evals.easy_vqa import collages, easy_vqa
from vlmaccel.evals.samples import VQASample
from vlmaccel.evals.timing import Measured, clock_for, machine, measure_in_turn, time_generate
from vlmaccel.evals.vqa import Answer, Batch, VQAResult, answer, load, prepare
from vlmaccel.methods import make

ASSETS = Path(vlmaccel.__file__).parent / "assets"
CHECKPOINTS = {name: ASSETS / name for name in ("tiny-llava", "tiny-qwen2-vl")}
TASKS = ("collage", "easy-vqa")
CORE = ("shape-of-color", "color-of-shape", "exists-color", "exists-pair")  # questions that name one thing
MAX_NEW_TOKENS = 20  # the longest answer is 16 words
QUESTIONS = 120
BATCH = 16
PER_PICTURE = 5  # questions about one collage
TURNS = 5  # of the time measurement
TIMED_TOKENS = 9


class Progress(Protocol):
    """How the demo says where it is."""

    def start(self, what: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


@dataclass(frozen=True)
class Task:
    """A data set, ready for the model."""

    samples: Sequence[VQASample]
    batches: Sequence[Batch]


def subset(questions: int, seed: int) -> tuple[list[VQASample], list[VQASample]]:
    """About so many collage questions, and an eighth as many easy-VQA ones, all from the test split."""
    pictures = max(1, round(questions / PER_PICTURE))
    every = easy_vqa("test")
    easy = max(1, questions // 8)
    spread = [every[(2 * i + 1) * len(every) // (2 * easy)] for i in range(easy)]
    return collages("test", pictures, PER_PICTURE, seed), spread


def whole_split(seed: int) -> tuple[list[VQASample], list[VQASample]]:
    """2,500 questions about 250 test collages, and all of easy-VQA's test questions."""
    return collages("test", seed=seed), easy_vqa("test")


@torch.inference_mode()
def encode(model: Any, processor: Any, samples: Sequence[VQASample], progress: Progress) -> Task:
    """Batches in which pictures are replaced by their visual tokens."""
    known: dict[str, Any] = {}
    batches = []
    for batch in prepare(processor, samples, BATCH):
        inputs = dict(batch.inputs)
        pixels = inputs.pop("pixel_values").to(model.device, model.dtype)
        new = {s.image_id: i for i, s in enumerate(batch.samples) if s.image_id not in known}
        if new:
            chosen = some_pictures(pixels, inputs.get("image_grid_thw"), list(new.values()))
            known |= dict(zip(new, model.get_image_features(**chosen).pooler_output, strict=True))
        pictures = [known[sample.image_id] for sample in batch.samples]
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=pictures)}
        batches.append(Batch(batch.samples, inputs))
        progress.advance(len(batch.samples))
    return Task(samples, batches)


def some_pictures(pixels: Tensor, grids: Tensor | None, chosen: list[int]) -> dict[str, Tensor]:
    """The pixel values of some pictures of a batch.

    grids: of models that take pictures of any size, (pictures, 3), patches in time, height and width: there the rows of
    `pixels` are patches.
    """
    if grids is None:
        return {"pixel_values": pixels[chosen]}
    patches = pixels.split(grids.prod(-1).tolist())
    return {"pixel_values": torch.cat([patches[i] for i in chosen]), "image_grid_thw": grids[chosen].to(pixels.device)}


def ask(model: Any, processor: Any, task: Task, progress: Progress) -> VQAResult:
    """All answers to a task, in the order of its questions."""
    answers: dict[str, Answer] = {}
    for finished in answer(model, processor, task.batches, MAX_NEW_TOKENS):
        answers |= {new.id: new for new in finished}
        progress.advance(len(finished))
    return VQAResult(tuple(answers[sample.id] for sample in task.samples), {})


def load_faster(checkpoint: str, samples: Sequence[VQASample]) -> tuple[Any, Any]:
    """Model and processor in float32 or bfloat16: the one in which this machine answers a few questions sooner."""
    tried = []
    for dtype in ("float32", "bfloat16"):  # loaded anew: casting a model would round its rotary frequencies too
        model, processor = load(checkpoint, dtype)
        batch = next(prepare(processor, samples[:4], 4))
        for _ in range(2):  # the second time counts
            start = time.perf_counter()
            list(answer(model, processor, [batch], 1))
            seconds = time.perf_counter() - start
        tried.append((seconds, dtype, model, processor))
    return min(tried, key=lambda one: one[0])[2:]


def times(model: Any, processor: Any, sample: VQASample, chosen: Sequence[Variant], progress: Progress) -> Measured:
    """Time to first token, vision tower included, and time of a decode step, for one question, everything in turn."""
    inputs = {k: v.to(model.device) for k, v in next(prepare(processor, [sample], 1)).inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            return time_generate(model, inputs, TIMED_TOKENS)

    def patching(variant: Variant) -> Any:
        return lambda: vlmaccel.patched(model, make(variant.method, **variant.runs[0]))

    names = ["unpatched", *(variant.method for variant in chosen)]
    return measure_in_turn(
        dict.fromkeys(names, run),
        TURNS,
        contexts={variant.method: patching(variant) for variant in chosen},
        device=model.device,
        progress=lambda name, turn: progress.advance(1),
    )


@dataclass(frozen=True)
class Demo:
    """What the demo found: `report` is plain data, the rest is what the pictures are made with."""

    report: dict[str, Any]
    model: Any
    processor: Any
    samples: Sequence[VQASample]
    variants: Sequence[Variant]


def run(
    progress: Progress,
    questions: int = QUESTIONS,
    full: bool = False,
    seed: int = 0,
    checkpoint: Path = CHECKPOINTS["tiny-llava"],
) -> Demo:
    """The whole demo of one model.

    questions: how many about collages (to the next multiple of `PER_PICTURE`), with an eighth as many of easy-VQA.
    full: the whole test split instead. seed: of the collages. checkpoint: a model trained on these tasks whose
        pictures all have the same number of visual tokens.
    """
    if questions < 1:
        raise ValueError(f"the demo needs at least one question, not {questions}")
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"there is no checkpoint in {checkpoint}")
    data = dict(zip(TASKS, whole_split(seed) if full else subset(questions, seed), strict=True))
    total = sum(map(len, data.values()))
    model, processor = load_faster(str(checkpoint), data["collage"])
    progress.start(f"{checkpoint.name}: looking at the pictures", total)
    tasks = {name: encode(model, processor, samples, progress) for name, samples in data.items()}
    depth = model.config.get_text_config().num_hidden_layers
    visual = len(tasks["collage"].batches[0].inputs["mm_encoder_outputs"]["image"].pooler_output[0])
    chosen = variants(depth, visual)

    progress.start(f"{checkpoint.name}: answering", total * (1 + sum(len(variant.runs) for variant in chosen)))
    base = {name: ask(model, processor, task, progress) for name, task in tasks.items()}
    rows = []
    for variant in chosen:
        runs = []
        for options in variant.runs:
            with vlmaccel.patched(model, make(variant.method, **options)):
                runs.append({name: ask(model, processor, task, progress) for name, task in tasks.items()})
        rows.append(row(variant, runs, base))
    budgets = list(dict.fromkeys(variant.kept for variant in chosen))
    progress.start(f"{checkpoint.name}: timing", (TURNS + 1) * (len(chosen) + len(budgets)))
    clock = clock_for(model.device)
    for kept in budgets:
        same = [variant for variant in chosen if variant.kept == kept]
        measured = times(model, processor, data["collage"][0], same, progress)
        for entry in rows:
            if entry["kept"] == kept:
                for phase in ("prefill", "decode"):
                    spread = measured.speedup(entry["method"], "unpatched", phase, clock)
                    entry[f"{phase}_speedup"] = dataclasses.asdict(spread)
    report = {
        "machine": machine(model) | {"clock": clock, "vlmaccel": vlmaccel.__version__},
        "split": "the whole test split" if full else "a part of the test split",
        "questions": {name: len(samples) for name, samples in data.items()},
        "pictures": {name: len({s.image_id for s in samples}) for name, samples in data.items()},
        "settings": {
            "checkpoint": checkpoint.name,
            "seed": seed,
            "batch": BATCH,
            "max_new_tokens": MAX_NEW_TOKENS,
            "turns": TURNS,
            "layers": depth,
            "visual_tokens": visual,
        },
        "unpatched": scores(base) | full_cost(rows),
        "rows": rows,
    }
    return Demo(report, model, processor, data["collage"], chosen)


def row(variant: Variant, runs: Sequence[Mapping[str, VQAResult]], base: Mapping[str, VQAResult]) -> dict[str, Any]:
    """What is reported of a variant: means over its runs, and every run on its own."""
    each = [
        scores(results)
        | {"options": dict(options), "loyalty": results["collage"].loyalty(base["collage"].texts())}
        | results["collage"].cost()
        for options, results in zip(variant.runs, runs, strict=True)
    ]
    numbers = [name for name, value in each[0].items() if isinstance(value, (int, float))]
    mean: dict[str, Any] = {name: statistics.fmean(one[name] for one in each) for name in numbers}
    mean["kinds"] = {kind: statistics.fmean(one["kinds"][kind] for one in each) for kind in each[0]["kinds"]}
    mean["flops_ratio"] = mean["flops"] / mean["flops_full"]
    mean["core_stdev"] = statistics.stdev(one["core"] for one in each) if len(each) > 1 else 0.0
    return {"method": variant.method, "kept": variant.kept, **mean, "runs": each}


def scores(results: Mapping[str, VQAResult]) -> dict[str, Any]:
    """Accuracies, 0 to 1, of the results on both tasks."""
    collage, easy = results["collage"], results["easy-vqa"]
    core = [answer.accuracy for answer in collage.answers if answer.kind in CORE]
    kinds = {kind: score.accuracy for kind, score in collage.by_kind().items()}
    counts = {kind: score.questions for kind, score in collage.by_kind().items()}
    return {"core": statistics.fmean(core), "easy": easy.score.accuracy, "kinds": kinds, "counts": counts}


def full_cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Cost of the unpatched model, as the patched runs report it beside their own."""
    first = rows[0]
    return {
        "visual_tokens": first["nominal_visual_tokens"],
        "flops": first["flops_full"],
        "flops_ratio": 1.0,
        "kv_bytes": first["kv_bytes_full"],
    }
