"""Trains Victor's registers (arXiv 2410.14072): alone, with LoRA, or with the whole language model; and, without registers, a model to
bear any other method.

    from vlmaccel.training.registers import train_registers
    train_registers(model, processor, source("collage"), validation, Path("out"))
    vlmaccel.patch(model, "victor", registers="out/registers.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from vlmaccel.adapters.base import Parts, find_adapter
from vlmaccel.hooks import Method
from vlmaccel.methods.registers import check_registers
from vlmaccel.methods.selection import check_choice
from vlmaccel.methods.victor import Victor, save_registers
from vlmaccel.training.distillation import Distillation
from vlmaccel.training.fitting import Log, Schedule, Trainee, fit
from vlmaccel.training.questions import Dialogue, Packer, Source

Train = Literal["registers", "lora", "all"]
REGISTERS = "registers.safetensors"
RANK = 16  # of LoRA, with alpha twice that


def train_registers(
    model: Any,
    processor: Any,
    draw: Source,
    validation: Sequence[Dialogue],
    folder: Path,
    registers: int = 8,
    layer: int | None = None,
    train: Train = "registers",
    schedule: Schedule | None = None,
    tick: Callable[[int], object] = lambda count: None,
) -> Log:
    """Train registers of a model, and write them to `registers.safetensors` in `folder`; returns what was measured, see `fit`.

    model: a vision-language model that is not patched, changed in place by "lora" and "all". draw, validation: see `source` and `fit`.
    registers: M, default 8 as in the paper's main result. layer: of `Victor`; default 3 of 32, in proportion.
    train: "registers" (default), nothing else; "lora", low-rank matrices in all linear layers of the language model too
        (needs peft), written to `adapter`; "all", the whole language model too, written to `model`. Vision tower and projector stay.
    schedule: default `Schedule()`, with "all" one without distillation. The teacher is the model unpatched, with "lora" without that;
        but with "all" it is what the weights have become at the moment, and nothing holds it: the loss may rise.
    Raises ValueError for a value that is not allowed, NotImplementedError for a model that cannot be trained so.
    """
    check_registers("registers", registers)
    parts = decoder(model)
    embeddings = model.get_input_embeddings().weight
    learned = nn.Parameter(start(registers, embeddings.detach()))
    victor = Victor(learned, layer)
    layer = victor.first(len(parts.layers))
    weights, teacher, write = trained_weights(model, processor, parts, train)
    trainee = Trainee(model, (Victor(learned, layer),), {"registers": learned, **weights}, **teacher)
    facts = {"registers": registers, "layer": layer, "train": train}
    schedule = schedule or Schedule(distillation=Distillation(forward=float(train != "all")))
    log = fit(trainee, draw, Packer(model, processor), validation, schedule, folder, facts, tick)
    save_registers(folder / REGISTERS, learned, layer, parts.base.config.model_type)
    write(folder)
    return log


def train_patched(
    model: Any,
    processor: Any,
    draw: Source,
    validation: Sequence[Dialogue],
    folder: Path,
    methods: Sequence[Method],
    train: Train = "lora",
    schedule: Schedule | None = None,
    tick: Callable[[int], object] = lambda count: None,
) -> Log:
    """Train a model to answer under `methods` as it does without them; as `train_registers`, with nothing to learn but weights.

    schedule: default distillation alone, from the model unpatched (and without "lora").
    """
    if train == "registers":
        raise ValueError("registers are trained by `train registers`; train must be 'lora' or 'all' here")
    weights, teacher, write = trained_weights(model, processor, decoder(model), train)
    trainee = Trainee(model, tuple(methods), weights, **teacher)
    facts = {"methods": repr(tuple(methods)), "train": train}
    schedule = schedule or Schedule(answers=0.0, rate=1e-4)
    log = fit(trainee, draw, Packer(model, processor), validation, schedule, folder, facts, tick)
    write(folder)
    return log


def decoder(model: Any) -> Parts:
    """The parts of a model's decoder."""
    parts = find_adapter(model).parts(model)
    if parts is None or not find_adapter(model).multimodal:
        raise NotImplementedError(f"{type(model).__name__} is no vision-language model")
    return parts


def start(count: int, embeddings: torch.Tensor) -> torch.Tensor:
    """(count, D) float32 registers to begin with: noise of the embeddings' own size."""
    noise = torch.randn(count, embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    return (noise * embeddings.float().std().cpu()).to(embeddings.device)


def trained_weights(
    model: Any, processor: Any, parts: Parts, train: Train
) -> tuple[Mapping[str, nn.Parameter], dict[str, Any], Callable[[Path], object]]:
    """What of the model's weights is trained, how it becomes the teacher, and what writes it into a folder."""
    check_choice("train", train, get_args(Train))
    if train == "registers":
        return {}, {}, lambda folder: None
    if train == "lora":
        return lora(model, processor, parts)
    mine = {id(p) for module in (parts.text, model.get_output_embeddings()) for p in module.parameters()}
    weights = {name: p for name, p in model.named_parameters() if id(p) in mine}

    def write(folder: Path) -> None:
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")

    return weights, {}, write


def lora(
    model: Any, processor: Any, parts: Parts
) -> tuple[Mapping[str, nn.Parameter], dict[str, Any], Callable[[Path], object]]:
    """The same for LoRA (Hu et al., arXiv 2106.09685) of rank `RANK`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('training with LoRA needs peft: pip install "vlmaccel[train]"') from error
    linear = {id(module) for module in parts.layers.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in linear]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}

    def write(folder: Path) -> None:
        wrapped.save_pretrained(str(folder / "adapter"))
        processor.save_pretrained(folder / "adapter")  # so that it loads like a model

    return weights, {"teacher": wrapped.disable_adapter}, write
