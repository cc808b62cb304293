"""Train the demo's tiny ViT from nothing, and measure it.

python -m vlmaccel.training.demo_vit --out DIR         trains, measures, and writes the model card
python -m vlmaccel.training.demo_vit --evaluate DIR    measures a checkpoint again and rewrites its card

Training takes about six minutes on one core of a CPU that computes in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import VisionTransformer, save_for_hf
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vlmaccel.evals.easy_vqa import CLASSES, COLORS, PICTURE_SIZE, SHAPES, classified
from vlmaccel.training.demo_llava_stages import Metrics, fit

SEED = 3
WINDOW_EPOCHS, WINDOW_BATCH, WINDOW_RATE = 12, 64, 2e-3
WHOLE_EPOCHS, WHOLE_BATCH, WHOLE_RATE = 4, 32, 1e-3
MAX_SHIFT = 4  # pixels of the native picture
TEST_BATCH = 64

IMAGE_SIZE, PATCH_SIZE = 128, 8
GRID = IMAGE_SIZE // PATCH_SIZE
WINDOW = PICTURE_SIZE // PATCH_SIZE  # of the grid, that a picture of native size covers

ARCHITECTURE = "vit_tiny_patch16_224"  # only its name: every size is given below
MODEL_ARGS: dict[str, Any] = {
    "img_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "embed_dim": 128,
    "depth": 8,
    "num_heads": 4,
    "mlp_ratio": 3.0,
    "num_classes": len(CLASSES),
}
PRETRAINED_CFG: dict[str, Any] = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "num_classes": len(CLASSES),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Results = dict[str, dict[str, float]]


def build_model() -> VisionTransformer:
    """The untrained model: pixels (B, 3, 128, 128) -> 256 patch tokens and CLS -> logits (B, 24)."""
    return timm.create_model(ARCHITECTURE, pretrained_cfg=PRETRAINED_CFG, **MODEL_ARGS)


def train(out: Path, steps_scale: float = 1.0) -> None:
    """Train in two phases and save the checkpoint in `out`; a fraction of the steps shows that it runs.

    Most is learnt on pictures of native size, a quarter of the tokens; the rest at full size. The weights are
    saved as bfloat16 numbers, in timm's own format.
    """
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = build_model().train()
    for block in model.blocks:
        block.attn.fused_attn = False  # on CPUs, backward of fused attention is slower for heads as narrow as these
    images, labels = zip(*classified("train"), strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    classes = torch.tensor(labels)

    def phase(name: str, epochs: int, size: int, rate: float, forward: Callable[[Tensor], Tensor]) -> None:
        steps = max(1, round(epochs * (len(pixels) // size) * steps_scale))
        batches = endless_batches(len(pixels), size)

        def loss(_: float) -> tuple[Tensor, Metrics]:
            batch = next(batches)
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(augment(pixels[batch], rng)).float()
            right = logits.argmax(-1) == classes[batch]
            return F.cross_entropy(logits, classes[batch]), {"top-1": right.float().tolist()}

        fit(name, model.parameters(), loss, steps, rate)

    phase("window", WINDOW_EPOCHS, WINDOW_BATCH, WINDOW_RATE, lambda x: window_logits(model, x, rng))
    phase("whole", WHOLE_EPOCHS, WHOLE_BATCH, WHOLE_RATE, lambda x: model(enlarge(x)))
    out.mkdir(parents=True, exist_ok=True)
    save_for_hf(model.bfloat16(), str(out), model_config={"label_names": list(CLASSES)}, safe_serialization=True)


def endless_batches(count: int, size: int) -> Iterator[Tensor]:
    """Indices (size,) of shuffled epochs without end; what is left over at the end of an epoch is dropped."""
    while True:
        yield from torch.randperm(count).split(size)[: count // size]


def augment(pixels: Tensor, rng: random.Random) -> Tensor:
    """A batch (B, 3, 64, 64), mirrored half of the time and shifted, with its border continued."""
    if rng.random() < 0.5:
        pixels = pixels.flip(-1)
    top, left = (rng.randint(0, 2 * MAX_SHIFT) for _ in range(2))
    padded = F.pad(pixels, (MAX_SHIFT,) * 4, mode="replicate")
    return padded[..., top : top + PICTURE_SIZE, left : left + PICTURE_SIZE]


def window_logits(model: VisionTransformer, pixels: Tensor, rng: random.Random) -> Tensor:
    """Logits (B, 24) of pictures of native size, (B, 3, 64, 64), somewhere in the model's grid of patches.

    The model gets their 64 tokens and CLS only. A random place lets all positions be learnt.
    """
    row, column = (rng.randint(0, GRID - WINDOW) for _ in range(2))
    top, left = row * PATCH_SIZE, column * PATCH_SIZE
    rest = IMAGE_SIZE - PICTURE_SIZE
    canvas = F.pad(pixels, (left, rest - left, top, rest - top))
    patches = torch.arange(GRID * GRID).view(GRID, GRID)[row : row + WINDOW, column : column + WINDOW].flatten()
    kept = torch.cat([torch.zeros(1, dtype=torch.long), patches + 1])
    # where timm would drop patches at random: behind the positions, before the first block
    with model.patch_drop.register_forward_hook(lambda module, args, tokens: tokens[:, kept]):
        return model(canvas)


def enlarge(pixels: Tensor) -> Tensor:
    """(B, 3, 64, 64) -> (B, 3, 128, 128), but for rounding as timm's transform does it."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


def evaluate(path: Path, pictures: int | None = None) -> Results:
    """Measure a checkpoint on (the first) test pictures; write the numbers and the card next to it."""
    results = {name: measure(load(path, dtype), pictures) for name, dtype in PRECISIONS.items()}
    (path / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n")
    parameters = sum(p.numel() for p in build_model().parameters())
    (path / "README.md").write_text(model_card(results, parameters))
    return results


def load(path: Path, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """A saved checkpoint, in eval mode."""
    return timm.create_model(f"local-dir:{path}", pretrained=True).to(dtype).eval()


@torch.no_grad()
def measure(model: VisionTransformer, pictures: int | None = None) -> dict[str, float]:
    """The share of (the first) test pictures whose class, shape and colour are right, by timm's own transform."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dtype = next(model.parameters()).dtype
    images, labels = zip(*classified("test")[:pictures], strict=True)
    predicted = [
        model(torch.stack([transform(image) for image in images[i : i + TEST_BATCH]]).to(dtype)).argmax(-1)
        for i in tqdm(range(0, len(images), TEST_BATCH), desc=f"evaluating in {dtype}")
    ]
    found, true = torch.cat(predicted), torch.tensor(labels)

    def rate(right: Tensor) -> float:
        return int(right.sum()) / len(right)

    return {
        "top-1": rate(found == true),
        "shape": rate(found // len(COLORS) == true // len(COLORS)),
        "color": rate(found % len(COLORS) == true % len(COLORS)),
        "count": len(true),
    }


def model_card(results: Results, parameters: int) -> str:
    rows = "\n".join(
        f"| {name} | {r['top-1']:.2%} | {r['shape']:.2%} | {r['color']:.2%} | {r['count']} |"
        for name, r in results.items()
    )
    return f"""\
---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
---

# tiny-vit

A timm `VisionTransformer` of {parameters / 1e6:.2f} million parameters that really tells {len(CLASSES)} classes of simple
pictures apart: {len(SHAPES)} shapes in {len(COLORS)} colours. It is a plain ViT at a size that trains and runs on one CPU
core: {MODEL_ARGS["depth"]} blocks x {MODEL_ARGS["embed_dim"]}, {MODEL_ARGS["num_heads"]} heads, \
patch {PATCH_SIZE}, {IMAGE_SIZE} px, {GRID * GRID} patch tokens and CLS. It is there so that methods which
remove or merge tokens of a ViT can be tried out and ranked by accuracy anywhere.

```python
import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:vlmaccel/assets/tiny-vit", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
logits = model(transform(image)[None])
print(model.pretrained_cfg["label_names"][logits.argmax()])
```

`pretrained=True` is what makes timm read the weights. They are stored as bfloat16 numbers.

## Accuracy

Measured by `python -m vlmaccel.training.demo_vit --evaluate` on test pictures of easy-VQA, 64x64, which timm's own
transform for the checkpoint enlarges to {IMAGE_SIZE} px.

| arithmetic | top-1 | shape | colour | pictures |
|---|---|---|---|---|
{rows}

## What it is not

- Not a general model: it knows one large shape on a plain background, and has never seen a photograph.
- Not a stand-in for a large model's numbers. In training it first saw {WINDOW * WINDOW} of its {GRID * GRID} patch tokens, a
  square of them, so it may be more robust to token removal than a ViT trained on ImageNet.
- Its pictures are enlarged, so neighbouring tokens have more in common than in a photograph.

## Training

From nothing, by `python -m vlmaccel.training.demo_vit --out DIR`:

1. {WINDOW_EPOCHS} epochs of pictures of native size, {WINDOW * WINDOW} tokens, anywhere in the grid of positions;
2. {WHOLE_EPOCHS} epochs of enlarged pictures, all {GRID * GRID} tokens.

Both with shifts of up to {MAX_SHIFT} px and mirroring.

## Data and licence

Pictures: [easy-VQA](https://github.com/vzhou842/easy-VQA) by Victor Zhou, the PyPI package `easy-vqa` (MIT), train
split for training, test split for the numbers above. Their classes are collected from its questions and answers, which
tell both shape and colour for 3,542 of 4,000 and 880 of 1,000 pictures. The weights are under Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="train, and write the checkpoint there")
    task.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the checkpoint that is there")
    args = parser.parse_args()
    if args.out:
        train(args.out)
    print(json.dumps(evaluate(args.out or args.evaluate), indent=2))


if __name__ == "__main__":
    main()
