"""One training step of a patched model, data-parallel: `python -m torch.distributed.run --nproc-per-node N` this file, OUT."""

import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import vlmaccel
from tests.support.models import IMAGE, build

KIND, PICTURE = "llava-clip-llama", 9  # tokens of a picture


def rows(count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Training samples of one picture and an answer of three tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        text = torch.randint(3, 90, (16,), generator=generator)
        ids = torch.cat([text[:4], torch.full((PICTURE,), IMAGE), text[4:]])
        labels = ids.clone()
        labels[:-3] = -100
        found.append({"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, 24, 24, generator=generator)})
    return found


def patched() -> Any:
    model: Any = build(KIND).train()
    model.model.vision_tower.requires_grad_(False)  # whose last block is not used, which DistributedDataParallel minds
    return vlmaccel.patch(model, "pyramiddrop", ratio=0.5)


def step(out: str) -> None:
    """Write the gradients of the whole batch of four, whichever process has which half of it."""
    accelerator = Accelerator(cpu=True)
    model, samples = patched(), rows()
    assert accelerator.num_processes == 2
    loader = DataLoader(samples, batch_size=4 // accelerator.num_processes)
    model, loader = accelerator.prepare(model, loader)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
    plain = accelerator.unwrap_model(model)
    assert vlmaccel.stats(plain).stages
    if accelerator.is_main_process:
        torch.save({name: p.grad for name, p in plain.named_parameters() if p.grad is not None}, out)
    accelerator.end_training()


if __name__ == "__main__":
    step(sys.argv[1])
