"""What dropping or merging visual tokens gains in the prefill, or in a training step, of a model of a real shape, and what choosing
them costs.

The model as it is and every method take turns over the same prompt. The *bound* is the FLOPs of a prefill, counted while it
runs, unpatched / patched, the methods' own scoring included, with the whole square of causal attention, as counters take it, and with
half of it, which is what fused attention computes; *efficiency* is the measured speed-up / these bounds. *Choosing* is the
share of the method's prefill that is spent in its hooks. A training step is forward and backward of all of the decoder's weights,
with text that has labels; the optimizer's own work is the same for all and left out.

Pictures are encoded beforehand, except for methods that look into the vision tower: these, and what they are compared with,
start from pixels, and the tower counts. Random weights choose arbitrary tokens, but as many as trained ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich import box
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

import vlmaccel
from vlmaccel.adapters.base import find_adapter
from vlmaccel.evals.bench import DTYPES, encode, first_logits
from vlmaccel.evals.bench_sparse import Stopwatch, attention_flops, over, share
from vlmaccel.evals.shapes import build, get_shape, prompt
from vlmaccel.evals.timing import Spread, Timing, clock_for, machine, measure_in_turn, peak_memory
from vlmaccel.evals.token_sweep import before, inside
from vlmaccel.flops import count_flops
from vlmaccel.hooks import Method
from vlmaccel.methods import PyramidDrop, Registers

SHAPES = ("qwen2-vl-2b", "qwen2-vl-2b-4k")
SHARE = 0.25  # of the visual tokens that the default methods leave
HOOKS = ("visual_tokens", "insert", "attention", "decoder_layer", "merged")
PLAIN, FROM_PIXELS = "unpatched", "unpatched, from pixels"
CHEAP, EFFICIENT = 0.03, 0.85  # what every method should reach
REGISTERS = 8  # of the default methods of a training step

Step = Callable[[PreTrainedModel, Mapping[str, Any]], object]


@dataclass(frozen=True)
class Row:
    """A method. visual: visual tokens at a decoder layer's input, mean over layers, of all. from_pixels: whether the vision
    tower is in its times. bound, bound_causal: FLOPs, unpatched / patched. choosing: share of the method's step in its hooks. peak: bytes of the
    step's tensors, of the unpatched peak."""

    method: str
    visual: float
    from_pixels: bool
    bound: float
    bound_causal: float
    speedup: Spread
    choosing: Spread
    peak: float

    @property
    def cost(self) -> float:
        """Time in the method's hooks, of that of an unpatched step."""
        return self.choosing.median / self.speedup.median

    @property
    def efficiency(self) -> Spread:
        """Measured speed-up / bound."""
        return over(self.speedup, self.bound)

    @property
    def efficiency_causal(self) -> Spread:
        """Measured speed-up / bound_causal."""
        return over(self.speedup, self.bound_causal)


@dataclass(frozen=True)
class TokenBench:
    """All methods on one shape in one dtype. step: "prefill" or "training step". seconds: of an unpatched one, by wall clock."""

    step: str
    shape: str
    dtype: str
    depth: int
    vision_depth: int
    visual_tokens: int
    repeats: int
    clock: str
    seconds: Spread
    rows: tuple[Row, ...]
    machine: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        facts = asdict(self)
        for row, values in zip(self.rows, facts["rows"], strict=True):
            values["efficiency"], values["cost"] = asdict(row.efficiency), row.cost
            values["efficiency_causal"] = asdict(row.efficiency_causal)
        return facts


def default_methods(depth: int, visual: int, kept: float = SHARE) -> list[Method]:
    """The methods of `vlmaccel eval tokens` at one share of the tokens, each once."""
    every = [*before(kept), *inside(kept, depth, visual)]
    return list({type(method): method for method in every}.values())


def run_token_bench(
    shape: str,
    methods: Sequence[Method] | None = None,
    *,
    training: bool = False,
    depth: int = 4,
    vision_depth: int = 2,
    dtype: str = "float32",
    repeats: int = 3,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> TokenBench:
    """Measure the prefill, or a training step, with every method.

    shape: a vision-language name of `vlmaccel.evals.shapes.SHAPES`. methods: None for `default_methods`, in training for PyramidDrop
    and registers.
    Raises ValueError for an unknown shape or dtype, or a shape without pictures.
    """
    say = progress or (lambda text: None)
    if get_shape(shape).vision is None:
        raise ValueError(f"{shape} sees no pictures")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    visual = get_shape(shape).visual_tokens
    if methods is None:
        methods = [PyramidDrop(), Registers(REGISTERS)] if training else default_methods(depth, visual)
    say(f"building {shape} with {depth} layers in {dtype}")
    model = build(shape, depth, DTYPES[dtype], vision_depth, device=device)
    pixels: dict[str, Any] = prompt(model, shape)
    encoded = encode(model, pixels)
    inputs = {method: pixels if method.sees_patches else encoded for method in methods}
    step: Step = training_step if training else first_logits
    if training:
        model.requires_grad_(False)
        decoder(model).requires_grad_(True)
        model.train()

    say("memory and FLOPs")
    bases = {False: partial(step, model, encoded)}
    if any(method.sees_patches for method in methods):
        bases[True] = partial(step, model, pixels)
    whole = {which: (count_flops(base), peak_memory(base, device)) for which, base in bases.items()}
    found = {}
    for method in methods:
        with vlmaccel.patched(model, method):
            run = partial(step, model, inputs[method])
            found[method] = count_flops(run), peak_memory(run, device), vlmaccel.stats(model)

    ways: dict[str, Callable[[], object]] = {FROM_PIXELS if which else PLAIN: base for which, base in bases.items()}
    ways |= {repr(method): watched(partial(step, model, inputs[method]), method, device) for method in methods}
    measured = measure_in_turn(
        ways,
        repeats,
        contexts={repr(method): partial(vlmaccel.patched, model, method) for method in methods},
        warmup=0,  # all have run
        device=device,
        progress=lambda way, turn: say(f"turn {turn + 1} of {repeats}, {way.split('(')[0]}"),
    )
    clock, rows = clock_for(device), []
    for method in methods:
        flops, peak, stats = found[method]
        flops_before, peak_before = whole[method.sees_patches]
        assert isinstance(stats, vlmaccel.Stats)
        base = FROM_PIXELS if method.sees_patches else PLAIN
        half = partial(half_of_attention, model.config.get_text_config(), training=training)
        everything = [stats.token_map.modality.shape[1]] * depth
        rows.append(
            Row(
                method=repr(method),
                visual=stats.mean_visual_tokens / stats.nominal_visual_tokens,
                from_pixels=method.sees_patches,
                bound=flops_before / flops,
                bound_causal=(flops_before - half(everything)) / (flops - half(stats.tokens)),
                speedup=measured.speedup(repr(method), base, clock=clock),
                choosing=share(measured, repr(method), "choosing", clock),
                peak=peak / peak_before,
            )
        )
    seconds, facts = measured.time(PLAIN), machine(model)
    what = "training step" if training else "prefill"
    return TokenBench(what, shape, dtype, depth, vision_depth, visual, repeats, clock, seconds, tuple(rows), facts)


def half_of_attention(config: Any, tokens: Sequence[float], training: bool) -> float:
    """FLOPs of half of the square of attention, with `tokens` at every layer's input; in training, of forward and backward."""
    passes = 3.5 if training else 1  # two products forward, five backward
    return passes / 2 * sum(attention_flops(config, n, 1) for n in tokens) / config.num_hidden_layers


def decoder(model: PreTrainedModel) -> nn.Module:
    """The language model of a vision-language one."""
    parts = find_adapter(model).parts(model)
    assert parts is not None
    return parts.text


def training_step(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Forward and backward; all text has labels."""
    copied = {k: dict(v) if k == "mm_encoder_outputs" else v for k, v in inputs.items()}
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    model(**copied, labels=labels, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def watched(run: Callable[[], object], method: Method, device: str) -> Callable[[], dict[str, Timing]]:
    """`run`, and what of it is spent in the method."""
    watch = Stopwatch(method, device, HOOKS)

    def timed() -> dict[str, Timing]:
        with watch.running():
            start = Timing.now(device)
            run()
            return {"total": Timing.now(device) - start, "choosing": watch.spent}

    return timed


def render(result: TokenBench) -> list[Table | str]:
    """The rows as a table for a terminal, and whether they reach what they should."""
    facts = result.machine
    table = Table(
        title=f"{result.step} of {result.shape}, {result.visual_tokens:,} visual tokens, {result.depth} layers, {result.dtype}",
        caption=(
            f"Speed-ups by {'processor' if result.clock == 'cpu' else 'wall clock'} time, turn by turn: median "
            f"(smallest..largest) of {result.repeats}; unpatched {result.seconds.median:.3g} s. tokens: visual ones at a layer's "
            "input. bound: counted FLOPs, unpatched / patched, with all pairs of causal attention / with half of them; efficiency: "
            "speed-up of these bounds. choosing: of the method's step / of an unpatched one. peak: tensors of a step. "
            f"*: from pixels, {result.vision_depth} layers of the vision tower included. {facts['name']}, "
            f"{facts['threads']} threads, load {facts['load']}, torch {facts['torch']}"
        ),
        box=box.SIMPLE_HEAD,
    )
    for column in ("method", "tokens", "bound", "speed-up", "efficiency", "choosing", "peak"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result.rows:
        table.add_row(
            row.method.split("(")[0] + " *" * row.from_pixels,
            f"{row.visual:.0%}",
            f"{row.bound:.2f} / {row.bound_causal:.2f}x",
            f"[bold]{row.speedup}x[/bold]",
            f"{row.efficiency.median:.2f} / {row.efficiency_causal.median:.2f}",
            f"{row.choosing.median:.1%} / {row.cost:.1%}",
            f"{row.peak:.0%}",
        )
    missed = [
        row.method.split("(")[0] for row in result.rows if row.cost > CHEAP or row.efficiency_causal.median < EFFICIENT
    ]
    goal = f"choosing at most {CHEAP:.0%} of an unpatched step, efficiency of {EFFICIENT} or more of what is computed"
    return [table, f"{goal}: " + (f"not reached by {', '.join(missed)}" if missed else "reached by all")]
