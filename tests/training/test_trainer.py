"""Patched models train with what people train with: Trainer, bfloat16 autocast, LoRA, several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

import vlmaccel
from tests.support.models import build
from tests.support.train_two import KIND, patched, rows
from vlmaccel.methods import PyramidDrop, ToMe, Victor

METHODS = {
    "pyramiddrop": lambda model: PyramidDrop(ratio=0.5),
    "tome": lambda model: ToMe(r=2, after="carry"),
    "victor": lambda model: Victor(nn.Parameter(torch.randn(3, model.config.text_config.hidden_size)), layer=1),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_trainer(name, bf16, checkpointing, tmp_path):
    model = build(KIND)
    vlmaccel.patch(model, METHODS[name](model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    stats = vlmaccel.stats(model)
    assert stats.stages or stats.tower.stages
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert any("language_model" in key for key in changed) and any("projector" in key for key in changed)
    vlmaccel.unpatch(model)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora_learns_through_a_patched_decoder(first):
    peft = pytest.importorskip("peft", reason="LoRA needs pip install peft")
    model = build(KIND)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if first == "patch":
        vlmaccel.patch(model, "pyramiddrop", ratio=0.5)
    wrapped = peft.get_peft_model(model, config).train()
    if first == "lora":
        vlmaccel.patch(model, "pyramiddrop", ratio=0.5)
    wrapped(**{key: torch.stack([row[key] for row in rows(2)]) for key in rows(1)[0]}).loss.backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)
    late = [name for name in gradients if "language_model.layers.5" in name]
    assert late and all(gradients[name].abs().sum() > 0 for name in late)
    assert vlmaccel.stats(model).stages


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def alone(tmp_path):
    """A group of one process, this one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_data_parallel_training_makes_the_same_gradients(alone):
    """What needs no second process: those of `test_two_processes_make_the_gradients_of_one` take long to start."""
    plain, parallel, batch = patched(), DistributedDataParallel(patched()), default_collate(rows())
    for model in (plain, parallel):
        model(**batch).loss.backward()
    expected, found = gradients_of(plain), gradients_of(parallel.module)
    assert found.keys() == expected.keys() and vlmaccel.stats(parallel.module).stages
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.slow
def test_two_processes_make_the_gradients_of_one(tmp_path):
    script, out = Path(__file__).parent.parent / "support" / "train_two.py", tmp_path / "two.pt"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    model = patched()
    model(**default_collate(rows())).loss.backward()
    one, two = gradients_of(model), torch.load(out)
    assert one.keys() == two.keys() and any(gradient.abs().sum() > 0 for gradient in one.values())
    for name, gradient in one.items():
        assert torch.allclose(two[name], gradient, atol=1e-6), name
