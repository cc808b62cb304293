"""Train the demo's tiny Qwen2-VL from nothing, and measure it.

python -m vlmaccel.training.demo_qwen2_vl --out DIR         trains, measures, and writes the model card
python -m vlmaccel.training.demo_qwen2_vl --evaluate DIR    measures a checkpoint again and rewrites its card
"""

from __future__ import annotations

from pathlib import Path

from vlmaccel.training import demo_qwen2_vl_stages
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
from vlmaccel.training.demo_packing import PACKED_MATMUL
from vlmaccel.training.demo_qwen2_vl_model import (
    FAMILY,
    VISUAL_TOKENS,
    VOCABULARY,
    build_model,
    build_processor,
)
from vlmaccel.training.demo_stages import BINDING_STEPS, JOINT_STEPS, VISION_STEPS, train_in_stages


def train(out: Path, work: Path, steps_scale: float = 1.0) -> None:
    """Train stage by stage and save the checkpoint in `out`; a fraction of the steps shows that it runs.

    Each stage leaves its own checkpoint in `work`, and is skipped if that is there.
    """
    train_in_stages(out, work, steps_scale, build_processor(), build_model, demo_qwen2_vl_stages, PACKED_MATMUL, SEED)


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

# tiny-qwen2-vl

A Qwen2-VL of {parameters / 1e6:.2f} million parameters that really answers questions about simple pictures. It
has the parts of Qwen2-VL at a size that trains and runs on one CPU core: vision tower for pictures of any size
(5 blocks x 128, patch 8, rotary positions in two dimensions), 2 x 2 patches in a visual token, Qwen2 decoder (6 layers
x 192, 6 query and 2 key-value heads) with M-RoPE. It is there so that methods which remove, merge or compress visual
tokens can be tried out and ranked by accuracy anywhere.

{usage_section("tiny-qwen2-vl")}

The saved image processor makes {VISUAL_TOKENS} visual tokens of every square picture (192 px), and about as many of
others. For another resolution give limits of the number of pixels, for example 16 tokens of a picture of 64 px:

```python
size = {{"shortest_edge": 64 * 64, "longest_edge": 192 * 192}}
inputs = processor(images=image, text=prompt, images_kwargs={{"size": size}}, return_tensors="pt").to(model.dtype)
```

{accuracy_section(results, "demo_qwen2_vl")}

{limits_section(len(VOCABULARY))}
- Its first decoder layer has already read what a short question names: of methods that drop tokens behind it only
  `describe` says much. Before the decoder (`layer=0`) all kinds tell methods apart.
- It takes several pictures and videos in a prompt, as every Qwen2-VL does, but was trained on one picture a prompt:
  what it answers to others is no measure of anything.

## Training

From nothing, by `python -m vlmaccel.training.demo_qwen2_vl --out DIR`:

1. {VISION_STEPS} steps of the vision tower, every patch telling shape and colour of what it shows;
2. {BINDING_STEPS} steps of merger and decoder on frozen features, few visual tokens first;
3. {JOINT_STEPS} steps of everything with all visual tokens, one in five on smaller pictures of 16 to 96 tokens.

{DATA_SECTION}
"""


if __name__ == "__main__":
    command(__doc__, train, evaluate)
