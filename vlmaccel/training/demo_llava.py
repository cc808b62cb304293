"""Train the demo's tiny LLaVA from nothing, and measure it.

python -m vlmaccel.training.demo_llava --out DIR         trains, measures, and writes the model card
python -m vlmaccel.training.demo_llava --evaluate DIR    measures a checkpoint again and rewrites its card
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlmaccel.evals.easy_vqa import collages, easy_vqa
from vlmaccel.evals.samples import VQASample
from vlmaccel.training.demo_llava_model import (
    PACKED,
    VISUAL_TOKENS,
    VOCABULARY,
    answer_logits,
    build_model,
    build_processor,
    pack,
)
from vlmaccel.training.demo_llava_stages import train_binding, train_jointly, train_vision

SEED = 0
VISION_STEPS, BINDING_STEPS, JOINT_STEPS = 1200, 700, 450
COLLAGES, QUESTIONS_EACH = 250, 10
GENERATED = 60

Results = dict[str, dict[str, dict[str, float]]]


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
    torch.manual_seed(SEED)
    model = build_model()
    for name, stage in stages.items():
        if not (work / name).exists():
            torch.manual_seed(SEED)
            model.set_attn_implementation(PACKED)
            stage(model)
            model.save_pretrained(work / name)
        model = LlavaForConditionalGeneration.from_pretrained(work / name, dtype=torch.float32)
    model.bfloat16().save_pretrained(out)
    processor.save_pretrained(out)


def evaluate(
    path: Path, pictures: int | None = None, collage_count: int = COLLAGES, generated: int = GENERATED
) -> Results:
    """Measure a checkpoint on (the first) test pictures; write the numbers and the card next to it."""
    single = easy_vqa("test")
    if pictures is not None:
        image_ids = list(dict.fromkeys(sample.image_id for sample in single))[:pictures]
        single = [sample for sample in single if sample.image_id in image_ids]
    collage = collages("test", collage_count, QUESTIONS_EACH)
    processor = AutoProcessor.from_pretrained(path)
    # The weights are bf16 numbers, but not every CPU computes fast in bf16.
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation=PACKED)
    right = grade(model, processor, [*single, *collage])
    results: Results = {
        "easy-vqa": accuracies(single, right),
        "collage": accuracies(collage, right),
        "describe, by word": {
            "describe": rate([word for s in collage if s.kind == "describe" for word in right[s.id][:-1]])
        },
        "generate": {"agreement": generate_agreement(path, processor, [*single, *collage], right, generated)},
    }
    (path / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n")
    (path / "README.md").write_text(model_card(results, model.num_parameters()))
    return results


@torch.no_grad()
def grade(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: list[VQASample]
) -> dict[str, list[bool]]:
    """By sample id: which tokens of the answer, end token last, the model predicts given those before.

    All of them right is the same as the right answer from greedy decoding. All questions about a picture go
    through the model at once, which is several times as fast as one prompt each and gives the same.
    """
    by_picture = defaultdict(list)
    for sample in samples:
        by_picture[sample.image_id].append(sample)
    positions = torch.arange(VISUAL_TOKENS)[None]
    right: dict[str, list[bool]] = {}
    for group in tqdm(by_picture.values(), desc="evaluating", unit="picture"):
        pixels = processor.image_processor(group[0].image, return_tensors="pt")["pixel_values"]
        visual = model.model.get_image_features(pixels).pooler_output[0]
        packed = pack(processor.tokenizer, [[(s.question, s.answers[0]) for s in group]], positions)
        logits, labels = answer_logits(model, visual[None], packed)
        tokens = (logits.argmax(-1) == labels).split(packed.lengths)
        right |= {sample.id: row.tolist() for sample, row in zip(group, tokens, strict=True)}
    return right


def generate_agreement(
    path: Path, processor: LlavaProcessor, samples: list[VQASample], right: dict[str, list[bool]], count: int
) -> dict[str, float]:
    """How often `grade` is confirmed by `generate` in bf16, one prompt at a time."""
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16)
    # half of them collages, which are far fewer
    easy, hard = ([s for s in samples if s.image_id.startswith(task)] for task in ("easy-vqa", "collage"))
    rng = random.Random(SEED)
    agree = []
    for sample in tqdm(rng.sample(easy, count // 2) + rng.sample(hard, count - count // 2), desc="generate"):
        answer = generate(model, processor, sample)
        agree.append((answer == sample.answers[0]) == all(right[sample.id]))
    return rate(agree)


def generate(model: LlavaForConditionalGeneration, processor: LlavaProcessor, sample: VQASample) -> str:
    """The model's answer, obtained the way any LLaVA is used."""
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    messages: list[Any] = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=sample.image, text=prompt, return_tensors="pt").to(model.device, model.dtype)
    output = model.generate(**inputs)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracies(samples: list[VQASample], right: dict[str, list[bool]]) -> dict[str, dict[str, float]]:
    """The share of answers that are right from end to end, of all questions and by kind."""
    exact = defaultdict(list)
    for sample in samples:
        exact["all"].append(all(right[sample.id]))
        exact[sample.kind].append(all(right[sample.id]))
    return {kind: rate(values) for kind, values in exact.items()}


def rate(values: list[bool]) -> dict[str, float]:
    return {"accuracy": sum(values) / max(1, len(values)), "count": len(values)}


def model_card(results: Results, parameters: int) -> str:
    def table(measured: dict[str, dict[str, float]], of: str) -> str:
        rows = [f"| {kind} | {r['accuracy']:.2%} | {r['count']} |" for kind, r in measured.items()]
        return "\n".join([f"| {of} | exactly right | questions |", "|---|---|---|", *rows])

    words = results["describe, by word"]["describe"]
    agreement = results["generate"]["agreement"]
    agreed = round(agreement["accuracy"] * agreement["count"])
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

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("vlmaccel/assets/tiny-llava")
processor = AutoProcessor.from_pretrained("vlmaccel/assets/tiny-llava")
content = [{{"type": "image"}}, {{"type": "text", "text": "what is the blue shape?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.dtype)
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```

## Accuracy

Measured by `python -m vlmaccel.training.demo_llava --evaluate` on test pictures. An answer counts if it is
right from end to end, the end token included. Weights in bf16, arithmetic in float32.

easy-VQA, test split: one shape a picture, enlarged to 192 px.

{table(results["easy-vqa"], "easy-VQA")}

Collages: 3-8 test pictures in a 3x3 grid (`vlmaccel.evals.easy_vqa.collages`).

{table(results["collage"], "collage")}

Of the single words of the `describe` answers, {words["accuracy"]:.2%} of {words["count"]} are right.

These numbers come from all questions about a picture in one pass. `generate()` in bf16 through the saved
processor, one prompt at a time, confirms them for {agreed} of {agreement["count"]} questions.

## What it is not

- Not a general model: its vocabulary is {len(VOCABULARY)} tokens, and it knows the questions of these two
  tasks only.
- Not a stand-in for a large model's numbers. In training, its decoder first saw a part of the visual tokens
  (at their own positions), so it may be more robust to token removal than a real vision-language model.
- Plain easy-VQA hardly tells methods apart: with one large object even random removal of most tokens costs
  little. Rank them on the collages, above all on `color-of-shape` and `describe`.
- A decoder of 6 layers may have read the answer out of the visual tokens after two of them, so removal from
  there on can look cheaper than it is in a large model.

## Training

From nothing, by `python -m vlmaccel.training.demo_llava --out DIR`:

1. {VISION_STEPS} steps of the vision tower, every patch telling shape and colour of what it shows;
2. {BINDING_STEPS} steps of projector and decoder on frozen features, few visual tokens first;
3. {JOINT_STEPS} steps of everything with all visual tokens.

## Data and licence

Pictures and questions: [easy-VQA](https://github.com/vzhou842/easy-VQA) by Victor Zhou, the PyPI package
`easy-vqa` (MIT), train split for training, test split for the numbers above. The collages are made of its
pictures and ask in its question templates. The weights are under Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="train, and write the checkpoint there")
    task.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the checkpoint that is there")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where stages are kept (default: OUT-stages)")
    args = parser.parse_args()
    if args.out:
        train(args.out, args.work or args.out.with_name(f"{args.out.name}-stages"))
    print(json.dumps(evaluate(args.out or args.evaluate), indent=2))


if __name__ == "__main__":
    main()
