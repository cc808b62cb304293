"""The command `vlmaccel`."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

# torch and transformers are imported where they are needed: --help comes at once
app = typer.Typer(help="Faster and smaller vision-language models.", no_args_is_help=True, add_completion=False)
evals = typer.Typer(help="Measure answers.", no_args_is_help=True)
app.add_typer(evals, name="eval")
benches = typer.Typer(invoke_without_command=True)
app.add_typer(benches, name="bench")
trains = typer.Typer(help="Train registers, or a model to bear a method.", no_args_is_help=True)
app.add_typer(trains, name="train")

Method = Annotated[str | None, typer.Option(help="One of `vlmaccel methods`; none: the model as it is.")]
Options = Annotated[list[str] | None, typer.Option("--option", help="Hyper-parameter of the method, e.g. ratio=0.25.")]


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="Collage questions, about; an eighth as many of easy-VQA.")] = 120,
    full: Annotated[bool, typer.Option("--full", help="All test questions (hours on a CPU).")] = False,
    seed: Annotated[int, typer.Option(help="Of the collages.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the pictures, one in it for each model.")] = Path(
        "demo"
    ),
    model: Annotated[Path | None, typer.Option(help="Another model trained on these questions, instead.")] = None,
) -> None:
    """A small LLaVA and a small Qwen2-VL answer questions, with every method at several token budgets."""
    with user_errors():
        from vlmaccel.evals import demo as work
        from vlmaccel.evals import demo_report

        for checkpoint in [model] if model else work.CHECKPOINTS.values():
            start = time.monotonic()
            with _progress() as progress:
                result = work.run(progress, questions, full, seed, checkpoint)
                paths = demo_report.write(result, out / checkpoint.name)
            _show(demo_report.table(result.report), *demo_report.notes(result.report))
            _show(f"\nwrote {', '.join(map(str, paths))} in {time.monotonic() - start:.0f} s\n")


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
        with _progress() as progress:
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
                _show(turn_table(by_turn, others))
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
        _show(table(result, result.loyalty(others) if others else None))


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
        with _progress() as progress:
            result = evaluate(loaded, tokenizer, words, ways, settings, progress, {"model": model, "text": source})
        _show(text_report.table(result), *text_report.notes(result))
        if out:
            _show(f"\nwrote {text_report.write(result, out)}")


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

        ways = sweep(method, _numbers(r), parse_options(option))
        if out:
            need("matplotlib", "demo")  # before the work, not after it
            out.mkdir(parents=True, exist_ok=True)
        state, place = processes(device)
        pictures = read_data(data).spread(limit)
        classifier = load_classifier(model, pictures.classes, dtype, place)
        file = out / "results.jsonl" if out else None
        with _progress(state.is_main_process) as progress:
            progress.start("classifying", len(pictures))
            result = evaluate(classifier, pictures, ways, batch_size, file, workers=workers, tick=progress.advance)
        if result:
            _show(imagenet_report.table(result), *imagenet_report.notes(result))
            if out:
                _show(f"\nwrote {', '.join(map(str, imagenet_report.write(result, out)))}")
        finish(state)


@benches.callback()
def bench(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help="Named model shape.")] = "llava-1.5-7b",
    method: Method = "pyramiddrop",
    option: Options = None,
    depth: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 4,
    vision_depth: Annotated[int, typer.Option(min=1, help="Layers of the vision tower.")] = 2,
    text_tokens: Annotated[int, typer.Option(min=1)] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    new_tokens: Annotated[int, typer.Option(min=1)] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 5,
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, else bfloat16.")] = None,
    device: Annotated[str, typer.Option()] = "cpu",
    attn: Annotated[str, typer.Option(help="Attention implementation.")] = "sdpa",
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Ratio 1: the overhead of being patched.")] = False,
    include_tower: Annotated[bool, typer.Option("--include-tower", help="Start from pixels.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Patched against unpatched on a model of a real shape with random weights: decoders; `bench vit` for ViTs."""
    if context.invoked_subcommand:
        return
    with user_errors():
        from vlmaccel.evals.bench import render, run_bench

        with _progress() as progress:
            progress.start("", 0)
            result = run_bench(
                shape,
                method,
                parse_options(option),
                depth=depth,
                vision_depth=vision_depth,
                text_tokens=text_tokens,
                batch=batch,
                new_tokens=new_tokens,
                repeats=repeats,
                dtype=dtype,
                device=device,
                attn_implementation=attn,
                keep_all=keep_all,
                include_tower=include_tower,
                progress=lambda text: progress.start(text, 0),
            )
        _show(render(result))
        if out:
            result.save(out)
            _show(f"wrote {out}")


@app.command()
def visualize(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    model: Annotated[
        str,
        typer.Option(
            help="tiny-vit, which comes with vlmaccel; timm:NAME, timm:local-dir:PATH, open_clip:NAME@WEIGHTS; a "
            "directory or hub id for transformers, of a ViT, CLIP, SigLIP, DINOv2 or vision-language model."
        ),
    ] = "tiny-vit",
    method: Annotated[str, typer.Option(help="One of `vlmaccel methods`.")] = "tome",
    option: Options = None,
    block: Annotated[
        list[int] | None,
        typer.Option("--block", help="Of the vision tower, from 0; several times. Default: a few, and the last."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For a vision-language model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("groups.png"),
) -> None:
    """Draw on a picture which patches a method merges in the vision tower, and which ones survive in the decoder."""
    with user_errors():
        from vlmaccel.evals.image_data import need

        need("matplotlib", "demo")
        from vlmaccel.evals.visualize import visualize as work
        from vlmaccel.plots import save

        with _progress() as progress:
            progress.start("looking", 0)
            figure = work(model, image, method, parse_options(option), block, prompt, dtype, device)
        _show(f"wrote {save(figure, out)}")


@benches.command()
def vit(
    model: Annotated[
        str, typer.Option(help="A VisionTransformer of timm with a class token.")
    ] = "vit_base_patch16_224",
    batch: Annotated[int, typer.Option(min=1)] = 8,
    r: Annotated[list[str] | None, typer.Option("--r", help="One or several; default 4,8,13,16.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="One or several; default float32 and bfloat16.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 5,
    device: Annotated[str, typer.Option()] = "cpu",
    operations: Annotated[
        bool, typer.Option("--operations", help="Matching, merging, attention, and what lost.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """ToMe in a vision transformer beside the published algorithm and the model as it is, in turn."""
    with user_errors():
        from vlmaccel.evals.image_data import need

        need("timm", "vit")
        from vlmaccel.evals import bench_vit

        rs, dtypes = _numbers(r) or [4, 8, 13, 16], dtype or ["float32", "bfloat16"]
        with _progress() as progress:
            progress.start("", 0)
            say = lambda text: progress.start(text, 0)  # noqa: E731
            if operations:
                tables = bench_vit.compare(model, batch, rs[-1], dtypes, repeats, device)
            else:
                result = bench_vit.run_vit_bench(model, batch, rs, dtypes, repeats, device, say)
                tables = [bench_vit.render(result)]
        _show(*tables)
        if out and not operations:
            out.write_text(json.dumps(result.facts(), indent=2) + "\n")
            _show(f"wrote {out}")


@benches.command()
def cache(
    shape: Annotated[
        list[str] | None, typer.Option(help="One or several; default llava-1.5-7b and qwen2-1.5b.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Tokens in the cache; default 2048,16384.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="One or several; default float32 and bfloat16.")] = None,
    depth: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 2,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    budget: Annotated[float, typer.Option(help="Share of the cache that stays.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed together.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 5,
    device: Annotated[str, typer.Option()] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Decode steps over a smaller KV cache against the whole one, in turn."""
    with user_errors():
        from vlmaccel.evals import bench_cache

        results = []
        with _progress() as progress:
            progress.start("", 0)
            for name in shape or ["llava-1.5-7b", "qwen2-1.5b"]:
                result = bench_cache.run_cache_bench(
                    name,
                    _numbers(prompt) or [2048, 16384],
                    dtype or ["float32", "bfloat16"],
                    depth=depth,
                    batch=batch,
                    budget=budget,
                    steps=steps,
                    repeats=repeats,
                    device=device,
                    progress=lambda text: progress.start(text, 0),
                )
                results.append(result)
        _show(*(bench_cache.render(result) for result in results))
        if out:
            out.write_text(json.dumps([result.facts() for result in results], indent=2) + "\n")
            _show(f"wrote {out}")


@benches.command()
def kernels(
    device: Annotated[str, typer.Option(help="cuda: the Triton forms; cpu: the CPU forms.")] = "cuda",
    op: Annotated[list[str] | None, typer.Option("--op", help="One or several; default: all operators.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="One or several; default bfloat16, on a CPU float32 too.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Turns; default: as many as fit, from 3 on.")] = None,
    limit: Annotated[
        float | None, typer.Option(help="Seconds after which nothing more starts; default: 140 on a GPU.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", "--out", help="JSON file for the result.")] = None,
) -> None:
    """Every operator against torch's own best at shapes of real models, in turn."""
    with user_errors():
        import torch

        from vlmaccel.evals import bench_kernels

        cuda = torch.device(device).type == "cuda"
        if cuda and not torch.cuda.is_available():
            _show(bench_kernels.NO_GPU)
            return
        limit = 140 if cuda and limit is None else limit
        with _progress() as progress:
            progress.start("", 0)
            result = bench_kernels.run_kernel_bench(
                device, op, dtype, repeats=repeats, limit=limit, progress=lambda text: progress.start(text, 0)
            )
        _show(*bench_kernels.render(result))
        if out:
            out.write_text(json.dumps(result.facts(), indent=2) + "\n")
            _show(f"wrote {out}")


@benches.command(name="tokens")
def bench_tokens(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="One or several; default qwen2-vl-2b and qwen2-vl-2b-4k, in training llava-1.5-7b."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME:key=value; several times. Default: all, at a quarter; in training pyramiddrop and registers."
        ),
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="A training step in place of a prefill.")] = False,
    depth: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 4,
    dtype: Annotated[str, typer.Option()] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 3,
    device: Annotated[str, typer.Option()] = "cpu",
    out: Annotated[Path | None, typer.Option("--json", "--out", help="JSON file for the result.")] = None,
) -> None:
    """Prefill (or training) with fewer visual tokens against all of them, in turn: speed-up, FLOPs, what choosing costs."""
    with user_errors():
        from vlmaccel.evals import bench_tokens as work

        results = []
        with _progress() as progress:
            progress.start("", 0)
            for name in shape or (["llava-1.5-7b"] if training else work.SHAPES):
                result = work.run_token_bench(
                    name,
                    [parse_method(text) for text in method] if method else None,
                    training=training,
                    depth=depth,
                    dtype=dtype,
                    repeats=repeats,
                    device=device,
                    progress=lambda text: progress.start(text, 0),
                )
                results.append(result)
        _show(*(part for result in results for part in work.render(result)))
        if out:
            out.write_text(json.dumps([result.facts() for result in results], indent=2) + "\n")
            _show(f"wrote {out}")


@benches.command()
def sparse(
    shape: Annotated[
        list[str] | None, typer.Option(help="One or several; default llava-next-7b and qwen2-1.5b.")
    ] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="Of the prompt; default 2992,8192.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:key=value; several times. Default: all, at set shares.")
    ] = None,
    tau: Annotated[list[float] | None, typer.Option(help="Of ZipVL, in place of those; several times.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="One or several; default float32 and bfloat16.")] = None,
    depth: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 2,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 3,
    device: Annotated[str, typer.Option()] = "cpu",
    out: Annotated[Path | None, typer.Option("--json", "--out", help="JSON file for the result.")] = None,
) -> None:
    """Prefill with sparse attention against the whole of it, in turn: speed-up, FLOPs, what choosing costs."""
    with user_errors():
        from vlmaccel.evals import bench_sparse

        if method and tau:
            raise ValueError("--tau is of ZipVL in the default methods; with --method write zipvl:tau=...")
        ways = [parse_method(name) for name in method] if method else bench_sparse.default_methods(tau or None)
        results = []
        with _progress() as progress:
            progress.start("", 0)
            for name in shape or ["llava-next-7b", "qwen2-1.5b"]:
                result = bench_sparse.run_sparse_bench(
                    name,
                    _numbers(tokens) or bench_sparse.TOKENS,
                    dtype or ["float32", "bfloat16"],
                    ways,
                    depth=depth,
                    batch=batch,
                    repeats=repeats,
                    device=device,
                    progress=lambda text: progress.start(text, 0),
                )
                results.append(result)
        _show(*(part for result in results for part in bench_sparse.render(result)))
        if out:
            out.write_text(json.dumps([result.facts() for result in results], indent=2) + "\n")
            _show(f"wrote {out}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Local directory or hub id.")],
    method: Annotated[str | None, typer.Option(help="One of `vlmaccel methods`; default: the model family's.")] = None,
    option: Options = None,
    host: Annotated[str, typer.Option()] = "localhost",
    port: Annotated[int, typer.Option()] = 8000,
    device: Annotated[str, typer.Option(help="auto, cuda:0, cpu, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto: that of the weights.")] = "auto",
) -> None:
    """`transformers serve` (an OpenAI-compatible server) with a patched model."""
    with user_errors():
        from vlmaccel.serving import PatchedServe

        PatchedServe(model, method, parse_options(option), host=host, port=port, device=device, dtype=dtype).wait()


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
    steps: Steps = 1000,
    pictures: Pictures = 8,
    questions: Questions = 12,
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
    steps: Steps = 1000,
    pictures: Pictures = 8,
    questions: Questions = 12,
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
    with _progress() as progress:
        progress.start("measuring the unpatched model", 0)
        level = unpatched_accuracy(loaded, processor, measured)
        progress.start("training", schedule.steps)
        log = run(loaded, processor, draw, measured, out, schedule=schedule, tick=progress.advance)
    paths = training_report.write(log, level, out)
    _show(training_report.table(log, level), f"wrote {', '.join(map(str, paths))}")


@app.command()
def methods() -> None:
    """What `--method` can be."""
    with user_errors():
        import vlmaccel

        _show(_two_columns("method", vlmaccel.methods()))


@app.command()
def adapters() -> None:
    """Models that can be patched."""
    with user_errors():
        import vlmaccel

        _show(_two_columns("adapter", vlmaccel.adapters()))


def _sweep(
    model: str, choose: Any, title: str, cost: Any, questions: int, dtype: str, seed: int, out: Path | None
) -> None:
    """Run a sweep of methods, show it and write it."""
    from vlmaccel.evals import sweep
    from vlmaccel.evals.demo import CHECKPOINTS

    with _progress() as progress:
        result = sweep.run_sweep(progress, str(CHECKPOINTS.get(model, model)), choose, questions, dtype, seed)
    _show(sweep.render(result, title, cost))
    if out:
        out.write_text(json.dumps(result.facts(), indent=2) + "\n")
        _show(f"wrote {out}")


CONSTANTS = {name.lower(): name for name in ("True", "False", "None")}


def parse_options(pairs: list[str] | None, flag: str = "--option") -> dict[str, Any]:
    """key=value pairs; values are Python literals (0.5, None, 1,3,4; true, false and none in any case), or else text."""
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{flag} takes key=value, e.g. ratio=0.5, not {pair!r}")
        try:
            options[key] = ast.literal_eval(CONSTANTS.get(value.lower(), value))
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def parse_method(text: str) -> Any:
    """The method of NAME or NAME:key=value,key=value; a comma inside a value does not end it, e.g. ratios=0.5,0.25."""
    from vlmaccel.methods import make

    name, colon, rest = text.partition(":")
    return make(name, **parse_options(re.split(r",(?=[A-Za-z_]\w*=)", rest) if colon else None, f"--method {name}:"))


def _numbers(lists: list[str] | None) -> list[int]:
    try:
        return [int(part) for text in lists or () for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--r takes whole numbers, e.g. 4,8, not {' '.join(lists or ())!r}") from None


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can mend is said in one line, exit code 2; VLMACCEL_TRACEBACK=1 shows where it came from."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        if os.environ.get("VLMACCEL_TRACEBACK"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"vlmaccel: {lines[0]}", file=sys.stderr)
        raise typer.Exit(2) from None


class _Bar:
    """A progress bar that starts anew with every part of the work."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.task: Any = None

    def start(self, what: str, total: int) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(what, total=total or None)

    def advance(self, count: int) -> None:
        self.bar.advance(self.task, count)


@contextmanager
def _progress(shown: bool = True) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        yield _Bar(bar)


def _show(*parts: Any) -> None:
    from rich.console import Console

    # a file or a pipe has no width of its own: the widest table fits into this
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for part in parts:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))


def _two_columns(name: str, lines: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(name, "", box=None, padding=(0, 2))
    for key, line in lines.items():
        table.add_row(key, line)
    return table


if __name__ == "__main__":
    app()
