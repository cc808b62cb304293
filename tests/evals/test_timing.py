import time
from contextlib import contextmanager

import pytest
import torch

from vlmaccel.evals.shapes import build, prompt
from vlmaccel.evals.timing import (
    Measured,
    Spread,
    Timing,
    clock_for,
    machine,
    measure_in_turn,
    peak_memory,
    time_generate,
)


def test_ways_run_in_turn_with_the_switch_outside_the_timed_part(monkeypatch):
    log = []
    monkeypatch.setattr(Timing, "now", lambda device: log.append("clock") or Timing(len(log), 0))

    @contextmanager
    def switch():
        log.append("on")
        yield
        log.append("off")

    found = measure_in_turn(
        {"a": lambda: log.append("a"), "b": lambda: log.append("b")},
        repeats=2,
        contexts={"b": switch},
        progress=lambda name, turn: log.append(turn),
    )
    a, b = ["clock", "a", "clock"], ["on", "clock", "b", "clock", "off"]
    assert log == [x for turn in (-1, 0, 1) for x in (*a, turn, *b, turn)]
    assert found.seconds == {way: {"total": [Timing(2, 0)] * 2} for way in "ab"}


def test_phases_that_a_way_timed_itself():
    turns = iter([Timing(8, 4), Timing(9, 3)])
    found = measure_in_turn(
        {"a": lambda: {"x": next(turns), "y": Timing(1, 1)}, "b": lambda: {"x": Timing(2, 1)}}, 2, warmup=0
    )
    assert found.seconds["a"] == {"x": [Timing(8, 4), Timing(9, 3)], "y": [Timing(1, 1)] * 2}
    assert found.speedup("b", "a", "x") == Spread(4.25, 4.0, 4.5)
    assert found.speedup("b", "a", "x", "cpu") == Spread(3.5, 3.0, 4.0)


def test_ratio_is_taken_turn_by_turn():
    # the machine gets ten times slower from turn to turn
    slower = [Timing(2.0 * 10**i, 1) for i in range(3)]
    faster = [Timing(1.0 * 10**i, 1) for i in range(3)]
    found = Measured({"base": {"total": slower}, "way": {"total": faster}})
    assert found.speedup("way", "base") == Spread(2.0, 2.0, 2.0)
    assert found.time("base") == Spread(20.0, 2.0, 200.0)
    assert str(found.time("base")) == "20 (2..200)"


def test_cpu_clock_ignores_waiting():
    found = measure_in_turn({"sleep": lambda: time.sleep(0.05)}, 1, warmup=0)
    assert found.time("sleep", clock="wall").low >= 0.05 > 0.04 > found.time("sleep", clock="cpu").high
    assert clock_for("cpu") == "cpu" and clock_for(torch.device("cuda", 0)) == "wall"


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llama"])
def test_time_generate_makes_exactly_so_many_tokens(name):
    model = build(name, depth=2, vision_depth=1)
    model.generation_config.eos_token_id = list(range(1, 128))  # would stop at once if it could
    inputs, calls = prompt(model, name, text_tokens=8, batch=2), []
    hook = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    phases = time_generate(model, inputs, new_tokens=5)
    assert len(calls) == 5 and set(phases) == {"prefill", "decode"}
    assert all(t.wall > 0 and t.cpu > 0 for t in phases.values())
    calls.clear()
    assert set(time_generate(model, inputs, new_tokens=1)) == {"prefill"} and len(calls) == 1
    hook.remove()


def test_peak_memory_counts_what_is_alive_together(capfd):
    megabyte, size, small = torch.ones(2**18), 2**20, 1000  # small: the number 2 becomes a tensor too

    def chain():
        x = megabyte * 2
        for _ in range(5):
            x = x * 2  # the old and the new one
        return x

    assert peak_memory(chain) == pytest.approx(2 * size, abs=small)
    assert peak_memory(lambda: [megabyte * 2 for _ in range(5)]) == pytest.approx(5 * size, abs=small)
    assert peak_memory(lambda: megabyte.mul_(2)) < small
    assert capfd.readouterr() == ("", "")


def test_machine():
    facts = machine(build("tiny-llama", depth=1, dtype=torch.bfloat16))
    assert facts["dtype"] == "bfloat16" and facts["attention"] == "sdpa" and facts["device"] == "cpu"
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__ and facts["name"]


def test_errors():
    with pytest.raises(ValueError, match="repeats must be at least 1 and warmup at least 0, not 0 and 1"):
        measure_in_turn({"a": print}, 0)
    with pytest.raises(ValueError, match=r"contexts for \['b'\], but the ways are \['a'\]"):
        measure_in_turn({"a": print}, 1, contexts={"b": contextmanager(lambda: iter(()))})
    with pytest.raises(ValueError, match="new_tokens must be at least 1, not 0"):
        time_generate(build("tiny-llama", depth=1), {}, new_tokens=0)
    with pytest.raises(NotImplementedError, match="cpu and cuda devices, not on meta"):
        peak_memory(print, "meta")
