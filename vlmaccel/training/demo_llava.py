"""Train the demo's tiny LLaVA from nothing, and measure it.

python -m vlmaccel.training.demo_llava --out DIR         trains, measures, and writes the model card
python -m vlmaccel.training.demo_llava --evaluate DIR    measures a checkpoint again and rewrites its card
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import LlavaForConditionalGeneration

from vlmaccel.training.demo_llava_model import FAMILY, VISUAL_TOKENS, VOCABULARY, build_model, build_processor
from vlmaccel.training.demo_llava_stages import train_binding, train_jointly, train_vision
from vlmaccel.training.demo_measure import (
    DATA_SECTION,
    SEED,
    Results,
    accuracy_section,
    command,
    limits_section,
    measure,
    usage_section,
)
from vlmaccel.training.demo_packing import PACKED
from vlmaccel.training.demo_stages import run_stages

VISION_STEPS, BINDING_STEPS, JOINT_STEPS = 1200, 700, 450


def train(out: Path, work: Path, steps_scale: float = 1.0) -> None:
    """Train stage by stage and save the checkpoint in `out`; a fraction of the steps shows that it runs.

    Each stage leaves its own checkpoint in `work`, and is skipped if that is there.
    """
    processor = build_processor()
    tokenizer = processor.tokenizer
    vision_steps, binding_steps, joint_steps = (
        max(1, round(steps * steps_scale)) for steps in (VISION_STEPS, BINDING_STEPS, JOINT_STEPS)
    )
    stages: dict[str, Callable[[LlavaForConditionalGeneration], None]] = {
        "vision": lambda model: train_vision(model, vision_steps, SEED + 1),
        # as many pictures as steps
        "binding": lambda model: train_binding(model, tokenizer, binding_steps, max(8, binding_steps), SEED + 2),
        "joint": lambda model: train_jointly(model, tokenizer, joint_steps, SEED + 3),
    }
    run_stages(build_model, stages, work, PACKED, SEED).bfloat16().save_pretrained(out)
    processor.save_pretrained(out)


def evaluate(path: Path, pictures: int | None = None, **counts: int) -> Results:
    """Measure a checkpoint on (the first) test pictures; write the numbers and the card next to it.

    counts: `collage_count` and `generated` of `measure`.
    """
    return measure(path, FAMILY, model_card, pictures, **counts)


def model_card(results: Results, parameters: int) -> str:
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
language: en
---

# tiny-llava

A LLaVA of {parameters / 1e6:.2f} million parameters that really answers questions about simple pictures. It
has the parts of LLaVA-1.5 at a size that trains and runs on one CPU core: CLIP vision tower (5 layers x 128,
patch 8, 192 px), {VISUAL_TOKENS} visual tokens, Llama decoder (6 layers x 192). It is there so that methods
which remove, merge or compress visual tokens can be tried out and ranked by accuracy anywhere.

{usage_section("tiny-llava")}

{accuracy_section(results, "demo_llava")}

{limits_section(len(VOCABULARY))}

## Training

From nothing, by `python -m vlmaccel.training.demo_llava --out DIR`:

1. {VISION_STEPS} steps of the vision tower, every patch telling shape and colour of what it shows;
2. {BINDING_STEPS} steps of projector and decoder on frozen features, few visual tokens first;
3. {JOINT_STEPS} steps of everything with all visual tokens.

{DATA_SECTION}
"""


if __name__ == "__main__":
    command(__doc__, train, evaluate)
