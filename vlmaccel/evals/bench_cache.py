"""What a smaller KV cache gains at the decode steps of a model of a real shape, and what of it is the smaller cache.

Three ways take turns over caches of the same prompt length: the model as it is; patched, with the whole cache (but one
entry), which shows what our form of the decode attention alone gains: it repeats no keys and copies no cache at a step;
and patched, with the budget. Caches are filled with random keys and values, since a prefill of this length would take
minutes on a CPU and which entries stay does not matter to the time; they are evicted by the cache layer's own `reduce`.

The *bytes bound* is what a step reads, weights + KV cache, before / after: as fast as it could get if reading were all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import vlmaccel
from vlmaccel.cache import kv_bytes, pruned_layer
from vlmaccel.evals.bench import DTYPES
from vlmaccel.evals.shapes import build, get_shape
from vlmaccel.evals.timing import Spread, Timing, clock_for, machine, measure_in_turn
from vlmaccel.methods import SnapKV
from vlmaccel.reduction import Reduction

FORM, UNPATCHED, BUDGET = "whole cache, our form", "unpatched", "budget"


@dataclass(frozen=True)
class Row:
    """One prompt length in one dtype. Speed-ups are ratios of the times of a decode step in the same turn.

    speedup: of the budget against unpatched; form: of our form over the whole cache against unpatched; size: of the
    budget against our form over the whole cache. bound: bytes read, before / after. unpatched: seconds a step, wall.
    kv, kv_full: bytes of the caches before the first step.
    """

    dtype: str
    prompt: int
    speedup: Spread
    form: Spread
    size: Spread
    bound: float
    unpatched: Spread
    kv: int
    kv_full: int


@dataclass(frozen=True)
class CacheBench:
    """All rows of a run."""

    shape: str
    depth: int
    batch: int
    budget: float
    steps: int
    repeats: int
    clock: str
    weights: dict[str, int]
    rows: tuple[Row, ...]
    machine: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)


def run_cache_bench(
    shape: str,
    prompts: Sequence[int],
    dtypes: Sequence[str],
    *,
    depth: int = 2,
    batch: int = 8,
    budget: float = 0.1,
    steps: int = 8,
    repeats: int = 5,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> CacheBench:
    """Time decode steps at every prompt length and dtype.

    shape: a name of `vlmaccel.evals.shapes.SHAPES`; of a vision-language model only the decoder works. budget: share of
    the entries of each KV head that stays. steps: decode steps that are timed together.
    Raises ValueError for an unknown shape, dtype or a budget that is no share.
    """
    say = progress or (lambda text: None)
    get_shape(shape)
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {', '.join(sorted(unknown))}")
    if not 0 < budget < 1:
        raise ValueError(f"budget is a share of the cache, more than 0 and less than 1, not {budget!r}")
    rows, weights = [], {}
    for dtype in dtypes:
        say(f"building {shape} with {depth} layers in {dtype}")
        model = build(shape, depth, DTYPES[dtype], None if get_shape(shape).vision is None else 1, device=device)
        weights[dtype] = _weights(model)
        for prompt in prompts:
            say(f"{dtype}, {prompt} tokens")
            rows.append(_row(model, prompt, dtype, batch, budget, steps, repeats, say))
        facts = machine(model)
    return CacheBench(shape, depth, batch, budget, steps, repeats, clock_for(device), weights, tuple(rows), facts)


def _weights(model: PreTrainedModel) -> int:
    """Bytes of the weights that every decode step reads: the decoder's layers and the output embedding."""
    text = model.get_decoder()
    read = [*text.layers.parameters(), *text.norm.parameters(), *model.get_output_embeddings().parameters()]
    return sum(p.nbytes for p in read)


def fill(model: PreTrainedModel, batch: int, prompt: int, keep: int | None) -> DynamicCache:
    """A cache of `prompt` random tokens, in which every KV head holds `keep` of them; None: an ordinary one with all.

    The entries that stay are drawn anew for each sample and head; equal counts, as SnapKV leaves them.
    """
    config = model.config.get_text_config()
    heads, dim = config.num_key_value_heads, getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1, 1, 1024 + prompt, dim, generator=generator).to(model.device, model.dtype)
    for layer in range(config.num_hidden_layers):
        whole = torch.cat([block[:, :, 7 * h : 7 * h + prompt] for h in range(heads)], 1).repeat(batch, 1, 1, 1)
        cache.update(whole, whole.clone(), layer)
        if keep is not None:
            chance = torch.rand(batch * heads, prompt, generator=generator).to(model.device)
            wanted = torch.zeros_like(chance, dtype=torch.bool).scatter(1, chance.topk(keep, dim=1).indices, True)
            pruned_layer(cache, layer).reduce(Reduction.select(wanted))
    return cache


def _row(
    model: PreTrainedModel,
    prompt: int,
    dtype: str,
    batch: int,
    budget: float,
    steps: int,
    repeats: int,
    say: Callable[[str], None],
) -> Row:
    kept: dict[str, int | None] = {UNPATCHED: None, FORM: prompt - 1, BUDGET: max(1, int(prompt * budget))}
    held: dict[str, int] = {}

    def way(name: str) -> Callable[[], dict[str, Timing]]:
        def run() -> dict[str, Timing]:
            cache = fill(model, batch, prompt, kept[name])
            held[name] = kv_bytes(cache)[0]
            return {"decode": time_steps(model, cache, batch, prompt, steps)}

        return run

    ways = {name: way(name) for name in kept}
    patched = lambda: vlmaccel.patched(model, SnapKV(budget=budget))  # noqa: E731
    measured = measure_in_turn(
        ways,
        repeats,
        contexts={FORM: patched, BUDGET: patched},
        device=model.device,
        progress=lambda name, turn: say(f"{dtype}, {prompt} tokens: turn {turn + 1} of {repeats}, {name}"),
    )
    clock = clock_for(model.device)
    weights = _weights(model)
    return Row(
        dtype=dtype,
        prompt=prompt,
        speedup=measured.speedup(BUDGET, UNPATCHED, "decode", clock),
        form=measured.speedup(FORM, UNPATCHED, "decode", clock),
        size=measured.speedup(BUDGET, FORM, "decode", clock),
        bound=(weights + held[UNPATCHED]) / (weights + held[BUDGET]),
        unpatched=measured.time(UNPATCHED, "decode", "wall"),
        kv=held[BUDGET],
        kv_full=held[UNPATCHED],
    )


@torch.inference_mode()
def time_steps(model: PreTrainedModel, cache: DynamicCache, batch: int, prompt: int, steps: int) -> Timing:
    """Time of one decode step, the mean over `steps` of them after one that does not count."""
    token = torch.full((batch, 1), 5, device=model.device)
    # until transformers 5.23 it was called past_key_values
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    start = Timing.now(model.device)
    for step in range(steps + 1):
        if step == 1:
            start = Timing.now(model.device)
        model(input_ids=token, position_ids=_position(batch, prompt + step, token), **{name: cache}, use_cache=True)
    return (Timing.now(model.device) - start) / steps


def _position(batch: int, at: int, like: Tensor) -> Tensor:
    return torch.full((batch, 1), at, device=like.device)


def render(result: CacheBench) -> Table:
    """The rows as a table for a terminal."""
    facts = result.machine
    table = Table(
        title=f"decode of {result.shape}, {result.depth} layers, batch {result.batch}, {result.budget:.0%} of the cache",
        caption=(
            f"Speed-ups of a decode step by {'processor' if result.clock == 'cpu' else 'wall clock'} time, turn by turn: "
            f"median (smallest..largest) of {result.repeats}, each over {result.steps} steps. form: patched, with the whole "
            "cache; size: the budget against that; bound: bytes of weights and cache read at a step, before / after. "
            f"{facts['name']}, {facts['threads']} threads, load {facts['load']}, torch {facts['torch']}"
        ),
        box=box.SIMPLE_HEAD,
    )
    for column in ("dtype", "prompt", "speed-up", "of it form", "of it size", "bound", "of bound", "KV", "s a step"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for row in result.rows:
        table.add_row(
            row.dtype,
            f"{row.prompt:,}",
            f"[bold]{row.speedup}x[/bold]",
            f"{row.form}x",
            f"{row.size}x",
            f"{row.bound:.2f}x",
            f"{row.speedup.median / row.bound:.2f}",
            f"{row.kv / row.kv_full:.1%}",
            f"{row.unpatched.median:.3g}",
        )
    return table
