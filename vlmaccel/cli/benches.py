"""`vlmaccel bench`: time, memory, FLOPs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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

benches = typer.Typer(invoke_without_command=True)


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

        with progress_bar() as progress:
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
        show(render(result))
        if out:
            result.save(out)
            show(f"wrote {out}")


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

        rs, dtypes = numbers(r) or [4, 8, 13, 16], dtype or ["float32", "bfloat16"]
        with progress_bar() as progress:
            progress.start("", 0)
            say = lambda text: progress.start(text, 0)  # noqa: E731
            if operations:
                tables = bench_vit.compare(model, batch, rs[-1], dtypes, repeats, device)
            else:
                result = bench_vit.run_vit_bench(model, batch, rs, dtypes, repeats, device, say)
                tables = [bench_vit.render(result)]
        show(*tables)
        if out and not operations:
            out.write_text(json.dumps(result.facts(), indent=2) + "\n")
            show(f"wrote {out}")


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
        with progress_bar() as progress:
            progress.start("", 0)
            for name in shape or ["llava-1.5-7b", "qwen2-1.5b"]:
                result = bench_cache.run_cache_bench(
                    name,
                    numbers(prompt) or [2048, 16384],
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
        show(*(bench_cache.render(result) for result in results))
        save([result.facts() for result in results], out)


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
            show(bench_kernels.NO_GPU)
            return
        limit = 140 if cuda and limit is None else limit
        with progress_bar() as progress:
            progress.start("", 0)
            result = bench_kernels.run_kernel_bench(
                device, op, dtype, repeats=repeats, limit=limit, progress=lambda text: progress.start(text, 0)
            )
        show(*bench_kernels.render(result))
        save(result.facts(), out)


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
    vision_depth: Annotated[int, typer.Option(min=1, help="Layers of the vision tower.")] = 2,
    dtype: Annotated[str, typer.Option()] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 3,
    device: Annotated[str, typer.Option()] = "cpu",
    out: Annotated[Path | None, typer.Option("--json", "--out", help="JSON file for the result.")] = None,
) -> None:
    """Prefill (or training) with fewer visual tokens against all of them, in turn: speed-up, FLOPs, what choosing costs."""
    with user_errors():
        from vlmaccel.evals import bench_tokens as work

        results = []
        with progress_bar() as progress:
            progress.start("", 0)
            for name in shape or (["llava-1.5-7b"] if training else work.SHAPES):
                result = work.run_token_bench(
                    name,
                    [parse_method(text) for text in method] if method else None,
                    training=training,
                    depth=depth,
                    vision_depth=vision_depth,
                    dtype=dtype,
                    repeats=repeats,
                    device=device,
                    progress=lambda text: progress.start(text, 0),
                )
                results.append(result)
        show(*(part for result in results for part in work.render(result)))
        save([result.facts() for result in results], out)


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
        with progress_bar() as progress:
            progress.start("", 0)
            for name in shape or ["llava-next-7b", "qwen2-1.5b"]:
                result = bench_sparse.run_sparse_bench(
                    name,
                    numbers(tokens) or bench_sparse.TOKENS,
                    dtype or ["float32", "bfloat16"],
                    ways,
                    depth=depth,
                    batch=batch,
                    repeats=repeats,
                    device=device,
                    progress=lambda text: progress.start(text, 0),
                )
                results.append(result)
        show(*(part for result in results for part in bench_sparse.render(result)))
        save([result.facts() for result in results], out)
