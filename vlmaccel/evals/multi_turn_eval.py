"""`vlmaccel eval vqa --turns N`: scores of the answers by turn, and the file that they go to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmaccel.evals.answer_file import VQA, AnswerFile, read_answers
from vlmaccel.evals.multi_turn import SHARED_PREFIX, Conversations, TurnAnswer, converse
from vlmaccel.evals.samples import VQASample
from vlmaccel.evals.vqa import VQAResult, marked

SAME = ("data", "turns", "turn_mode", "seed")  # settings without which two runs do not ask the same in a turn


@dataclass(frozen=True)
class MultiTurnResult:
    """All answers, conversation by conversation, the settings, and how many pictures had too few questions."""

    answers: tuple[TurnAnswer, ...]
    settings: Mapping[str, Any]
    left_out: int

    def by_turn(self) -> dict[int, VQAResult]:
        """The answers of every turn, from 1, as a result of their own: its scores, kinds and loyalty."""
        turns: dict[int, list[TurnAnswer]] = {}
        for answer in self.answers:
            turns.setdefault(answer.turn, []).append(answer)
        return {turn: VQAResult(tuple(turns[turn]), self.settings) for turn in sorted(turns)}

    def kv_bytes(self) -> tuple[float, float]:
        """Mean bytes of the KV cache after the last turn, and of an unpatched cache of the same tokens."""
        turns = max(answer.turn for answer in self.answers)
        last = [answer for answer in self.answers if answer.turn == turns]
        return statistics.fmean(a.kv_bytes for a in last), statistics.fmean(a.kv_bytes_full for a in last)

    def loyalty(self, other: Mapping[str, str]) -> dict[int, float]:
        """By turn, the share of the questions answered as in `other` (answers by their ids), right or wrong."""
        return {turn: result.loyalty(other) for turn, result in self.by_turn().items()}

    def summary(self) -> dict[str, Any]:
        """Settings, scores by turn and bytes as plain data."""
        held, full = self.kv_bytes()
        turns = {str(turn): result.score._asdict() for turn, result in self.by_turn().items()}
        rest = {"left_out": self.left_out, "kv_bytes": held, "kv_bytes_full": full}
        return {"settings": dict(self.settings), "turns": turns, **rest}


def evaluate_turns(
    model: Any,
    processor: Any,
    talks: Conversations,
    max_new_tokens: int = 16,
    mode: str = SHARED_PREFIX,
    out: Path | None = None,
    instruction: str = "",
    settings: Mapping[str, Any] | None = None,
    tick: Callable[[int], object] | None = None,
) -> MultiTurnResult:
    """Hold every conversation, one at a time, and score the answers.

    mode: see `converse`. The other arguments: as in `vlmaccel.evals.vqa.evaluate`; conversations that are in the file
    as a whole are not held again.
    """
    samples = [sample for questions in talks.questions for sample in questions]
    if len({sample.id for sample in samples}) < len(samples):
        raise ValueError("several questions have the same id")
    made_with = {
        "model": getattr(model.config, "name_or_path", ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "instruction": instruction,
        "turns": len(talks.questions[0]),
        "turn_mode": mode,
        **(settings or {}),
    }
    report = tick or (lambda count: None)
    answers: list[TurnAnswer] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(AnswerFile(out, made_with)) if out else None
        done = _finished(file.rows, samples) if file else {}
        for questions in talks.questions:
            found = [done[sample.id] for sample in questions if sample.id in done]
            if [answer.turn for answer in found] != list(range(1, len(questions) + 1)):
                found = list(converse(model, processor, questions, max_new_tokens, mode, instruction))
                if file:
                    file.write(dataclasses.asdict(answer) for answer in found)
            answers += found
            report(len(found))
    return MultiTurnResult(tuple(answers), made_with, talks.left_out)


def _finished(rows: Iterable[Mapping[str, Any]], samples: Iterable[VQASample]) -> dict[str, TurnAnswer]:
    """Answers from a file to those questions that are asked; their marks are worked out anew."""
    by_id = {sample.id: sample for sample in samples}
    done = {}
    for row in rows:
        sample = by_id.get(row["id"])
        if sample is not None:
            if row["question"] != sample.question:
                raise ValueError(f"the file has an answer to another question {sample.id}: {row['question']!r}")
            known = {name: row[name] for name in ("turn", "kv_bytes", "kv_bytes_full")}
            done[sample.id] = TurnAnswer(**vars(marked(sample, row["answer"], {})), **known)
    return done


def read_turn_answers(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The answers in another run's file, by their ids; settings: those of `SAME`, of this run.

    Raises ValueError if the other run did not ask the same questions in the same turns.
    """
    answers = read_answers(path)
    with path.open(encoding="utf-8") as file:
        theirs = json.loads(file.readline())[VQA]
    for name in SAME:
        if theirs.get(name) != settings[name]:
            raise ValueError(
                f"{path} was made with {name} {theirs.get(name)!r} instead of {settings[name]!r}: "
                "only runs that ask the same in every turn can be compared"
            )
    return answers
