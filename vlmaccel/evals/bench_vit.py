"""What merging gains in a vision transformer of a real shape, beside the published algorithm, in one run.

Three ways take turns: the timm model as it is, ToMe as it was published (`vlmaccel.evals.published_tome`), and the model
patched with ours. Weights are random: which patches are alike does not matter to the time, how many are merged does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

import vlmaccel
from vlmaccel.evals.bench import DTYPES
from vlmaccel.evals.bench_operations import attention_error, compare_operations, merging_only
from vlmaccel.evals.published_tome import PublishedToMe
from vlmaccel.evals.timing import Spread, clock_for, hardware, measure_in_turn, peak_memory
from vlmaccel.flops import count_flops
from vlmaccel.methods import ToMe


@dataclass(frozen=True)
class Row:
    """One r in one dtype. Speed-ups are ratios of times in the same turn, above 1 = faster.

    ours, published: against the model as it is. against_published: ours against the published algorithm.
    merging: share of our forward that matching and merging take when run on their own; beside: that all which is not the
        model's own work takes, the keys' mean and the bookkeeping, too.
    flops: counted FLOPs, unpatched / ours. peak_ours, peak_published: of the unpatched peak of tensors in a forward.
    tokens: before the first block and behind the last.
    """

    r: int
    dtype: str
    ours: Spread
    published: Spread
    against_published: Spread
    merging: Spread
    beside: Spread
    flops: float
    peak_ours: float
    peak_published: float
    tokens: tuple[int, int]


@dataclass(frozen=True)
class VitBench:
    """All rows of a run. attention_error: by dtype, largest error of our attention and of torch's fused one against
    float64, on this shape with standard normal inputs. clock: what times are taken by."""

    model: str
    batch: int
    repeats: int
    clock: str
    rows: tuple[Row, ...]
    attention_error: dict[str, tuple[float, float]]
    machine: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)


def run_vit_bench(
    name: str,
    batch: int,
    rs: Sequence[int],
    dtypes: Sequence[str],
    repeats: int = 5,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> VitBench:
    """Measure ToMe at every r and dtype on timm's model `name` with random weights.

    name: a VisionTransformer with a class token and without LayerScale, which the published code can run.
    Raises ValueError for a dtype or a model that is none of these.
    """
    say = progress or (lambda text: None)
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {', '.join(sorted(unknown))}")
    say(f"building {name}")
    model = build(name).to(device)
    size = model.patch_embed.img_size
    rows, errors = [], {}
    for dtype in dtypes:
        model = model.to(DTYPES[dtype])
        pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])
        rows += [_row(model, pixels, r, dtype, repeats, say) for r in rs]
        heads = model.blocks[0].attn.num_heads
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        errors[dtype] = attention_error(heads, tokens, model.embed_dim // heads, DTYPES[dtype], device)
    return VitBench(name, batch, repeats, clock_for(device), tuple(rows), errors, hardware(device))


def build(name: str) -> Any:
    """timm's model of this name with random weights; ValueError for one that the published code cannot run."""
    import timm

    if name not in timm.list_models():
        raise ValueError(f"timm has no model {name!r}; timm.list_models('vit*') lists what there is")
    model: Any = timm.create_model(name, pretrained=False).eval()
    blocks = getattr(model, "blocks", [])
    plain = all(type(block).__name__ == "Block" and not list(block.ls1.parameters()) for block in blocks)
    if getattr(model, "cls_token", None) is None or not plain:
        raise ValueError(f"the published algorithm cannot run {name}: it needs a class token and no LayerScale")
    return model


def compare(name: str, batch: int, r: int, dtypes: Sequence[str], repeats: int, device: str) -> list[Table]:
    """`compare_operations` at the shape of a model's first block, in every dtype."""
    model = build(name)
    heads = model.blocks[0].attn.num_heads
    tokens, dim = model.patch_embed.num_patches + model.num_prefix_tokens, model.embed_dim // heads
    return [compare_operations(batch, tokens, heads, dim, r, DTYPES[dtype], device, repeats) for dtype in dtypes]


@torch.no_grad()
def _row(model: Any, pixels: Tensor, r: int, dtype: str, repeats: int, say: Callable[[str], None]) -> Row:
    method, published = ToMe(r=r), PublishedToMe(model, r)
    patched = lambda: vlmaccel.patched(model, method)  # noqa: E731
    forward = lambda: model(pixels)  # noqa: E731
    say(f"{dtype}, r={r}: memory and FLOPs")
    device = str(pixels.device)
    peaks, flops = (
        [peak_memory(forward, device), peak_memory(lambda: published(pixels), device)],
        [count_flops(forward)],
    )
    with patched():
        peaks.append(peak_memory(forward, device))
        flops.append(count_flops(forward))
        stats = vlmaccel.stats(model)
    assert isinstance(stats, vlmaccel.TowerStats)
    clock = clock_for(device)
    measured = measure_in_turn(
        {
            "unpatched": forward,
            "published": lambda: published(pixels),
            "ours": forward,
            "merging": merging_only(model, pixels, stats, operators=True),
            "beside": merging_only(model, pixels, stats),
        },
        repeats,
        contexts={"ours": patched},
        device=device,
        progress=lambda way, turn: say(f"{dtype}, r={r}: turn {turn + 1} of {repeats}, {way}"),
    )
    speed = lambda way, base: measured.speedup(way, base, clock=clock)  # noqa: E731
    return Row(
        r=r,
        dtype=dtype,
        ours=speed("ours", "unpatched"),
        published=speed("published", "unpatched"),
        against_published=speed("ours", "published"),
        merging=speed("ours", "merging"),
        beside=speed("ours", "beside"),
        flops=flops[0] / flops[1],
        peak_ours=peaks[2] / peaks[0],
        peak_published=peaks[1] / peaks[0],
        tokens=(stats.tokens[0], stats.tokens[-1]),
    )


def render(result: VitBench) -> Table:
    """The rows as a table for a terminal."""
    facts = result.machine
    errors = "; ".join(
        f"{dtype} {ours:.1e}, torch's fused {fused:.1e}" for dtype, (ours, fused) in result.attention_error.items()
    )
    table = Table(
        title=f"{result.model}, batch {result.batch}, random weights",
        caption=(
            f"Speed-ups by {'processor' if result.clock == 'cpu' else 'wall clock'} time, turn by turn: median "
            f"(smallest..largest) of {result.repeats}. merging: of our forward, matching and merging on their own / with the "
            f"keys' mean and the bookkeeping. peak: tensors of a forward, of the unpatched peak, ours / published. "
            f"Largest attention error against float64: {errors}. {facts['name']}, {facts['threads']} threads, load {facts['load']}, torch {facts['torch']}"
        ),
        box=box.SIMPLE_HEAD,
    )
    for column in ("dtype", "r", "tokens", "FLOPs", "published", "ours", "ours against published", "merging", "peak"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for row in result.rows:
        table.add_row(
            row.dtype,
            str(row.r),
            f"{row.tokens[0]} to {row.tokens[1]}",
            f"{row.flops:.2f}x fewer",
            f"{row.published}x",
            f"[bold]{row.ours}x[/bold]",
            f"{row.against_published}x",
            f"{row.merging.median:.1%} / {row.beside.median:.1%}",
            f"{row.peak_ours:.0%} / {row.peak_published:.0%}",
        )
    return table
