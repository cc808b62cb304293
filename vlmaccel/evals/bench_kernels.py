"""Every operator against the fastest way in which torch does the same, at shapes of real models, in turn.

On a GPU calls are timed by events, each one with a second-level cache full of something else, and against the *roof*: what
moving the bytes or multiplying the matrices would take at the rates of a large copy and of a large bfloat16 product, which
are measured first. On a CPU the CPU forms are timed, in processor time; the roof is left out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from rich import box
from rich.table import Table

from vlmaccel.evals.bench import DTYPES
from vlmaccel.evals.kernel_cases import (
    OPERATORS,
    Case,
    Draw,
    Work,
    chosen,
    cpu_cases,
    gpu_cases,
    nbytes,
    relative_error,
)
from vlmaccel.evals.timing import Clock, Measured, Spread, Timing, clock_for, hardware, measure_in_turn, peak_memory
from vlmaccel.kernels import dispatch

OURS = "ours"
NO_GPU = (
    "no GPU: the Triton forms have not been measured. `vlmaccel bench kernels --device cpu` times the CPU forms; "
    "`make test-kernels` runs the Triton forms in Triton's interpreter and compiles them for sm_80, sm_90 and gfx942"
)
TURN = 0.05  # seconds that calls of one way take in a turn on a CPU: one call may be too short to time
CACHE = 2**28  # bytes written between calls, more than any second-level cache holds


@dataclass(frozen=True)
class Roof:
    """Measured ceilings of a GPU. copy: bytes a second, read and written. products: FLOPs a second in bfloat16."""

    copy: float
    products: float

    def seconds(self, moved: float, flops: float) -> float:
        """The least that this takes."""
        return max(moved / self.copy, flops / self.products)


@dataclass(frozen=True)
class Row:
    """One operator at one shape in one dtype.

    form: "Triton", "torch" or "CPU": what ran. seconds: of a call, by way; torch: the fastest of torch's ways to the same
    result, None if all failed; ratio: its time by ours, in the same turn. replaces: the fastest way to what the operator
    takes the place of, which is another result, and its ratio. error: root mean square of the difference to torch's result, of
    that of torch's. memory: bytes that a call makes at most, by way. roof: the least seconds by the roof, and whether
    "bytes" or "FLOPs" set them. failed: what a way of torch's said. problem: what the operator said, if it failed.
    """

    operator: str
    shape: str
    dtype: str
    form: str = ""
    seconds: dict[str, Spread] = field(default_factory=dict)
    torch: str | None = None
    ratio: Spread | None = None
    replaces: str | None = None
    replaces_ratio: Spread | None = None
    error: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    roof: tuple[float, str] | None = None
    failed: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def of_roof(self) -> float | None:
        """Share of the roof that is reached."""
        return None if self.roof is None else self.roof[0] / self.seconds[OURS].median


@dataclass(frozen=True)
class KernelBench:
    """All rows of a run."""

    device: str
    clock: Clock
    roof: Roof | None
    rows: tuple[Row, ...]
    machine: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)


def run_kernel_bench(
    device: str = "cuda",
    operators: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    *,
    repeats: int | None = None,
    limit: float | None = None,
    cases: Iterable[Case] | None = None,
    progress: Callable[[str], None] | None = None,
) -> KernelBench:
    """Time every operator, or some, at every shape.

    dtypes: by default bfloat16 on a GPU, float32 and bfloat16 on a CPU. repeats: turns; by default 3 to 30, what fits into a
    third of a second on a GPU, and 3 to 7 on a CPU. limit: seconds after which no further case starts; None for no limit. cases: others
    than those of `vlmaccel.evals.kernel_cases`.
    An operator that fails has its message in its row. Raises ValueError for an unknown operator or dtype, or for a GPU that
    is not there.
    """
    say = progress or (lambda text: None)
    cuda = torch.device(device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(NO_GPU)
    dtypes = dtypes or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {', '.join(sorted(unknown))}")
    todo = chosen((gpu_cases() if cuda else cpu_cases()) if cases is None else cases, operators)
    start = time.monotonic()
    roof = measure_roof(device) if cuda else None
    rows = []
    for case in todo:
        for dtype in dtypes:
            say(f"{case.operator}, {case.shape}, {dtype}")
            if limit is not None and time.monotonic() - start > limit:
                rows.append(Row(case.operator, case.shape, dtype, problem=f"not run: {limit:g} s are over"))
                continue
            rows.append(_row(case, dtype, device, repeats, roof))
            if cuda:
                torch.cuda.empty_cache()
    facts = hardware(device) | {"dtypes": list(dtypes)}
    if find_spec("triton") is not None:
        facts["triton"] = version("triton")
    return KernelBench(device, clock_for(device), roof, tuple(rows), facts)


@torch.no_grad()
def _row(case: Case, dtype: str, device: str, repeats: int | None, roof: Roof | None) -> Row:
    row = Row(case.operator, case.shape, dtype)
    # one operator must not stop the others
    found, problem = attempt(lambda: _measured(row, case.make(Draw(device, DTYPES[dtype])), device, repeats, roof))
    return replace(row, problem=problem) if problem else found


def _measured(row: Row, work: Work, device: str, repeats: int | None, roof: Roof | None) -> Row:
    operator = OPERATORS[row.operator]
    cuda = torch.device(device).type == "cuda"
    form = form_of(row.operator, work.arguments) if cuda else "CPU"
    ours = lambda: operator(*work.arguments)  # noqa: E731
    same, failed = dict(work.torch), {}
    if form == "Triton":
        same["our torch form"] = lambda: without_triton(ours)
    start = Timing.now(device)
    result = ours()
    first = {OURS: (Timing.now(device) - start).wall}
    moved = (nbytes(work.arguments) if work.reads is None else work.reads) + nbytes(result)

    ways: dict[str, Callable[[], object]] = {OURS: ours}
    error = None
    for name, call in {**same, **work.replaces}.items():
        start = Timing.now(device)
        theirs, problem = attempt(call)
        first[name] = (Timing.now(device) - start).wall
        if problem:
            failed[name] = problem
            continue
        ways[name] = call
        if error is None and name in work.torch:
            error = (work.error or relative_error)(result, theirs)
        del theirs
    del result
    memory = peaks(ways, device)
    times = event_times(ways, repeats, device) if cuda else cpu_times(ways, repeats, first)

    clock = clock_for(device)
    seconds = {name: times.time(name, clock=clock) for name in ways}

    def fastest(names: Iterable[str]) -> str | None:
        there = [name for name in names if name in ways]
        return min(there, key=lambda name: seconds[name].median) if there else None

    def ratio(name: str | None) -> Spread | None:
        return None if name is None else times.speedup(OURS, name, clock=clock)

    torchs, replaced = fastest(same), fastest(work.replaces)
    least = None
    if roof:
        by_bytes = moved / roof.copy >= work.flops / roof.products
        least = (roof.seconds(moved, work.flops), "bytes" if by_bytes else "FLOPs")
    return Row(
        row.operator,
        row.shape,
        row.dtype,
        form,
        seconds,
        torchs,
        ratio(torchs),
        replaced,
        ratio(replaced),
        error,
        memory,
        least,
        failed,
    )


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, and nothing; or nothing, and what it raised, as where a mask does not fit into memory."""
    try:
        return call(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def form_of(operator: str, arguments: tuple) -> str:
    """Which form of an operator a GPU runs for these arguments: "Triton" or "torch"."""
    name = f"vlmaccel.kernels.gpu.{operator}"
    if find_spec(name) is None or not dispatch._supported(torch.cuda.current_device()):
        return "torch"
    module = dispatch._triton_form(operator)
    return "Triton" if module is not None and module.fits(*arguments) else "torch"


def without_triton(call: Callable[[], Any]) -> Any:
    """The call with the operators' torch forms on a GPU."""
    supported = dispatch._supported
    dispatch._supported = lambda device: False  # type: ignore[assignment]
    try:
        return call()
    finally:
        dispatch._supported = supported


def peaks(ways: Mapping[str, Callable[[], object]], device: str) -> dict[str, int]:
    """Bytes that a call of each way makes at most."""
    gc.freeze()  # each measurement collects garbage first, and what was there before is none
    try:
        return {name: peak_memory(call, device) for name, call in ways.items()}
    finally:
        gc.unfreeze()


def cpu_times(ways: Mapping[str, Callable[[], object]], repeats: int | None, about: Mapping[str, float]) -> Measured:
    """Time of one call of each way, in turn; short ones run several times a turn. about: seconds that a call took."""

    def often(name: str) -> Callable[[], dict[str, Timing]]:
        times = max(1, int(TURN / max(about[name], 1e-6)))

        def run() -> dict[str, Timing]:
            start = Timing.now()
            for _ in range(times):
                ways[name]()
            return {"total": (Timing.now() - start) / times}

        return run

    repeats = repeats or turns(sum(about[name] for name in ways), 10, 7)
    return measure_in_turn({name: often(name) for name in ways}, repeats, warmup=0)


def turns(whole: float, fit: float, most: int) -> int:
    """How many turns of so many seconds fit into others; from 3 to `most`."""
    return min(most, max(3, int(fit / max(whole, 1e-6))))


def event_times(ways: Mapping[str, Callable[[], object]], repeats: int | None, device: str) -> Measured:
    """Time of one call of each way by CUDA events, in turn, each with a cold cache; they have run before."""
    other = torch.empty(CACHE, dtype=torch.uint8, device=device)

    def once(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        start.record()
        call()
        end.record()
        return start, end

    def milliseconds(events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        torch.cuda.synchronize(device)
        return events[0].elapsed_time(events[1])

    if repeats is None:
        repeats = turns(sum(milliseconds(once(call)) for call in ways.values()) / 1000, 0.3, 30)
    events = [(name, once(call)) for _ in range(repeats) for name, call in ways.items()]
    seconds: dict[str, dict[str, list[Timing]]] = {name: {"total": []} for name in ways}
    for name, pair in events:
        spent = milliseconds(pair) / 1000
        seconds[name]["total"].append(Timing(spent, spent))
    return Measured(seconds)


def measure_roof(device: str) -> Roof:
    """Of a copy of a gibibyte, and of an 8192 x 8192 x 8192 product in bfloat16."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    ways = {"copy": lambda: target.copy_(source), "products": lambda: a @ b}
    for call in ways.values():
        call()
    times = event_times(ways, 10, device)
    copy, products = (times.time(name).median for name in ways)
    return Roof(2 * 2**30 / copy, 2 * 8192**3 / products)


def render(result: KernelBench) -> list[Table | str]:
    """The rows as a table for a terminal, and what failed."""
    facts, cuda = result.machine, result.roof is not None
    caption = (
        f"Median ms of a call by {'CUDA events, cold cache' if cuda else 'processor time'}; speed-ups of ours turn by turn. "
        "torch's best: the fastest of its ways to the same result; replaced: against what the operator takes the place of, "
        "with another result. error: rms of the difference to torch's result, of that of torch's. MiB: the most that a call "
        f"makes, ours / torch's best. {facts['name']}, torch {facts['torch']}, "
    )
    if result.roof:
        caption += (
            f"triton {facts.get('triton', 'none')}. roof: share of what a copy of {result.roof.copy / 1e12:.2f} TB/s (b) or "
            f"a bfloat16 product of {result.roof.products / 1e12:.0f} TFLOP/s (F) would let expect"
        )
    else:
        caption += f"{facts['threads']} threads, load {facts['load']}"
    table = Table(title="operators", caption=caption, box=box.SIMPLE_HEAD)
    columns = ["operator", "dtype", "ms", "torch's best", "ms", "speed-up", "replaced", "error", "MiB"]
    for column in [*columns, *(["roof"] if cuda else [])]:
        table.add_column(column, justify="left" if column in ("operator", "dtype", "torch's best") else "right")
    before = None
    for row in result.rows:
        if row.operator != before:
            replaced = next((r.replaces for r in result.rows if r.operator == row.operator and r.replaces), None)
            table.add_row(f"[bold]{row.operator}[/bold]" + (f", replaced: {replaced}" if replaced else ""))
            before = row.operator
        torch_form = ", torch form" if row.form == "torch" else ""
        cells = [f"  {row.shape}{torch_form}", row.dtype.replace("float", "f").replace("bff", "bf")]
        if row.problem:
            table.add_row(*cells, "", f"[bold red]{_plain(row.problem[:60])}[/bold red]")
            continue
        cells.append(_number(1e3 * row.seconds[OURS].median))
        if row.torch and row.ratio:
            cells += [row.torch, _number(1e3 * row.seconds[row.torch].median), f"[bold]{row.ratio.median:.2f}x[/bold]"]
        else:
            cells += ["", "", ""]
        cells.append(f"{row.replaces_ratio.median:.2f}x" if row.replaces_ratio else "")
        cells.append("" if row.error is None else f"{row.error:.1e}")
        cells.append(" / ".join(_number(row.memory[way] / 2**20) for way in (OURS, row.torch) if way in row.memory))
        if row.roof and row.of_roof is not None:
            cells.append(f"{row.of_roof:.0%} {row.roof[1][0]}")
        table.add_row(*cells)
    broken = [f"{r.operator}, {r.shape}, {r.dtype}: {r.problem}" for r in result.rows if len(r.problem or "") > 60]
    failed = {f"{row.operator}, {row.shape}: {way}: {text}" for row in result.rows for way, text in row.failed.items()}
    return [table, *map(_plain, broken), *(f"torch's way failed: {_plain(text)}" for text in sorted(failed))]


def _number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def _plain(text: str) -> str:
    """Not read as rich's markup."""
    return text.replace("[", r"\[")
