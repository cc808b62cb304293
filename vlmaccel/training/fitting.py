"""The loop that trains a patched model on questions, measures it as it goes, and goes on exactly where it was interrupted."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlmaccel
from vlmaccel.adapters.pictures import encode_pictures
from vlmaccel.hooks import Method
from vlmaccel.training.distillation import Distillation
from vlmaccel.training.questions import Dialogue, Packed, Packer, Source, right

CHECKPOINT = "checkpoint.pt"
Log = list[dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """How to train.

    steps: optimiser steps. pictures: of a step. questions: about each picture, at most. rate: peak learning rate of AdamW (betas 0.9
    and 0.98, no weight decay, gradients clipped at norm 1), which warms up over `warm_up` steps and falls along a cosine. answers:
    weight of the cross entropy of the right answers. distillation: what is added to it. every: steps between two evaluations, at
    which the state is saved too. seed: of the batches, which depend on it and the number of their step alone.
    Raises ValueError for a value that is not allowed.
    """

    steps: int = 600
    pictures: int = 4
    questions: int = 16
    rate: float = 1e-3
    warm_up: int = 30
    answers: float = 1.0
    distillation: Distillation = field(default_factory=Distillation)
    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "pictures", "questions", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number, 1 or more, not {value!r}")
        if not self.rate > 0:
            raise ValueError(f"rate is a learning rate, more than 0, not {self.rate!r}")
        if not self.answers >= 0:
            raise ValueError(f"answers weighs the cross entropy, a number, 0 or more, not {self.answers!r}")
        if self.answers == 0 and not self.distillation.wanted:
            raise ValueError("nothing to learn from: answers and both terms of the distillation have weight 0")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        return self.rate * min(1, (step + 1) / self.warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, eq=False)
class Trainee:
    """A model, and what of it is trained.

    model: unpatched. methods: it is trained as patched with these; unpatched it is the teacher. parameters: what is trained, by name.
    teacher: a context in which the unpatched model is the teacher; by default it is that anyway.
    """

    model: Any
    methods: Sequence[Method]
    parameters: Mapping[str, nn.Parameter]
    teacher: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def fit(
    trainee: Trainee,
    draw: Source,
    packer: Packer,
    validation: Sequence[Dialogue],
    schedule: Schedule,
    folder: Path,
    facts: Mapping[str, Any],
    tick: Callable[[int], object] = lambda count: None,
) -> Log:
    """Train, and return what was measured: at every evaluation `step`, `loss` (mean since the last one) and `accuracy` on the
    `validation` dialogues, 0 to 1; the first, at step 0, is before any training and has no loss.

    folder: gets the state at each evaluation. If it has one, training goes on from there, and ends as if it had not been interrupted;
    ValueError if that was made with another schedule or other `facts`. tick: is called with the number of steps done.
    """
    made_with = {**asdict(schedule), **facts}
    with training(trainee) as optimizer, torch.random.fork_rng():
        start, losses = 0, []
        if (folder / CHECKPOINT).exists():
            start, log = restore(folder / CHECKPOINT, trainee, optimizer, made_with)
        else:
            log = [{"step": 0, "accuracy": accuracy(trainee, packer, validation)}]
        tick(start)
        for step in range(start, schedule.steps):
            torch.manual_seed(1_000_003 * schedule.seed + step)  # of dropout
            batch = packer(draw(random.Random(f"{schedule.seed}/{step}"), schedule.pictures, schedule.questions))
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step)
            loss = batch_loss(trainee, batch, schedule)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainee.parameters.values(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
                measured = accuracy(trainee, packer, validation)
                log.append({"step": step + 1, "loss": sum(losses) / len(losses), "accuracy": measured})
                save(folder / CHECKPOINT, trainee, optimizer, step + 1, log, made_with)
                losses.clear()
            tick(1)
    return log


@contextlib.contextmanager
def training(trainee: Trainee) -> Iterator[torch.optim.Optimizer]:
    """The optimiser of the parameters, the only ones that have a gradient meanwhile; the model is in training mode."""
    model, mode = trainee.model, trainee.model.training
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = set(trainee.parameters.values())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in wanted)
    try:
        model.train()
        yield torch.optim.AdamW(trainee.parameters.values(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    finally:
        model.train(mode)
        for parameter, needs in before.items():
            parameter.requires_grad_(needs)


def batch_loss(trainee: Trainee, batch: Packed, schedule: Schedule) -> Tensor:
    """Loss of the patched model; pictures are encoded once for it and its teacher, and get no gradient."""
    model = trainee.model
    base = getattr(model, "model", model)
    with torch.no_grad():
        inputs = encode_pictures(base, batch.inputs)
        teacher = None
        if schedule.distillation.wanted:
            model.eval()
            with trainee.teacher():
                teacher = model(**inputs, use_cache=False).logits
            model.train()
    with vlmaccel.patched(model, list(trainee.methods)):
        out = model(**inputs, labels=batch.labels, use_cache=False)
    loss = schedule.answers * out.loss
    if teacher is not None:
        loss = loss + schedule.distillation.loss(out.logits, teacher, batch.labels, batch.question)
    return loss


@torch.no_grad()
def accuracy(trainee: Trainee, packer: Packer, validation: Sequence[Dialogue], pictures: int = 8) -> float:
    """Share of the questions that the patched model answers right from end to end."""
    mode, found = trainee.model.training, []
    trainee.model.eval()
    with vlmaccel.patched(trainee.model, list(trainee.methods)) if trainee.methods else contextlib.nullcontext():
        for start in range(0, len(validation), pictures):
            batch = packer(validation[start : start + pictures])
            found += right(trainee.model(**batch.inputs, use_cache=False).logits, batch)
    trainee.model.train(mode)
    return sum(found) / len(found)


def unpatched_accuracy(model: Any, processor: Any, validation: Sequence[Dialogue]) -> float:
    """The same for the model as it is."""
    return accuracy(Trainee(model, (), {}), Packer(model, processor), validation)


def save(
    path: Path,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    step: int,
    log: Log,
    made_with: Mapping[str, Any],
) -> None:
    """Write the state; an interruption leaves the one before."""
    state = {
        "made_with": dict(made_with),
        "step": step,
        "log": log,
        "parameters": {name: parameter.detach() for name, parameter in trainee.parameters.items()},
        "optimizer": optimizer.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


def restore(
    path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, made_with: Mapping[str, Any]
) -> tuple[int, Log]:
    """Take up the state that `save` wrote: the step to go on with, and the log so far."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    differs = [name for name in made_with if state["made_with"].get(name) != made_with[name]]
    if differs:
        was = ", ".join(f"{name}={state['made_with'].get(name)!r}" for name in differs)
        raise ValueError(f"{path} is of a training with {was}; go on with these, or name another folder")
    with torch.no_grad():
        for name, parameter in trainee.parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["log"]
