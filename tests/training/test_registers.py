"""Training a patched model: what is trained and what is not, resuming, files, the commands."""

import json
import random
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import vlmaccel
from tests.support.tiny_vqa import tiny_llava
from vlmaccel.cli import app
from vlmaccel.evals.easy_vqa import collages
from vlmaccel.evals.vqa import load
from vlmaccel.methods import PyramidDrop, Victor
from vlmaccel.methods.victor import load_registers
from vlmaccel.training.distillation import Distillation
from vlmaccel.training.fitting import CHECKPOINT, Schedule, Trainee, accuracy, batch_loss
from vlmaccel.training.questions import Packer, dialogues, source
from vlmaccel.training.registers import REGISTERS, train_patched, train_registers

SCHEDULE = Schedule(steps=4, pictures=2, questions=3, rate=1e-2, warm_up=1, every=2)
DRAW = source("collage")


@pytest.fixture(scope="module")
def validation():
    return dialogues(collages("test", images=2, questions=4))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llava")
    for part in tiny_llava():
        part.save_pretrained(folder)
    return str(folder)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("train", ["registers", "all"])
def test_what_is_trained_and_what_is_not(train, validation, tmp_path):
    model, processor = tiny_llava()
    before = weights(model)
    log = train_registers(model, processor, DRAW, validation, tmp_path, 3, 2, train, SCHEDULE)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    if train == "registers":
        assert not changed
    else:
        assert changed and all("language_model" in name or "lm_head" in name for name in changed)
        assert any(".layers.3." in name for name in changed) and any(".layers.0." in name for name in changed)
    assert not model.training and all(
        p.requires_grad and p.grad is None for n, p in model.named_parameters() if n not in changed
    )
    with pytest.raises(RuntimeError, match="not patched"):
        vlmaccel.stats(model)
    registers, facts = load_registers(tmp_path / REGISTERS)
    assert registers.shape == (3, 32) and facts["layer"] == "2" and facts["model_type"] == "llava"
    assert [row["step"] for row in log] == [0, 2, 4]
    vlmaccel.patch(model, "victor", registers=tmp_path / REGISTERS)
    found = accuracy(
        Trainee(vlmaccel.unpatch(model), (Victor(tmp_path / REGISTERS),), {}), Packer(model, processor), validation
    )
    assert found == log[-1]["accuracy"]
    if train == "all":
        again = type(model).from_pretrained(tmp_path / "model")
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in again.named_parameters())


class Ticks:
    """Interrupts a training after so many steps."""

    def __init__(self, stop):
        self.stop, self.seen = stop, 0

    def __call__(self, count):
        self.seen += count
        if self.seen == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("train", ["registers", "lora", "all"])
def test_an_interrupted_training_ends_as_one_that_was_not(train, validation, tmp_path):
    if train == "lora":
        pytest.importorskip("peft")
    ends = []
    for folder, stops in (("whole", [None]), ("parts", [3, None])):
        for stop in stops:
            model, processor = tiny_llava()
            ticks = Ticks(stop)
            args = model, processor, DRAW, validation, tmp_path / folder, 3, 2, train, SCHEDULE, ticks
            if stop is None:
                log = train_registers(*args)
            else:
                with pytest.raises(KeyboardInterrupt):
                    train_registers(*args)
                assert (tmp_path / folder / CHECKPOINT).exists() and not (tmp_path / folder / REGISTERS).exists()
        ends.append((log, load_registers(tmp_path / folder / REGISTERS)[0], weights(model)))
    (log, registers, model), (log_again, registers_again, model_again) = ends
    assert log == log_again
    assert torch.equal(registers, registers_again)
    assert all(torch.equal(p, model_again[name]) for name, p in model.items())


def test_another_schedule_does_not_go_on(validation, tmp_path):
    model, processor = tiny_llava()
    train_registers(model, processor, DRAW, validation, tmp_path, 3, 2, "registers", SCHEDULE)
    with pytest.raises(ValueError, match="is of a training with rate=0.01, registers=3"):
        train_registers(model, processor, DRAW, validation, tmp_path, 4, 2, "registers", replace(SCHEDULE, rate=0.1))


def test_the_loss_falls_where_there_is_something_to_learn(validation, tmp_path):
    model, processor = tiny_llava()
    schedule = replace(SCHEDULE, steps=30, every=10, answers=1.0, distillation=Distillation(0.0), rate=1e-2)
    log = train_registers(model, processor, DRAW, validation, tmp_path, 3, 2, "all", schedule)
    losses = [row["loss"] for row in log[1:]]
    assert losses[-1] < 0.8 * losses[0]


def test_the_teacher_is_the_model_unpatched(validation):
    model, processor = tiny_llava()
    learned = torch.nn.Parameter(torch.randn(3, 32))
    trainee = Trainee(model, (Victor(learned, 2),), {"registers": learned})
    batch = Packer(model, processor)(validation)
    schedule = replace(SCHEDULE, answers=0.0)
    loss = batch_loss(trainee, batch, schedule)
    with torch.no_grad():
        teacher = model(**batch.inputs).logits
        with vlmaccel.patched(model, Victor(learned, 2)):
            student = model(**batch.inputs).logits
    expected = Distillation().loss(student, teacher, batch.labels, batch.question)
    assert torch.allclose(loss, expected, atol=1e-6) and loss > 0
    loss.backward()
    assert (learned.grad.abs().amax(1) > 0).all()
    nothing = Trainee(model, (PyramidDrop(ratio=1.0),), {})
    assert batch_loss(nothing, batch, schedule).abs() < 1e-6


def test_a_model_learns_to_bear_a_method(validation, tmp_path):
    model, processor = tiny_llava()
    method = PyramidDrop(ratio=0.2, layers=(1, 2))
    schedule = replace(SCHEDULE, steps=16, every=8, answers=0.0, rate=1e-2)
    log = train_patched(model, processor, DRAW, validation, tmp_path, [method], "all", schedule)
    assert log[-1]["loss"] < log[1]["loss"]
    assert (tmp_path / "model" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="train must be 'lora' or 'all'"):
        train_patched(model, processor, DRAW, validation, tmp_path, [method], "registers", schedule)


def test_lora(validation, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = tiny_llava()
    before = weights(model)
    train_registers(model, processor, DRAW, validation, tmp_path, 3, 2, "lora", SCHEDULE)
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert any("lora_B" in name and bool(p.any()) for name, p in after.items())
    batch = Packer(model, processor)(validation)
    fresh, _ = tiny_llava()
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").get_base_model().eval()
    victor = Victor(tmp_path / REGISTERS)
    with torch.no_grad(), vlmaccel.patched(model.eval(), victor), vlmaccel.patched(again, victor):
        assert torch.allclose(again(**batch.inputs).logits, model(**batch.inputs).logits, atol=1e-6)


def test_what_lora_wrote_loads_like_a_model(checkpoint, validation, tmp_path):
    pytest.importorskip("peft")
    model, processor = load(checkpoint, "float32")
    train_registers(model, processor, DRAW, validation, tmp_path, 3, 2, "lora", SCHEDULE)
    again, its_processor = load(str(tmp_path / "adapter"), "float32")
    batch, victor = Packer(again, its_processor)(validation), Victor(tmp_path / REGISTERS)
    with torch.no_grad(), vlmaccel.patched(model.eval(), victor), vlmaccel.patched(again, victor):
        assert torch.allclose(again(**batch.inputs).logits, model(**batch.inputs).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is a whole number, 1 or more, not 0"),
        ({"pictures": 1.5}, "pictures is a whole number"),
        ({"rate": 0}, "rate is a learning rate, more than 0, not 0"),
        ({"answers": -1}, "answers weighs the cross entropy"),
        ({"answers": 0, "distillation": Distillation(0.0)}, "nothing to learn from"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def test_bad_wishes_leave_the_model_usable(validation, tmp_path):
    model, processor = tiny_llava()
    batch = Packer(model, processor)(validation)
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        for options in ({"registers": 0}, {"layer": 0}, {"layer": 9}, {"train": "some"}):
            with pytest.raises(ValueError, match=r"registers is|layer is|acts at decoder layer 9|train must be"):
                train_registers(model, processor, DRAW, validation, tmp_path, **options, schedule=SCHEDULE)
        assert torch.equal(model(**batch.inputs).logits, plain)


def test_batches_of_a_step_depend_on_seed_and_number_only():
    first, again = (DRAW(random.Random("3/17"), 2, 3) for _ in range(2))
    assert [a.questions for a in first] == [b.questions for b in again]


def test_the_commands(checkpoint, tmp_path):
    common = [
        "--model",
        checkpoint,
        "--steps",
        "2",
        "--pictures",
        "2",
        "--questions",
        "2",
        "--every",
        "1",
        "--limit",
        "4",
    ]
    out = str(tmp_path / "registers")
    ran = CliRunner().invoke(app, ["train", "registers", "--registers", "3", "--layer", "2", "--out", out, *common])
    assert ran.exit_code == 0, ran.output
    assert "unpatched" in ran.stdout
    log = json.loads((tmp_path / "registers" / "log.json").read_text())
    assert [row["step"] for row in log["log"]] == [0, 1, 2]
    assert (tmp_path / "registers" / "curves.png").stat().st_size > 1000
    file = tmp_path / "registers" / REGISTERS
    asked = ["--model", checkpoint, "--data", "collage", "--limit", "2", "--max-new-tokens", "1"]
    ran = CliRunner().invoke(app, ["eval", "vqa", *asked, "--method", "victor", "--option", f"registers={file}"])
    assert ran.exit_code == 0, ran.output
    method = ["--method", "pyramiddrop:ratio=0.3", "--train", "all"]
    ran = CliRunner().invoke(app, ["train", "distill", *method, "--out", str(tmp_path / "distill"), *common])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "distill" / "model").is_dir()
    ran = CliRunner().invoke(app, ["train", "registers", "--out", out, *common, "--data", "other.jsonl"])
    assert ran.exit_code == 2 and "--validation: name questions" in ran.stderr
