"""`vlmaccel train`: registers, and models that bear a method."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmaccel.cli.common import parse_method, progress_bar, show, user_errors

trains = typer.Typer(help="Train registers, or a model to bear a method.", no_args_is_help=True)
TrainModel = Annotated[str, typer.Option("--model", help="Local directory or hub id; tiny-llava: the shipped model.")]
TrainData = Annotated[str, typer.Option("--data", help="collage, or a JSONL file of image, question, answers.")]
Validation = Annotated[
    str | None,
    typer.Option(help="Measured on as it trains, as --data of eval vqa; default for collage: test collages."),
]
ValidationLimit = Annotated[int, typer.Option(min=1, help="Questions of it.")]
TrainOut = Annotated[
    Path, typer.Option("--out", help="Folder for result, state, log and curves; goes on from a state there.")
]
Steps = Annotated[int, typer.Option(min=1)]
Pictures = Annotated[int, typer.Option(min=1, help="Of a step.")]
Questions = Annotated[int, typer.Option(min=1, help="About each picture, at most.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Answers = Annotated[float, typer.Option(help="Weight of the cross entropy of the right answers.")]
Forward = Annotated[float, typer.Option(help="Weight of KL(unpatched || patched).")]
Reverse = Annotated[float, typer.Option(help="Weight of KL(patched || unpatched).")]
Temperature = Annotated[float, typer.Option(help="Of both.")]
Weights = Annotated[str, typer.Option(help="Which tokens they are about: answer, uniform or saliency.")]
Every = Annotated[int, typer.Option(min=1, help="Steps between two evaluations, at which the state is saved.")]
TrainSeed = Annotated[int, typer.Option("--seed", help="Of the batches.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")]


@trains.command("registers")
def train_registers(
    out: TrainOut,
    model: TrainModel = "tiny-llava",
    data: TrainData = "collage",
    registers: Annotated[int, typer.Option(min=1, help="Of every picture.")] = 8,
    layer: Annotated[
        int | None, typer.Option(min=1, help="First decoder layer without the pictures' tokens; default 3 of 32.")
    ] = None,
    train: Annotated[
        str, typer.Option(help="registers: nothing else; lora; or all: the whole language model.")
    ] = "registers",
    validation: Validation = None,
    limit: ValidationLimit = 300,
    steps: Steps = 600,
    pictures: Pictures = 4,
    questions: Questions = 16,
    rate: Rate = 1e-3,
    answers: Answers = 1.0,
    forward: Annotated[
        float | None, typer.Option(help="Weight of KL(unpatched || patched); default 1, with --train all 0.")
    ] = None,
    reverse: Reverse = 0.0,
    temperature: Temperature = 1.0,
    weights: Weights = "answer",
    every: Every = 100,
    seed: TrainSeed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Victor's registers: a model learns to answer from a few registers in place of a picture's tokens."""
    with user_errors():
        from vlmaccel.training import registers as work
        from vlmaccel.training.distillation import Distillation
        from vlmaccel.training.fitting import Schedule

        kinds: Any = weights
        forward = float(train != "all") if forward is None else forward
        learn = Distillation(forward, reverse, temperature, kinds, kinds)
        schedule = Schedule(
            steps, pictures, questions, rate, answers=answers, distillation=learn, every=every, seed=seed
        )
        options: dict[str, Any] = {"registers": registers, "layer": layer, "train": train}
        _train(partial(work.train_registers, **options), model, data, validation, limit, out, schedule, dtype, device)


@trains.command("distill")
def train_distill(
    out: TrainOut,
    method: Annotated[list[str], typer.Option("--method", help="NAME or NAME:key=value,...; several times.")],
    model: TrainModel = "tiny-llava",
    data: TrainData = "collage",
    train: Annotated[str, typer.Option(help="lora, or all: the whole language model.")] = "lora",
    validation: Validation = None,
    limit: ValidationLimit = 300,
    steps: Steps = 400,
    pictures: Pictures = 4,
    questions: Questions = 16,
    rate: Rate = 1e-4,
    answers: Answers = 0.0,
    forward: Forward = 1.0,
    reverse: Reverse = 0.0,
    temperature: Temperature = 1.0,
    weights: Weights = "answer",
    every: Every = 100,
    seed: TrainSeed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """A model learns to answer under a method as it does without it."""
    with user_errors():
        from vlmaccel.training import registers as work
        from vlmaccel.training.distillation import Distillation
        from vlmaccel.training.fitting import Schedule

        kinds: Any = weights
        learn = Distillation(forward, reverse, temperature, kinds, kinds)
        schedule = Schedule(
            steps, pictures, questions, rate, answers=answers, distillation=learn, every=every, seed=seed
        )
        options: dict[str, Any] = {"methods": [parse_method(text) for text in method], "train": train}
        _train(partial(work.train_patched, **options), model, data, validation, limit, out, schedule, dtype, device)


def _train(
    run: Any,
    model: str,
    data: str,
    validation: str | None,
    limit: int,
    out: Path,
    schedule: Any,
    dtype: str,
    device: str | None,
) -> None:
    """Load, train, and say how it went."""
    from vlmaccel.evals.demo import CHECKPOINTS
    from vlmaccel.evals.vqa import load
    from vlmaccel.evals.vqa_data import read_samples
    from vlmaccel.training import training_report
    from vlmaccel.training.fitting import unpatched_accuracy
    from vlmaccel.training.questions import dialogues, source

    if validation is None and data != "collage":
        raise ValueError("--validation: name questions that are not trained on, to measure how it goes")
    draw, measured = source(data), dialogues(read_samples(validation or "collage")[:limit])
    loaded, processor = load(str(CHECKPOINTS.get(model, model)), dtype, device)
    with progress_bar() as progress:
        progress.start("measuring the unpatched model", 0)
        level = unpatched_accuracy(loaded, processor, measured)
        progress.start("training", schedule.steps)
        log = run(loaded, processor, draw, measured, out, schedule=schedule, tick=progress.advance)
    paths = training_report.write(log, level, out)
    show(training_report.table(log, level), f"wrote {', '.join(map(str, paths))}")
