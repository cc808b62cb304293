"""The table that `vlmaccel eval vqa` prints."""

from __future__ import annotations

from rich import box
from rich.table import Table

from vlmaccel.evals.vqa import Score, VQAResult


def table(result: VQAResult, loyalty: float | None = None) -> Table:
    """Accuracies by kind of question, what the prompts cost if the model is patched, and the loyalty if it is known."""
    settings, cost = result.settings, result.cost()
    caption = "" if loyalty is None else f"loyalty: {loyalty:.2%} of the answers are those of the other run\n"
    if cost:
        caption += (
            f"visual tokens: {cost['visual_tokens']:.1f} of {cost['nominal_visual_tokens']:.1f}, mean over the layers; "
            f"decoder prefill FLOPs: {cost['flops'] / cost['flops_full']:.1%}; "
            f"KV cache of a question: {cost['kv_bytes']:,.0f} of {cost['kv_bytes_full']:,.0f} bytes"
        )
    made = Table(
        title=f"{settings['model']}, {settings.get('method', '')}, {settings.get('data', '')}",
        caption=caption,
        box=box.SIMPLE_HEAD,
    )
    made.add_column("kind")
    for name in ("questions", "VQA accuracy", "exact match"):
        made.add_column(name, justify="right")
    kinds = result.by_kind()
    for kind, score in kinds.items() if len(kinds) > 1 else ():
        made.add_row(kind or "-", *cells(score))
    made.add_section()
    made.add_row("all", *cells(result.score))
    return made


def cells(score: Score) -> tuple[str, ...]:
    """Number of questions, VQA accuracy and exact match, both in percent."""
    return str(score.questions), f"{100 * score.accuracy:.2f}", f"{100 * score.exact_match:.2f}"
