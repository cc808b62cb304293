"""What sparse attention gains in the prefill of a model of a real shape, beside what its FLOPs let expect.

The model as it is and every sparse method take turns over the same prompt. The *bound* is the FLOPs of a prefill, counted
while it runs, unpatched / patched, the methods' own scoring included: as fast as it could get if FLOPs were all. Counters
take causal attention for the whole square of pairs; *bound, causal* counts half of it, which is what torch's fused attention
computes without a mask. *Efficiency* is the measured speed-up / the bound.

Random weights spread attention evenly, and which tokens they choose is arbitrary. So how much of the attention a method
computes is a setting here (ZipVL's `tau`, a number of keys, a share of the blocks), and the share that came out is printed.
What the tokens are does not matter to the time: the prompt is random text, as long as a picture's tokens with a question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import vlmaccel
from vlmaccel.evals.bench import DTYPES, first_logits
from vlmaccel.evals.shapes import build, get_shape
from vlmaccel.evals.timing import (
    Clock,
    Measured,
    Spread,
    Timing,
    clock_for,
    machine,
    measure_in_turn,
    peak_memory,
)
from vlmaccel.flops import count_flops
from vlmaccel.hooks import Method
from vlmaccel.kernels.score_rows import score_rows
from vlmaccel.methods import VerticalSlash, ZipVL, make

UNPATCHED, SCORING = "unpatched", "score_rows"
TOKENS = (2992, 8192)  # 2,928 visual ones of a picture of LLaVA-NeXT and 64 of text
TAUS = (0.935, 0.84, 0.68)  # at which random weights compute about 75, 50 and 25 % of the attention
PROBES = 64  # rows of `score_rows` when it is timed on its own
EFFICIENT, CHEAP = 0.8, 0.03  # what ZipVL and `score_rows` should reach


def default_methods(taus: Sequence[float] | None = None) -> list[Method]:
    """ZipVL at every tau, and each of the others once."""
    return [
        *(ZipVL(tau=tau) for tau in taus or TAUS),
        VerticalSlash(vertical=700, slash=100),
        make("block-sparse", mass=0.5),
        make("flexprefill", gamma=0.5, tau=1.0),
    ]


@dataclass(frozen=True)
class Row:
    """A method at a prompt length in a dtype.

    attended: share of the attention that is computed, mean over layers. bound, bound_causal: FLOPs, unpatched / patched.
    speedup: of the prefill, measured; efficiency, efficiency_causal: of the two bounds. choosing: share of the method's prefill
    in which it chooses what to compute. peak: bytes of the prefill's tensors, of the unpatched peak. kv: bytes of the cache
    behind it, of an unpatched one.
    """

    method: str
    attended: float
    bound: float
    bound_causal: float
    speedup: Spread
    choosing: Spread
    kv: float
    peak: float

    @property
    def efficiency(self) -> Spread:
        return over(self.speedup, self.bound)

    @property
    def efficiency_causal(self) -> Spread:
        return over(self.speedup, self.bound_causal)


@dataclass(frozen=True)
class Prefill:
    """All methods at a prompt length in a dtype.

    unpatched: seconds of a prefill by wall clock. flops: of it. peak, kv: bytes of its tensors and of its cache.
    scoring: `score_rows` with 64 rows, as a share of one layer's prefill.
    """

    dtype: str
    tokens: int
    unpatched: Spread
    flops: int
    peak: int
    kv: int
    scoring: Spread
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SparseBench:
    """All prefills of a run."""

    shape: str
    depth: int
    batch: int
    repeats: int
    clock: str
    prefills: tuple[Prefill, ...]
    machine: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        facts = asdict(self)
        for prefill, plain in zip(self.prefills, facts["prefills"], strict=True):
            for row, values in zip(prefill.rows, plain["rows"], strict=True):
                values["efficiency"] = asdict(row.efficiency)
                values["efficiency_causal"] = asdict(row.efficiency_causal)
        return facts


def run_sparse_bench(
    shape: str,
    tokens: Sequence[int] = TOKENS,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    methods: Sequence[Method] | None = None,
    *,
    depth: int = 2,
    batch: int = 1,
    repeats: int = 3,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> SparseBench:
    """Measure the prefill of every prompt length and dtype with every method.

    shape: a name of `vlmaccel.evals.shapes.SHAPES`; of a vision-language model only the decoder works. methods: those with
    `sparse_attention`; None for `default_methods()`.
    Raises ValueError for an unknown shape or dtype, or a method that leaves all of the attention.
    """
    say = progress or (lambda text: None)
    methods = default_methods() if methods is None else methods
    vision = get_shape(shape).vision
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {', '.join(sorted(unknown))}")
    for method in methods:
        if not method.sparse_layers(depth):
            raise ValueError(f"{method!r} has no sparse attention")
    prefills = []
    for dtype in dtypes:
        say(f"building {shape} with {depth} layers in {dtype}")
        model = build(shape, depth, DTYPES[dtype], None if vision is None else 1, device=device)
        for n in tokens:
            work = partial(say_with, say, f"{dtype}, {n:,} tokens")
            prefills.append(_prefill(model, n, dtype, methods, batch, repeats, work))
        facts = machine(model)
    return SparseBench(shape, depth, batch, repeats, clock_for(device), tuple(prefills), facts)


def say_with(say: Callable[[str], None], where: str, what: str) -> None:
    say(f"{where}: {what}")


def _prefill(
    model: PreTrainedModel,
    tokens: int,
    dtype: str,
    methods: Sequence[Method],
    batch: int,
    repeats: int,
    say: Callable[[str], None],
) -> Prefill:
    config = model.config.get_text_config()
    depth, device = config.num_hidden_layers, str(model.device)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size // 2, (batch, tokens), generator=draw).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    forward = lambda: first_logits(model, inputs)  # noqa: E731
    names = {method: repr(method) for method in methods}

    say("memory and FLOPs")
    peak, flops = peak_memory(forward, device), count_flops(forward)
    found = {}
    for method in methods:
        with vlmaccel.patched(model, method):
            found[method] = (peak_memory(forward, device), count_flops(forward), vlmaccel.stats(model))

    watches = {method: Stopwatch(method, device) for method in methods}

    def watched(method: Method) -> Callable[[], dict[str, Timing]]:
        def run() -> dict[str, Timing]:
            with watches[method].running() as watch:
                start = Timing.now(device)
                forward()
                whole = Timing.now(device) - start
            return {"total": whole, "choosing": watch.spent}

        return run

    ways: dict[str, Callable[[], object]] = {UNPATCHED: forward, SCORING: scoring(model, tokens, batch)}
    ways |= {names[method]: watched(method) for method in methods}
    measured = measure_in_turn(
        ways,
        repeats,
        contexts={names[method]: partial(vlmaccel.patched, model, method) for method in methods},
        warmup=0,  # all have run
        device=device,
        progress=lambda way, turn: say(f"turn {turn + 1} of {repeats}, {way.split('(')[0]}"),
    )
    clock = clock_for(device)
    square = attention_flops(config, tokens, batch)
    rows = []
    for method in methods:
        peak_patched, flops_patched, stats = found[method]
        assert isinstance(stats, vlmaccel.Stats)
        attended = sum(stats.attended) / depth
        rows.append(
            Row(
                method=names[method],
                attended=attended,
                bound=flops / flops_patched,
                bound_causal=(flops - square / 2) / (flops_patched - attended * square / 2),
                speedup=measured.speedup(names[method], UNPATCHED, clock=clock),
                choosing=share(measured, names[method], "choosing", clock),
                kv=stats.kv_bytes / stats.kv_bytes_full,
                peak=peak_patched / peak,
            )
        )
        kv = stats.kv_bytes_full
    of_prefill = measured.speedup(UNPATCHED, SCORING, clock=clock)
    return Prefill(
        dtype=dtype,
        tokens=tokens,
        unpatched=measured.time(UNPATCHED),
        flops=flops,
        peak=peak,
        kv=kv,
        scoring=over(of_prefill, 1 / depth),
        rows=tuple(rows),
    )


class Stopwatch:
    """How long a method takes to choose: the time in some of its hooks, which do not call each other."""

    def __init__(self, method: Method, device: str, hooks: Sequence[str] = ("sparse_attention",)) -> None:
        self.method, self.device, self.hooks, self.spent = method, device, hooks, Timing(0, 0)

    @contextmanager
    def running(self) -> Iterator[Stopwatch]:
        """While the model runs."""
        self.spent = Timing(0, 0)
        for name in self.hooks:
            object.__setattr__(self.method, name, self._timed(getattr(self.method, name)))  # methods are frozen
        try:
            yield self
        finally:
            for name in self.hooks:
                object.__delattr__(self.method, name)

    def _timed(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = Timing.now(self.device)
            chosen = choose(*args)
            spent = Timing.now(self.device) - start
            self.spent = Timing(self.spent.wall + spent.wall, self.spent.cpu + spent.cpu)
            return chosen

        return timed


def scoring(model: PreTrainedModel, tokens: int, batch: int) -> Callable[[], object]:
    """`score_rows` as a layer of the model needs it for its last 64 rows; three times, and the time of one."""
    config, device = model.config.get_text_config(), model.device
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads

    def drawn(h: int, n: int) -> Tensor:
        return torch.randn(batch, n, h, dim, device=device, dtype=model.dtype).transpose(1, 2)

    place = torch.arange(tokens, device=device)
    count = min(PROBES, tokens)
    query, key = drawn(heads, count), drawn(kv_heads, tokens)
    row, index = place[-count:].repeat(batch, 1), place.repeat(batch, 1, 1)
    call = lambda: score_rows(query, key, row, index, None, dim**-0.5, 0, "sum")  # noqa: E731
    call()

    def run() -> dict[str, Timing]:
        start = Timing.now(device)
        for _ in range(3):
            call()
        return {"total": (Timing.now(device) - start) / 3}

    return run


def attention_flops(config: Any, tokens: float, batch: int) -> float:
    """Of the attention of a whole prefill, as `count_flops` counts it: every pair, a multiply-add is two."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * batch * config.num_hidden_layers * config.num_attention_heads * dim * tokens**2


def share(measured: Measured, way: str, phase: str, clock: Clock) -> Spread:
    """Of the time of a way that a phase of it takes, turn by turn."""
    phases = measured.seconds[way]
    return Spread.of(
        part.on(clock) / whole.on(clock) for part, whole in zip(phases[phase], phases["total"], strict=True)
    )


def over(spread: Spread, what: float) -> Spread:
    return Spread(spread.median / what, spread.low / what, spread.high / what)


def render(result: SparseBench) -> list[Table | str]:
    """The rows as a table for a terminal, and whether ZipVL and `score_rows` reach what they should."""
    facts = result.machine
    table = Table(
        title=f"prefill of {result.shape}, {result.depth} layers, batch {result.batch}",
        caption=(
            f"Speed-ups by {'processor' if result.clock == 'cpu' else 'wall clock'} time, turn by turn: median "
            f"(smallest..largest) of {result.repeats}. attention: share of the pairs of row and key that is computed. bound: "
            "counted FLOPs, unpatched / patched, with all pairs of causal attention / with half of them; efficiency: speed-up "
            "of these bounds. choosing: share of the method's prefill. peak: tensors of a prefill. "
            f"{facts['name']}, {facts['threads']} threads, load {facts['load']}, torch {facts['torch']}"
        ),
        box=box.SIMPLE_HEAD,
    )
    for column in (
        "dtype",
        "tokens",
        "method",
        "attention",
        "bound",
        "speed-up",
        "efficiency",
        "choosing",
        "KV",
        "peak",
    ):
        table.add_column(column, justify="left" if column in ("dtype", "method") else "right")
    lines = []
    for prefill in result.prefills:
        for number, row in enumerate(prefill.rows):
            first = number == 0
            table.add_row(
                prefill.dtype if first else "",
                f"{prefill.tokens:,}" if first else "",
                short_name(row.method),
                f"{row.attended:.1%}",
                f"{row.bound:.2f} / {row.bound_causal:.2f}x",
                f"[bold]{row.speedup}x[/bold]",
                f"[bold]{row.efficiency.median:.2f}[/bold] / {row.efficiency_causal.median:.2f}",
                f"{row.choosing.median:.1%}",
                f"{row.kv:.1%}",
                f"{row.peak:.0%}",
                end_section=number == len(prefill.rows) - 1,
            )
        where = f"{prefill.dtype}, {prefill.tokens:,} tokens"
        lines.append(
            f"{where}: {prefill.unpatched.median:.3g} s unpatched; score_rows with {PROBES} rows takes "
            f"{prefill.scoring.median:.2%} of a layer's prefill ({_met(prefill.scoring.median <= CHEAP)}: at most {CHEAP:.0%})"
        )
        zipvl = [row.efficiency.median for row in prefill.rows if row.method.startswith("ZipVL")]
        if zipvl:
            lines.append(
                f"{where}: ZipVL's efficiency is at least {min(zipvl):.2f} ({_met(min(zipvl) >= EFFICIENT)}: {EFFICIENT})"
            )
    return [table, *lines]


def _met(yes: bool) -> str:
    return "as it should" if yes else "not as it should"


def short_name(method: str) -> str:
    """Of a method's repr, what tells it from another."""
    name, _, options = method.rstrip(")").partition("(")
    shown = ("tau", "vertical", "slash", "blocks", "mass", "gamma")
    parts = [part for part in options.split(", ") if part.split("=")[0] in shown and not part.endswith("=None")]
    if any(part.startswith("mass=") for part in parts):  # in place of numbers
        parts = [part for part in parts if part.split("=")[0] not in ("vertical", "slash", "blocks")]
    return " ".join([name, *parts])
