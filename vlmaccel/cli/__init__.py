"""The command `vlmaccel`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmaccel.cli.benches import benches
from vlmaccel.cli.common import Options, parse_options, progress_bar, show, user_errors
from vlmaccel.cli.evals import evals
from vlmaccel.cli.trains import trains

# torch and transformers are imported where they are needed: --help comes at once
app = typer.Typer(help="Faster and smaller vision-language models.", no_args_is_help=True, add_completion=False)
app.add_typer(evals, name="eval")
app.add_typer(benches, name="bench")
app.add_typer(trains, name="train")


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
            with progress_bar() as progress:
                result = work.run(progress, questions, full, seed, checkpoint)
                paths = demo_report.write(result, out / checkpoint.name)
            show(demo_report.table(result.report), *demo_report.notes(result.report))
            show(f"\nwrote {', '.join(map(str, paths))} in {time.monotonic() - start:.0f} s\n")


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

        with progress_bar() as progress:
            progress.start("looking", 0)
            figure = work(model, image, method, parse_options(option), block, prompt, dtype, device)
        show(f"wrote {save(figure, out)}")


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


@app.command()
def methods() -> None:
    """What `--method` can be."""
    with user_errors():
        import vlmaccel

        show(_two_columns("method", vlmaccel.methods()))


@app.command()
def adapters() -> None:
    """Models that can be patched."""
    with user_errors():
        import vlmaccel

        show(_two_columns("adapter", vlmaccel.adapters()))


def _two_columns(name: str, lines: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(name, "", box=None, padding=(0, 2))
    for key, line in lines.items():
        table.add_row(key, line)
    return table


__all__ = ["app"]
