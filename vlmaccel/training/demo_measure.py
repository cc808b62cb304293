"""How the demo's vision-language models are measured, and what their model cards say about it."""

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
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmaccel.evals.easy_vqa import collages, easy_vqa
from vlmaccel.evals.samples import VQASample
from vlmaccel.training.demo_packing import PACKED, answer_logits, pack
from vlmaccel.training.demo_stages import Family

SEED = 0
COLLAGES, QUESTIONS_EACH = 250, 10
GENERATED = 60

Results = dict[str, dict[str, dict[str, float]]]


def measure(
    path: Path,
    family: Family,
    card: Callable[[Results, int], str],
    pictures: int | None = None,
    collage_count: int = COLLAGES,
    generated: int = GENERATED,
) -> Results:
    """Measure a checkpoint on (the first) test pictures; write the numbers and the card next to it.

    card: makes the model card from the results and the number of parameters.
    """
    single = easy_vqa("test")
    if pictures is not None:
        image_ids = list(dict.fromkeys(sample.image_id for sample in single))[:pictures]
        single = [sample for sample in single if sample.image_id in image_ids]
    collage = collages("test", collage_count, QUESTIONS_EACH)
    processor = AutoProcessor.from_pretrained(path)
    # The weights are bf16 numbers, but not every CPU computes fast in bf16.
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation=PACKED)
    right = grade(model, processor, family, [*single, *collage])
    results: Results = {
        "easy-vqa": accuracies(single, right),
        "collage": accuracies(collage, right),
        "describe, by word": {
            "describe": rate([word for s in collage if s.kind == "describe" for word in right[s.id][:-1]])
        },
        "generate": {"agreement": generate_agreement(path, processor, [*single, *collage], right, generated)},
    }
    (path / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n")
    (path / "README.md").write_text(card(results, model.num_parameters()))
    return results


@torch.no_grad()
def grade(model: Any, processor: Any, family: Family, samples: list[VQASample]) -> dict[str, list[bool]]:
    """By sample id: which tokens of the answer, end token last, the model predicts given those before.

    All of them right is the same as the right answer from greedy decoding. All questions about a picture go
    through the model at once, which is several times as fast as one prompt each and gives the same.
    """
    by_picture = defaultdict(list)
    for sample in samples:
        by_picture[sample.image_id].append(sample)
    layout = family.layout.batch(1)
    right: dict[str, list[bool]] = {}
    for group in tqdm(by_picture.values(), desc="evaluating", unit="picture"):
        pixels = processor.image_processor(group[0].image, return_tensors="pt")
        visual = model.model.get_image_features(**pixels).pooler_output[0]
        pairs = [(sample.question, sample.answers[0]) for sample in group]
        packed = pack(processor.tokenizer, family.prompt, [pairs], layout)
        logits, labels = answer_logits(model, visual[None], packed)
        tokens = (logits.argmax(-1) == labels).split(packed.lengths)
        right |= {sample.id: row.tolist() for sample, row in zip(group, tokens, strict=True)}
    return right


def generate_agreement(
    path: Path, processor: Any, samples: list[VQASample], right: dict[str, list[bool]], count: int
) -> dict[str, float]:
    """How often `grade` is confirmed by `generate` in bf16, one prompt at a time."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16)
    # half of them collages, which are far fewer
    easy, hard = ([s for s in samples if s.image_id.startswith(task)] for task in ("easy-vqa", "collage"))
    rng = random.Random(SEED)
    agree = []
    for sample in tqdm(rng.sample(easy, count // 2) + rng.sample(hard, count - count // 2), desc="generate"):
        answer = generate(model, processor, sample)
        agree.append((answer == sample.answers[0]) == all(right[sample.id]))
    return rate(agree)


def generate(model: Any, processor: Any, sample: VQASample) -> str:
    """The model's answer, obtained the way any vision-language model is used."""
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


def usage_section(checkpoint: str) -> str:
    """How to ask the model something."""
    return f"""\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("vlmaccel/assets/{checkpoint}")
processor = AutoProcessor.from_pretrained("vlmaccel/assets/{checkpoint}")
content = [{{"type": "image"}}, {{"type": "text", "text": "what is the blue shape?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.dtype)
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```"""


def accuracy_section(results: Results, module: str) -> str:
    """What was measured, and how; module: the trainer in `vlmaccel.training`."""

    def table(measured: dict[str, dict[str, float]], of: str) -> str:
        rows = [f"| {kind} | {r['accuracy']:.2%} | {r['count']} |" for kind, r in measured.items()]
        return "\n".join([f"| {of} | exactly right | questions |", "|---|---|---|", *rows])

    words = results["describe, by word"]["describe"]
    agreement = results["generate"]["agreement"]
    agreed = round(agreement["accuracy"] * agreement["count"])
    return f"""\
## Accuracy

Measured by `python -m vlmaccel.training.{module} --evaluate` on test pictures. An answer counts if it is
right from end to end, the end token included. Weights in bf16, arithmetic in float32.

easy-VQA, test split: one shape a picture, enlarged to 192 px.

{table(results["easy-vqa"], "easy-VQA")}

Collages: 3-8 test pictures in a 3x3 grid (`vlmaccel.evals.easy_vqa.collages`).

{table(results["collage"], "collage")}

Of the single words of the `describe` answers, {words["accuracy"]:.2%} of {words["count"]} are right.

These numbers come from all questions about a picture in one pass. `generate()` in bf16 through the saved
processor, one prompt at a time, confirms them for {agreed} of {agreement["count"]} questions."""


def limits_section(vocabulary: int) -> str:
    """What the model is no good for."""
    return f"""\
## What it is not

- Not a general model: its vocabulary is {vocabulary} tokens, and it knows the questions of these two
  tasks only.
- Not a stand-in for a large model's numbers. In training, its decoder first saw a part of the visual tokens
  (at their own positions), so it may be more robust to token removal than a real vision-language model.
- Plain easy-VQA hardly tells methods apart: with one large object even random removal of most tokens costs
  little. Rank them on the collages, above all on `color-of-shape` and `describe`.
- A decoder of 6 layers may have read the answer out of the visual tokens after two of them, so removal from
  there on can look cheaper than it is in a large model."""


DATA_SECTION = """\
## Data and licence

Pictures and questions: [easy-VQA](https://github.com/vzhou842/easy-VQA) by Victor Zhou, the PyPI package
`easy-vqa` (MIT), train split for training, test split for the numbers above. The collages are made of its
pictures and ask in its question templates. The weights are under Apache-2.0."""


def command(description: str | None, train: Callable[[Path, Path], None], evaluate: Callable[[Path], Results]) -> None:
    """The command line of a trainer; train: from the folders of the checkpoint and of the stages."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="train, and write the checkpoint there")
    task.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the checkpoint that is there")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where stages are kept (default: OUT-stages)")
    args = parser.parse_args()
    if args.out:
        train(args.out, args.work or args.out.with_name(f"{args.out.name}-stages"))
    print(json.dumps(evaluate(args.out or args.evaluate), indent=2))
