"""`vlmaccel eval`: answers, accuracy, loyalty."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmaccel.cli.common import (
    Method,
    Options,
    numbers,
    parse_method,
    parse_options,
    progress_bar,
    save,
    show,
    user_errors,
)

evals = typer.Typer(help="Measure answers.", no_args_is_help=True)


@evals.command()
def vqa(
    model: Annotated[str, typer.Option(help="Local directory or hub id.")],
    data: Annotated[str, typer.Option(help="easy-vqa, collage, or a JSONL file of image, question, answers.")],
    method: Method = None,
    option: Options = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Without --turns, which takes one conversation at a time.")
    ] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    instruction: Annotated[str, typer.Option(help="Put behind every question.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    device_map: Annotated[str | None, typer.Option(help="For accelerate, instead of --device.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the answers; go on from it if it exists.")] = None,
    loyal_to: Annotated[Path | None, typer.Option(help="File of another run's answers to compare with.")] = None,
    turns: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Accuracy by turn: so many questions about each picture over one KV cache, and in so many orders.",
        ),
    ] = None,
    turn_mode: Annotated[
        str,
        typer.Option(
            help="shared-prefix: every question follows the picture alone, as when a server shares the picture's cache; "
            "conversation: it follows the earlier questions and answers too, which tiny-llava never learnt."
        ),
    ] = "shared-prefix",
    seed: Annotated[int, typer.Option(help="Of which questions --turns asks, and in which order.")] = 0,
) -> None:
    """Ask a model all questions of a data set: VQA accuracy and exact match."""
    with user_errors():
        import vlmaccel
        from vlmaccel.evals.answer_file import read_answers
        from vlmaccel.evals.multi_turn import conversations
        from vlmaccel.evals.multi_turn_eval import evaluate_turns, read_turn_answers
        from vlmaccel.evals.multi_turn_report import turn_table
        from vlmaccel.evals.vqa import evaluate, load
        from vlmaccel.evals.vqa_data import read_samples
        from vlmaccel.evals.vqa_report import table
        from vlmaccel.methods import make

        chosen = make(method, **parse_options(option)) if method else None
        if option and not method:
            raise ValueError("--option goes with --method")
        settings: dict[str, Any] = {"model": model, "method": repr(chosen) if chosen else "none", "data": data}
        if turns:
            settings |= {"turns": turns, "turn_mode": turn_mode, "seed": seed}
            others = read_turn_answers(loyal_to, settings) if loyal_to else None
            talks = conversations(read_samples(data), turns, seed, limit)
        else:
            others = read_answers(loyal_to) if loyal_to else None
            samples = read_samples(data)[:limit]
        loaded, processor = load(model, dtype, device, device_map)
        if chosen:
            vlmaccel.patch(loaded, chosen)
        with progress_bar() as progress:
            if turns:
                progress.start("answering", turns * len(talks.questions))
                by_turn = evaluate_turns(
                    loaded,
                    processor,
                    talks,
                    max_new_tokens,
                    turn_mode,
                    out,
                    instruction,
                    settings,
                    progress.advance,
                )
                show(turn_table(by_turn, others))
                return
            progress.start("answering", len(samples))
            result = evaluate(
                loaded,
                processor,
                samples,
                batch_size,
                max_new_tokens,
                out,
                instruction,
                settings,
                progress.advance,
            )
        show(table(result, result.loyalty(others) if others else None))


@evals.command("cache")
def eval_cache(
    model: Annotated[
        str, typer.Option(help="Local directory; tiny-llava or tiny-qwen2-vl: a shipped model.")
    ] = "tiny-llava",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="NAME or NAME:key=value,... of a method with a budget; several times."),
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Several times; default 0.01 to 0.5.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="About collages.")] = 500,
    dtype: Annotated[str, typer.Option()] = "float32",
    seed: Annotated[int, typer.Option(help="Of the collages.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Methods on the KV cache at several budgets: accuracy, loyalty, bytes."""
    with user_errors():
        from vlmaccel.evals import cache_sweep

        methods = [parse_method(text) for text in method or ()] or cache_sweep.default_methods()
        chosen = cache_sweep.candidates(methods, budget or cache_sweep.BUDGETS)
        _sweep(model, lambda depth, visual: chosen, "KV cache", "kv", questions, dtype, seed, out)


@evals.command()
def tokens(
    model: Annotated[
        str, typer.Option(help="Local directory; tiny-llava or tiny-qwen2-vl: a shipped model.")
    ] = "tiny-llava",
    share: Annotated[list[float] | None, typer.Option(help="Of the tokens; default 0.5, 0.25 and 0.11.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="About collages.")] = 250,
    dtype: Annotated[str, typer.Option()] = "float32",
    seed: Annotated[int, typer.Option(help="Of the collages.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Methods that drop or merge visual tokens, with and without calibration, at shares of the tokens."""
    with user_errors():
        from vlmaccel.evals import token_sweep

        def chosen(depth: int, visual: int) -> Any:
            return token_sweep.candidates(depth, visual, share or token_sweep.KEPT)

        _sweep(model, chosen, "visual tokens", "visual", questions, dtype, seed, out)


@evals.command()
def text(
    model: Annotated[
        str, typer.Option(help="Local directory or hub id; smollm2: see python -m vlmaccel.evals.smollm2.")
    ] = "smollm2",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="NAME or NAME:key=value,... of `vlmaccel methods`; several times."),
    ] = None,
    source: Annotated[str, typer.Option("--text", help="pydoc (Python's help topics) or a text file.")] = "pydoc",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window whose perplexity is measured.")] = 1024,
    windows: Annotated[int, typer.Option(min=0, help="So many windows; 0: no perplexity.")] = 8,
    prefill: Annotated[
        float,
        typer.Option(
            min=0, help="Share of a window that is read as a prompt, the rest is scored; 0: plain perplexity."
        ),
    ] = 0.5,
    step: Annotated[int, typer.Option(min=1, help="Tokens scored at a time; more than 1 is read like a prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 8,
    length: Annotated[
        list[int] | None,
        typer.Option("--length", min=1, help="Of a needle's prompt; several times. Default 1024, 2048."),
    ] = None,
    needles: Annotated[int, typer.Option(min=0, help="At each length, evenly spread from start to end.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the needles.")] = 0,
    turns: Annotated[int, typer.Option(min=0, help="Of the decode rate's measurement; 0: none.")] = 3,
    timed_prompt: Annotated[int, typer.Option(min=1, help="Tokens before those that are timed.")] = 1024,
    timed_tokens: Annotated[int, typer.Option(min=2)] = 33,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """A text LLM on real text, unpatched and with each method: perplexity, a needle in a haystack, decode rate."""
    with user_errors():
        from vlmaccel.evals import text_report
        from vlmaccel.evals.text import load, text_source
        from vlmaccel.evals.text_eval import evaluate
        from vlmaccel.evals.text_result import TextSettings

        settings = TextSettings(
            context=context,
            windows=windows,
            prefill=prefill,
            step=step,
            batch_size=batch_size,
            lengths=tuple(length or TextSettings.lengths),
            needles=needles,
            seed=seed,
            turns=turns,
            timed_prompt=timed_prompt,
            timed_tokens=timed_tokens,
        )
        ways = {name: parse_method(name) for name in method or ()}
        words = text_source(source)
        loaded, tokenizer = load(model, dtype, device)
        with progress_bar() as progress:
            result = evaluate(loaded, tokenizer, words, ways, settings, progress, {"model": model, "text": source})
        show(text_report.table(result), *text_report.notes(result))
        if out:
            show(f"\nwrote {text_report.write(result, out)}")


@evals.command()
def imagenet(
    model: Annotated[
        str,
        typer.Option(help="tiny-vit, timm:NAME, open_clip:NAME@WEIGHTS, a directory or hub id for transformers."),
    ] = "tiny-vit",
    data: Annotated[str, typer.Option(help="easy-vqa, a folder a class, or what datasets saved.")] = "easy-vqa",
    method: Annotated[str, typer.Option(help="One of `vlmaccel methods`.")] = "tome",
    r: Annotated[
        list[str] | None, typer.Option("--r", help="One or several, e.g. 4,8,12,16, which is tome's default.")
    ] = None,
    option: Options = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many pictures, evenly spread.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of each process.")] = 32,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, JSON and plot; go on if it has results.")
    ] = None,
) -> None:
    """Classify pictures: accuracy and images per second, patched against unpatched.

    With `accelerate launch -m vlmaccel.cli eval imagenet ...`, all processes or GPUs share the work.
    """
    with user_errors():
        from vlmaccel.evals import imagenet_report
        from vlmaccel.evals.classifiers import load_classifier
        from vlmaccel.evals.image_data import need, read_data
        from vlmaccel.evals.imagenet import evaluate, finish, processes, sweep

        ways = sweep(method, numbers(r), parse_options(option))
        if out:
            need("matplotlib", "demo")  # before the work, not after it
            out.mkdir(parents=True, exist_ok=True)
        state, place = processes(device)
        pictures = read_data(data).spread(limit)
        classifier = load_classifier(model, pictures.classes, dtype, place)
        file = out / "results.jsonl" if out else None
        with progress_bar(state.is_main_process) as progress:
            progress.start("classifying", len(pictures))
            result = evaluate(classifier, pictures, ways, batch_size, file, workers=workers, tick=progress.advance)
        if result:
            show(imagenet_report.table(result), *imagenet_report.notes(result))
            if out:
                show(f"\nwrote {', '.join(map(str, imagenet_report.write(result, out)))}")
        finish(state)


def _sweep(
    model: str, choose: Any, title: str, cost: Any, questions: int, dtype: str, seed: int, out: Path | None
) -> None:
    """Run a sweep of methods, show it and write it."""
    from vlmaccel.evals import sweep
    from vlmaccel.evals.demo import CHECKPOINTS

    with progress_bar() as progress:
        result = sweep.run_sweep(progress, str(CHECKPOINTS.get(model, model)), choose, questions, dtype, seed)
    show(sweep.render(result, title, cost))
    save(result.facts(), out)
