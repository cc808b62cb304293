"""The table that `vlmaccel eval vqa --turns N` prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from vlmaccel.evals.multi_turn_eval import MultiTurnResult
from vlmaccel.evals.vqa_report import cells


def turn_table(result: MultiTurnResult, other: Mapping[str, str] | None = None) -> Table:
    """Accuracies by turn, and the KV cache after the last; other: another run's answers, for the loyalty to them."""
    settings, (held, full) = result.settings, result.kv_bytes()
    loyalty = result.loyalty(other) if other else {}
    caption = f"KV cache after the last turn: {held:,.0f} of {full:,.0f} bytes"
    if result.left_out:
        caption += f"\npictures left out, which have fewer than {settings['turns']} questions: {result.left_out}"
    made = Table(
        title=f"{settings['model']}, {settings.get('method', '')}, {settings.get('data', '')}, {settings['turn_mode']}",
        caption=caption,
        box=box.SIMPLE_HEAD,
    )
    made.add_column("turn")
    for name in ("questions", "VQA accuracy", "exact match", *(("loyalty",) if loyalty else ())):
        made.add_column(name, justify="right")
    for turn, one in result.by_turn().items():
        made.add_row(str(turn), *cells(one.score), *([f"{100 * loyalty[turn]:.2f}"] if loyalty else []))
    return made
