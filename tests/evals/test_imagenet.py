import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vlmaccel
from vlmaccel import cli
from vlmaccel.evals import imagenet
from vlmaccel.evals.classifiers import Classifier, load_classifier
from vlmaccel.evals.image_data import read_data
from vlmaccel.evals.imagenet import SWEEP, evaluate, probe, processes, sweep
from vlmaccel.evals.imagenet_report import notes, plot, table
from vlmaccel.evals.imagenet_result import UNPATCHED, Guess, ImageNetResult, Turn
from vlmaccel.evals.timing import Spread, Timing
from vlmaccel.methods import PyramidDrop, ToMe
from vlmaccel.patching import MARK

timm = pytest.importorskip("timm")

SIDE, PATCH, DEPTH, CLASSES, PICTURES = 32, 4, 3, 7, 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven classes of pictures in which every patch looks different, so that merging any two moves the logits."""
    path = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(2)
    for i in range(PICTURES):
        pixels = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        (path / f"class-{i % CLASSES}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path / f"class-{i % CLASSES}" / f"{i}.png")
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    size = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
    cfg = {"input_size": (3, SIDE, SIDE), "num_classes": CLASSES}
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg=cfg, num_classes=CLASSES, **size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # wide, so that attention is far from uniform and no two logits are nearly equal
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2.5 / sqrt(parameter[0].numel()))
    timm.models.save_for_hf(model, str(path), safe_serialization=True)
    return f"timm:local-dir:{path}"


@pytest.fixture(scope="module")
def data(folder):
    return read_data(folder)


@pytest.fixture(scope="module")
def classifier(checkpoint, data):
    return load_classifier(checkpoint, data.classes)


WAYS = sweep(r=(4, 16))


def answers(result):
    return [(guess.id, guess.label, {way: list(top) for way, top in guess.top.items()}) for guess in result.guesses]


@torch.no_grad()
def one_by_one(classifier, data, way):
    """Classes of each picture by falling logit, each alone, on a model patched for all of them."""
    model = classifier.model
    if way.method:
        vlmaccel.patch(model, way.method)
    found = [model(classifier.transform(data.picture(i))[None])[0].argsort(descending=True) for i in range(len(data))]
    vlmaccel.unpatch(model)
    return torch.stack(found)


@pytest.mark.parametrize("size", [1, 4, 17, 32])
def test_every_way_is_what_the_model_says(classifier, data, size):
    result = evaluate(classifier, data, WAYS, size)
    assert [guess.id for guess in result.guesses] == list(data.ids)
    targets = torch.tensor(data.targets)
    base = one_by_one(classifier, data, WAYS[0])
    for way in WAYS:
        expected = one_by_one(classifier, data, way)
        assert [list(guess.top[way.name]) for guess in result.guesses] == expected[:, :5].tolist()
        score = result.score(way.name)
        top1 = (expected[:, 0] == targets).float().mean().item()
        assert score.top1 == pytest.approx(top1)
        assert score.top1_error == pytest.approx(sqrt(top1 * (1 - top1) / PICTURES))
        assert score.top5 == pytest.approx((expected[:, :5] == targets[:, None]).any(1).float().mean().item())
        assert score.loyalty == pytest.approx((expected[:, 0] == base[:, 0]).float().mean().item())
    assert not hasattr(classifier.model, MARK)
    assert len({str(answers(result)[i][2][way.name]) for i in range(PICTURES) for way in WAYS}) > 5
    unpatched, merged = ([guess.top[way.name] for guess in result.guesses] for way in (WAYS[0], WAYS[2]))
    assert unpatched != merged  # the ways really differ


def test_costs(classifier, data):
    costs = probe(classifier, data, WAYS)
    assert UNPATCHED not in costs
    assert costs["tome r=4"].tokens == costs["random r=4"].tokens == (65, 61, 57, 53)
    assert costs["tome r=16"].tokens == (65, 49, 33, 17)
    assert costs["tome r=16"].flops_ratio < costs["tome r=4"].flops_ratio < 1


def spied(classifier, calls):
    """The classifier, and for each call of `logits` the method in place and the first pixel of the batch."""

    def logits(pixels):
        patch = getattr(classifier.model, MARK, None)
        calls.append((repr(patch.methods[0]) if patch else None, len(pixels), pixels[0, 0, 0, 0].item()))
        return classifier.logits(pixels)

    return Classifier(classifier.name, classifier.model, classifier.classes, classifier.transform, logits)


def test_ways_take_turns_on_each_batch_and_rotate(classifier, data):
    calls = []
    evaluate(spied(classifier, calls), data, WAYS, 4)
    calls = calls[len(WAYS) :]  # those of the probe
    n = len(WAYS)
    batches = [calls[i : i + n] for i in range(0, len(calls), n)]
    assert len(batches) == 5
    methods = [repr(way.method) if way.method else None for way in WAYS]
    for i, batch in enumerate(batches):
        assert [name for name, _, _ in batch] == [methods[(i + j) % n] for j in range(n)]
        assert len({pixel for _, _, pixel in batch}) == 1


def test_patching_is_not_timed(classifier, data, monkeypatch):
    """The clock is read twice a way, and only `logits` runs between."""
    events = []
    monkeypatch.setattr(imagenet.Timing, "now", lambda device: events.append("clock") or Timing(0, 0))
    for name in ("patch", "unpatch"):
        real = getattr(vlmaccel.patching, name)
        monkeypatch.setattr(vlmaccel.patching, name, lambda *a, real=real, **k: events.append("patch") or real(*a, **k))
    calls = []
    watched = spied(classifier, calls)
    object.__setattr__(watched, "logits", lambda x, run=watched.logits: events.append("run") or run(x))
    evaluate(watched, data.spread(4), WAYS, 4)
    text = " ".join(events)
    assert text.count("clock run clock") == len(WAYS)
    assert text.count("clock") == 2 * len(WAYS)
    assert "patch clock run clock" in text


def test_timing_counts_full_batches_but_the_first(classifier, data):
    result = evaluate(classifier, data, WAYS, 4)  # 4 full batches and one picture
    assert [turn.pictures for turn in result.turns] == [4, 4, 4]
    assert all(set(turn.seconds) == {way.name for way in WAYS} for turn in result.turns)
    speed = result.speed("tome r=16")
    assert 0 < speed.low <= speed.median <= speed.high
    assert result.speed(UNPATCHED) == Spread(1, 1, 1)
    alone = evaluate(classifier, data, WAYS, 32)
    assert alone.turns == () and alone.speed("tome r=16") is None and alone.images_per_second(UNPATCHED) is None
    assert alone.report()["ways"]["tome r=16"]["speed"] is None


def test_ratios_are_taken_batch_by_batch():
    seconds = [(4.0, 2.0), (2.0, 2.0), (9.0, 3.0)]
    turns = tuple(Turn(8, {UNPATCHED: Timing(9, a), "tome": Timing(4, b)}) for a, b in seconds)
    top = {UNPATCHED: [0, 1], "tome": [1, 0]}
    result = ImageNetResult((Guess("a", 1, top),), dict.fromkeys(top, "tome"), {}, turns, torch.device("cpu"), 1, {})
    assert result.speed("tome") == Spread(2, 1, 3)
    assert result.images_per_second("tome") == Spread(2, 2, 2)
    assert result.score("tome") == (1, 0, 1, 0)
    assert result.score(UNPATCHED) == (0, 0, 1, 1)


class Interrupted(Exception):
    pass


def interrupt_after(count):
    def tick(finished):
        nonlocal count
        count -= finished
        if count <= 0:
            raise Interrupted

    return tick


def test_resume(classifier, data, tmp_path):
    whole = tmp_path / "whole.jsonl"
    expected = evaluate(classifier, data, WAYS, 4, whole)
    out = tmp_path / "results.jsonl"
    with pytest.raises(Interrupted):
        evaluate(classifier, data, WAYS, 4, out, tick=interrupt_after(8))
    assert out.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:9])
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:7]) + lines[7][:20])  # the power went in the middle of the second batch
    ticks, calls = [], []
    resumed = evaluate(spied(classifier, calls), data, WAYS, 4, out, tick=ticks.append)
    assert ticks == [6, 2, 4, 4, 1]
    assert [size for _, size, _ in calls[len(WAYS) :: len(WAYS)]] == [4, 4, 4, 1]  # batches are the same ones
    assert out.read_bytes() == whole.read_bytes()
    assert answers(resumed) == answers(expected)
    assert len(resumed.turns) == 2

    ticks.clear()
    again = evaluate(classifier, data, WAYS, 4, out, tick=ticks.append)
    assert ticks == [17] and answers(again) == answers(expected)
    assert again.costs == expected.costs and again.turns == ()


def test_more_and_fewer_pictures_from_the_same_file(classifier, data, tmp_path):
    out = tmp_path / "results.jsonl"
    assert len(evaluate(classifier, data.spread(6), WAYS, 4, out).guesses) == 6
    whole = evaluate(classifier, data, WAYS, 4, out)
    assert answers(whole) == answers(evaluate(classifier, data, WAYS, 4))
    assert len(out.read_text().splitlines()) == 1 + PICTURES
    assert len(evaluate(classifier, data.spread(3), WAYS, 4, out).guesses) == 3


def test_results_of_other_settings_are_refused(classifier, data, tmp_path):
    out = tmp_path / "results.jsonl"
    evaluate(classifier, data.spread(2), WAYS, 2, out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"was made with tome r=8 None instead of .ToMe\(r=8, .*; name another file"):
        evaluate(classifier, data.spread(2), sweep(r=(8,)), 2, out)
    with pytest.raises(ValueError, match="made with seed None instead of 1"):
        evaluate(classifier, data.spread(2), WAYS, 2, out, settings={"seed": 1})
    out.write_bytes(before.replace(b'"label": 0', b'"label": 3', 1))
    with pytest.raises(ValueError, match=r"the file has another label of class-0/0\.png: 3"):
        evaluate(classifier, data.spread(2), WAYS, 2, out)
    out.write_text('{"vlmaccel eval vqa": {}}\n')
    with pytest.raises(ValueError, match="is not a file of answers"):
        evaluate(classifier, data.spread(2), WAYS, 2, out)


def test_workers_give_the_same(classifier, data):
    assert answers(evaluate(classifier, data, WAYS, 4, workers=2)) == answers(evaluate(classifier, data, WAYS, 4))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_named_in_one_line(checkpoint, folder, tmp_path, workers):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "class-6" / "6.png").write_bytes(b"not a picture")
    ran = run("--model", checkpoint, "--data", str(tmp_path / "data"), "--device", "cpu", "--workers", workers)
    assert ran.exit_code == 2
    assert f"vlmaccel: {tmp_path / 'data'}: cannot read the picture class-6/6.png: " in ran.stderr
    assert "Traceback" not in ran.output


def test_fewer_classes_than_five(data):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    few = Classifier("few", model.eval(), 3, lambda image: torch.zeros(3, 32, 32), model)
    result = evaluate(few, data.spread(2), sweep(r=(1,)), 2)
    assert sorted(result.guesses[0].top[UNPATCHED]) == [0, 1, 2]


def test_sweep():
    names = [(way.name, way.curve, way.method) for way in sweep(r=(2, 8, 2))]
    assert names == [
        ("unpatched", "unpatched", None),
        ("tome r=2", "tome", ToMe(r=2)),
        ("tome r=8", "tome", ToMe(r=8)),
        ("random r=2", "random", ToMe(r=2, match="random")),
        ("random r=8", "random", ToMe(r=8, match="random")),
    ]
    assert [way.method.r for way in sweep()[1:]] == [*SWEEP, *SWEEP]
    assert [way.name for way in sweep(options={"keep": 0.5})] == ["unpatched", "tome keep=0.5", "random keep=0.5"]
    assert [way.name for way in sweep(r=(4,), options={"match": "random"})] == ["unpatched", "tome match=random r=4"]
    assert [way.method for way in sweep("pyramiddrop", options={"ratio": 0.5})] == [None, PyramidDrop(ratio=0.5)]
    with pytest.raises(ValueError, match="r is given twice"):
        sweep(r=(4,), options={"r": 3})
    with pytest.raises(TypeError, match="pyramiddrop has no option r"):
        sweep("pyramiddrop", r=(4,))


def test_methods_that_do_not_fit_are_refused_before_the_work(classifier, data, tmp_path):
    with pytest.raises((ValueError, NotImplementedError)):
        evaluate(classifier, data, sweep("pyramiddrop"), 4, tmp_path / "results.jsonl")
    assert not (tmp_path / "results.jsonl").exists()
    assert not hasattr(classifier.model, MARK)


def test_one_process_by_default():
    state, device = processes("cpu")
    assert (state.num_processes, state.is_main_process, device) == (1, True, torch.device("cpu"))


def rendered(part):
    from rich.console import Console

    console = Console(width=140)
    with console.capture() as capture:
        console.print(part)
    return capture.get()


def test_report(classifier, data):
    result = evaluate(classifier, data, WAYS, 4)
    text = rendered(table(result))
    score, speed = result.score("tome r=16"), result.speed("tome r=16")
    line = next(line for line in text.splitlines() if "tome r=16" in line)
    cells = line.replace("tome r=16", "").split("  ")
    cells = [cell.strip() for cell in cells if cell.strip()]
    assert cells == [
        "17",
        f"{100 * result.costs['tome r=16'].flops_ratio:.1f}",
        f"{100 * score.top1:.2f} ± {100 * score.top1_error:.2f}",
        f"{100 * score.top5:.2f}",
        f"{100 * score.loyalty:.2f}",
        f"{speed.median:.2f}x ({speed.low:.2f}..{speed.high:.2f})",
    ]
    assert re.search(r"unpatched\s+65\s+100\.0 ", text)
    assert "17 pictures of" in text
    assert any("3 batches, in turn, cpu time" in note for note in notes(result))
    report = json.loads(json.dumps(result.report()))
    assert report["pictures"] == PICTURES and report["machine"]["processes"] == 1
    assert report["ways"]["tome r=4"]["tokens"] == [65, 61, 57, 53]


def test_plot(classifier, data):
    result = evaluate(classifier, data, WAYS, 4)
    axes = plot(result).axes[0]
    lines = {tuple(line.get_xdata()): line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 2}
    ratios = tuple(100 * result.costs[name].flops_ratio for name in ("tome r=16", "tome r=4"))
    drawn = [y for x, y in lines.items() if x == pytest.approx(ratios)]
    assert drawn and {text.get_text().split("\n")[0] for text in axes.texts} == {"tome", "random", "unpatched"}


def run(*args):
    return CliRunner().invoke(cli.app, ["eval", "imagenet", *args])


def test_command(checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    args = ["--model", checkpoint, "--data", folder, "--device", "cpu", "--batch-size", "4", "--out", str(out)]
    first = run(*args, "--r", "4,16", "--limit", "9")
    assert first.exit_code == 0, first.output
    assert all(word in first.stdout for word in ("tome r=4", "random r=16", "top-5", "FLOPs", "loyal"))
    assert sorted(path.name for path in out.iterdir()) == ["plot.png", "result.json", "results.jsonl"]
    assert Image.open(out / "plot.png").size[0] > 500
    assert len((out / "results.jsonl").read_text().splitlines()) == 10
    more = run(*args, "--r", "4", "--r", "16")
    assert more.exit_code == 0, more.output
    assert json.loads((out / "result.json").read_text())["pictures"] == PICTURES
    other = run(*args, "--r", "4")
    assert other.exit_code == 2
    assert other.stderr.strip().splitlines()[-1].startswith(f"vlmaccel: {out / 'results.jsonl'} was made with")


def test_command_by_default_measures_what_ships():
    ran = run("--limit", "24", "--r", "8", "--batch-size", "8")
    assert ran.exit_code == 0, ran.output
    assert "tiny-vit, float32, 24 pictures of easy-vqa" in ran.stdout
    assert re.search(r"tome r=8\s+193 ", ran.stdout)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "imagenet"], "unknown data 'imagenet'"),
        (["--model", "./nowhere"], "there is no model directory ./nowhere"),
        (["--data", "easy-vqa"], f"tells {CLASSES} classes apart, but the data has 24"),
        (["--method", "tomme"], "there is no method 'tomme'"),
        (["--r", "4,x"], "--r takes whole numbers, e.g. 4,8, not '4,x'"),
        (["--r", "4", "--option", "keep=0.5"], "give one of r, keep and speedup"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
    ],
)
def test_user_errors_are_one_line(checkpoint, folder, args, message):
    ran = run("--model", checkpoint, "--data", folder, "--device", "cpu", *args)
    assert ran.exit_code == 2
    assert ran.stderr.startswith("vlmaccel: ") and message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1 and "Traceback" not in ran.output


def test_help():
    ran = run("--help")
    assert ran.exit_code == 0 and "accelerate launch" in ran.stdout


def launch(*args):
    # --multi_gpu is what starts several processes: with --cpu, accelerate starts them by mpirun only, or else one
    start = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", *start, "-m", "vlmaccel.cli", "eval", "imagenet", "--device", "cpu", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def without_timing(path):
    report = json.loads(path.read_text())
    ways = {
        name: {k: v for k, v in row.items() if k not in ("speed", "images_per_second")}
        for name, row in report["ways"].items()
    }
    return report["pictures"], report["settings"], ways


@pytest.mark.parametrize("finished", [0, 6])
def test_two_share_the_batches(checkpoint, classifier, data, tmp_path, monkeypatch, finished):
    """As `test_two_processes_give_the_same_as_one`, with threads for processes, which take long to start."""
    here, both, sent = threading.local(), threading.Barrier(2, timeout=60), [[], []]

    def gather(mine):
        sent[here.number] = mine
        both.wait()
        found = [*sent[0], *sent[1]]
        both.wait()  # before anything else is sent
        return found

    def state_of_this(device):
        state = SimpleNamespace(process_index=here.number, num_processes=2, is_main_process=here.number == 0)
        return state, device

    def run_one(number):
        here.number = number
        return evaluate(load_classifier(checkpoint, data.classes), data, WAYS, 2, tmp_path / "two")

    one = evaluate(classifier, data, WAYS, 2, tmp_path / "one")
    lines = (tmp_path / "one").read_text().splitlines(keepends=True)
    if finished:
        (tmp_path / "two").write_text("".join(lines[: 1 + finished]))
    monkeypatch.setattr(imagenet, "processes", state_of_this)
    monkeypatch.setattr(imagenet, "gather_object", gather)
    monkeypatch.setattr(imagenet, "broadcast_object_list", lambda mine: gather(mine)[:1])
    with ThreadPoolExecutor(2) as pool:
        two, nothing = pool.map(run_one, range(2))
    assert nothing is None and two.processes == 2
    assert answers(two) == answers(one)
    assert sorted((tmp_path / "two").read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [0, 6])
def test_two_processes_give_the_same_as_one(checkpoint, folder, tmp_path, finished):
    """17 pictures in batches of 2 are 9 batches: neither divides by two."""
    one, two = tmp_path / "one", tmp_path / "two"
    args = ["--model", checkpoint, "--data", folder, "--r", "4,16", "--batch-size", "2"]
    assert run(*args, "--device", "cpu", "--out", str(one)).exit_code == 0
    lines = (one / "results.jsonl").read_text().splitlines(keepends=True)
    if finished:
        two.mkdir()
        (two / "results.jsonl").write_text("".join(lines[: 1 + finished]) + lines[1 + finished][:9])
    ran = launch(*args, "--out", str(two))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("tome r=16") == 1  # one process prints
    assert json.loads((two / "result.json").read_text())["machine"]["processes"] == 2
    assert sorted((two / "results.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    assert without_timing(two / "result.json") == without_timing(one / "result.json")


@pytest.mark.slow
def test_an_error_ends_all_processes(checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    args = ["--model", checkpoint, "--data", folder, "--batch-size", "2", "--out", str(out), "--limit", "2"]
    assert run(*args, "--r", "4", "--device", "cpu").exit_code == 0
    ran = launch(*args, "--r", "8")
    assert ran.returncode != 0
    assert "results.jsonl was made with" in ran.stderr


@torch.no_grad()
def test_on_the_shipped_pictures_the_likest_merge_costs_nothing_and_random_ones_do():
    pictures = read_data("easy-vqa").spread(110)
    classifier = load_classifier("tiny-vit", pictures.classes, "float32", "cpu")
    result = evaluate(classifier, pictures, sweep("tome", [30], {}), 55)
    unpatched = result.score("unpatched").top1
    assert unpatched >= 0.99
    tome, random = result.score("tome r=30"), result.score("random r=30")
    assert tome.top1 >= unpatched - 0.005
    assert tome.top1 > random.top1
    assert tome.loyalty > random.loyalty
