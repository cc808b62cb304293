"""What a model is made of and what comes out of it, before and after a patch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.drops import FixedDrop, make_plan, policy

GREEDY = dict(max_new_tokens=6, do_sample=False)
MODELS = ("llama", "mistral-sliding", "llava-clip-llama", "llava-next", "qwen3-vl")


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind: each module's class, attributes, and number of hooks; the configs.

    Compare models that have run before: transformers installs hooks of its own in the first call.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        sizes = {key: len(value) for key, value in vars(module).items() if isinstance(value, dict)}
        found[name] = (type(module), sorted(vars(module)), sizes)
    for part in ("config", "generation_config"):
        found[f"{part} of the model"] = getattr(model, part).to_json_string(use_diff=False)
    return found


def drop(kind: str, batch: dict[str, Tensor], positions: Any = "renumber") -> FixedDrop:
    """The same tokens of `inputs(kind, 3, pad=True)` every time, in two stages."""
    return FixedDrop(make_plan(batch["attention_mask"], (1, 3)), policy(kind, positions))


@torch.no_grad()
def outcome(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the prompt (padding zeroed) and generated tokens."""
    logits = model(**batch).logits
    return logits * batch["attention_mask"][..., None], model.generate(**batch, **GREEDY)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Bit-identical outcomes."""
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
