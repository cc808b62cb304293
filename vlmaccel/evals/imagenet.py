"""Accuracy and speed of image classifiers, patched against unpatched, batch by batch in turn.

Every way of a sweep sees the same batches, so that ratios of images per second are taken within seconds of each other.
What was said of each picture goes to a file as it comes, so that an interrupted run can go on where it stopped. Started
by `accelerate launch`, the processes share the batches, which are the same whatever their number.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import vlmaccel
from vlmaccel.evals.answer_file import AnswerFile
from vlmaccel.evals.classifiers import Classifier
from vlmaccel.evals.image_data import ImageData
from vlmaccel.evals.imagenet_result import UNPATCHED, Cost, Guess, ImageNetResult, Turn
from vlmaccel.evals.timing import Timing
from vlmaccel.hooks import Method
from vlmaccel.methods import ToMe, make

COMMAND = "vlmaccel eval imagenet"
TOP = 5
SWEEP = (4, 8, 12, 16)  # r of ToMe, unless something is said
BUDGETS = ("r", "keep", "speedup")  # of ToMe


@dataclass(frozen=True)
class Way:
    """A way to run the model. curve: the line that it is a point of. method: None is the model as it is."""

    name: str
    curve: str
    method: Method | None


def sweep(method: str = ToMe.name, r: Sequence[int] = (), options: Mapping[str, Any] | None = None) -> list[Way]:
    """The model as it is, the method with each r, and for ToMe random merges of as many tokens, the baseline.

    r: `SWEEP` if it is empty, for ToMe without an option that says how much is merged.
    """
    options = dict(options or {})
    tome = method == ToMe.name
    if r and "r" in options:
        raise ValueError("r is given twice, by itself and as an option")
    if not r and tome and not any(name in options for name in BUDGETS):
        r = SWEEP
    points = [{**options, "r": value} for value in dict.fromkeys(r)] or [options]
    ways = [Way(UNPATCHED, UNPATCHED, None)]
    ways += [Way(_label(method, point), method, make(method, **point)) for point in points]
    if tome and "match" not in options:
        ways += [Way(_label("random", point), "random", make(method, **point, match="random")) for point in points]
    return ways


def _label(name: str, options: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in options.items())])


def processes(device: torch.device | str | None = None) -> tuple[PartialState, torch.device]:
    """The processes that `accelerate launch` started, or this one alone, and the device of this one.

    device: default: the GPU if there is one. Several processes take a GPU each, or share the CPU.
    """
    wanted = None if device is None else torch.device(device)
    # accelerate's launcher says --cpu by this variable, which only its larger Accelerator reads by itself
    cpu = (wanted is not None and wanted.type == "cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu or not torch.accelerator.is_available())
    if state.num_processes == 1:
        return state, wanted or torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    if wanted is not None and wanted.type != state.device.type:
        raise ValueError(f"{state.num_processes} processes were started on {state.device.type}, not on {device}")
    return state, state.device


def finish(state: PartialState) -> None:
    """Call this in every process when all is written: one that just exits may abort in its still open connections, upon
    which the launcher ends the others in the middle of their work."""
    state.wait_for_everyone()
    state.destroy_process_group()


@torch.inference_mode()
def evaluate(
    classifier: Classifier,
    data: ImageData,
    ways: Sequence[Way],
    batch_size: int = 32,
    out: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    workers: int = 0,
    tick: Callable[[int], object] | None = None,
) -> ImageNetResult | None:
    """Classify every picture in every way.

    ways: of `sweep`; the first one is the unpatched model. batch_size: pictures of a batch, in each process.
    out: file that gets one JSON line for every finished picture, after a line with the settings. If it exists, the
        pictures in it are not classified again, and nothing is timed for them; a file that was made with other settings
        is refused. settings: what else the answers depend on.
    workers: processes that read and prepare pictures, 0: this one.
    tick: called with the number of newly finished pictures, for a progress bar.
    Returns the result in the main process, None in the others.
    """
    state, _ = processes(classifier.device)
    costs = probe(classifier, data, ways)
    made_with = {
        "model": classifier.name,
        "dtype": str(classifier.dtype).removeprefix("torch."),
        "data": data.name,
        **{way.name: repr(way.method) for way in ways},
        **(settings or {}),
    }
    report = tick or (lambda count: None)
    turns: list[Turn] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(AnswerFile(out, made_with, COMMAND)) if out and state.is_main_process else None
        done = _finished(file.rows, data) if file else {}
        report(len(done))
        (known,) = broadcast_object_list([frozenset(done)])
        for gathered in _in_turn(classifier, data, ways, _batches(data, batch_size, known), state, workers):
            new = [guess for guesses, _ in gathered for guess in guesses if guess.id not in done]
            turns += [turn for _, turn in gathered if turn and turn.pictures == batch_size]
            if file:
                file.write(dataclasses.asdict(guess) for guess in new)
            done |= {guess.id: guess for guess in new}
            report(len(new))
    if not state.is_main_process:
        return None
    guesses = tuple(done[name] for name in data.ids)
    curves = {way.name: way.curve for way in ways}
    return ImageNetResult(guesses, curves, costs, tuple(turns), classifier.device, state.num_processes, made_with)


def probe(classifier: Classifier, data: ImageData, ways: Iterable[Way]) -> dict[str, Cost]:
    """What each way costs, by the first picture: found even where nothing is left to classify, and errors come early."""
    pixels = classifier.transform(data.picture(0))[None].to(classifier.device, classifier.dtype)
    costs = {}
    for way in ways:
        with _patched(classifier, way):
            classifier.logits(pixels)
            if way.method is not None:
                stats = vlmaccel.stats(classifier.model)
                if not isinstance(stats, vlmaccel.TowerStats):
                    raise NotImplementedError(f"{classifier.name} is more than a vision tower: it is no classifier")
                costs[way.name] = Cost(tuple(stats.tokens), stats.flops_ratio)
    return costs


def _batches(data: ImageData, size: int, done: frozenset[str]) -> list[list[int]]:
    """Numbers of the pictures of each batch that is not finished.

    A batch is always made of the same pictures, also of some that are finished: rounding depends on a batch's size, and
    neither an interruption nor the number of processes is to change a result.
    """
    batches = [list(range(start, min(start + size, len(data)))) for start in range(0, len(data), size)]
    return [batch for batch in batches if not done.issuperset(data.ids[i] for i in batch)]


class _Pictures(Dataset[Tensor]):
    def __init__(self, data: ImageData, transform: Callable[..., Tensor]) -> None:
        self.data, self.transform = data, transform

    def __getitem__(self, number: int) -> Tensor:
        return self.transform(self.data.picture(number))


def _read(pictures: _Pictures, batches: Sequence[list[int]], workers: int) -> Iterator[Tensor]:
    """Pixels (B, 3, H, W) of each batch."""
    try:
        yield from DataLoader(pictures, batch_sampler=batches, num_workers=workers)
    except ValueError as error:  # one that comes from a worker has the whole traceback for its text
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _in_turn(
    classifier: Classifier,
    data: ImageData,
    ways: Sequence[Way],
    batches: Sequence[list[int]],
    state: PartialState,
    workers: int,
) -> Iterator[list[tuple[list[Guess], Turn | None]]]:
    """What all processes found, a batch of each at a time; the first one is for warming up and is not timed."""
    mine = batches[state.process_index :: state.num_processes]
    pictures = _read(_Pictures(data, classifier.transform), mine, workers)
    for step in range(ceil(len(batches) / state.num_processes)):
        found: tuple[list[Guess], Turn | None] = [], None
        if step < len(mine):  # a process that has run out of batches still takes part in gathering
            pixels = next(pictures).to(classifier.device, classifier.dtype)
            first = step % len(ways)  # what comes first in a turn may find the caches cold
            top, turn = _classify(classifier, pixels, [*ways[first:], *ways[:first]])
            guesses = [
                Guess(data.ids[number], data.targets[number], {way.name: top[way.name][i] for way in ways})
                for i, number in enumerate(mine[step])
            ]
            found = guesses, turn if step else None
        yield gather_object([found])


def _classify(classifier: Classifier, pixels: Tensor, ways: Iterable[Way]) -> tuple[dict[str, list[list[int]]], Turn]:
    """The best classes of each picture by each way, and how long each took without being patched and unpatched."""
    top, seconds = {}, {}
    for way in ways:
        with _patched(classifier, way):
            start = Timing.now(classifier.device)
            logits = classifier.logits(pixels)
            seconds[way.name] = Timing.now(classifier.device) - start
        top[way.name] = logits.float().topk(min(TOP, classifier.classes)).indices.tolist()
    return top, Turn(len(pixels), seconds)


def _patched(classifier: Classifier, way: Way) -> contextlib.AbstractContextManager[Any]:
    if way.method is None:
        return contextlib.nullcontext()
    return vlmaccel.patched(classifier.model, way.method)


def _finished(rows: Iterable[Mapping[str, Any]], data: ImageData) -> dict[str, Guess]:
    """Guesses from a file at those pictures that are in the data."""
    targets = dict(zip(data.ids, data.targets, strict=True))
    done = {}
    for row in rows:
        if row["id"] in targets:
            if row["label"] != targets[row["id"]]:
                raise ValueError(f"the file has another label of {row['id']}: {row['label']}")
            done[row["id"]] = Guess(row["id"], row["label"], row["top"])
    return done
