"""What the training stages of the demo's vision-language models share."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from vlmaccel.evals.easy_vqa import (
    CELLS,
    COLORS,
    PICTURE_SIZE,
    SHAPES,
    Collage,
    Picture,
    Question,
    collage_questions,
    make_collage,
    pictures,
)
from vlmaccel.training.demo_packing import Layout, Prompt, answer_logits, pack

IMAGE_SIZE = 3 * PICTURE_SIZE
PATCH_SIZE = 8
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
# fmt: off
QUESTION_WORDS = (
    "what", "is", "the", "does", "image", "contain", "a", "there", "not", "no", "yes",
    "shape", "present", "in", "color", "of", "at", "describe",
)
# fmt: on
VISION_STEPS, BINDING_STEPS, JOINT_STEPS = 1200, 700, 450  # of the demo models
WARM_UP = 60
REPORT_EVERY = 50
BINDING_BATCH = 16

Metrics = dict[str, list[float]]
Loss = Callable[[float], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Family:
    """What the shared parts need to know of a model.

    prompt, and layout of all visual tokens of a 192 px picture; side: visual tokens along each of its edges.
    features: from the model and uint8 pictures (192, 192, 3) the output of the vision tower, (B, side^2, ...).
    project: from the model and features (B, n, ...) of some tokens these visual tokens, (B, n, D).
    autocast: whether the language model is trained in bfloat16 (weights stay in float32).
    """

    prompt: Prompt
    layout: Layout
    side: int
    features: Callable[[Any, list[np.ndarray]], Tensor]
    project: Callable[[Any, Tensor], Tensor]
    autocast: bool = False


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Fan-in initialisation.

    With the usual std of 0.02, made for wide models, attention is so flat at width 192 that the language
    model does not learn which shape goes with which colour.
    """
    residual = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "attn.proj.weight", "fc2.weight")
    for name, parameter in model.named_parameters():
        if "position_embedding" in name or "class_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        if name.endswith(residual):
            parameter.mul_(0.3)  # what a layer adds to the residual stream starts small


def train_in_stages(
    out: Path, work: Path, scale: float, processor: Any, build: Callable[[], Any], how: Any, attention: Any, seed: int
) -> None:
    """Train vision tower, binding and everything together, and save the checkpoint in `out`; scale: fraction of the steps.

    how: the module with `train_vision`, `train_binding` and `train_jointly` of the model that `build` makes. Each stage leaves its
    own checkpoint in `work`, and is skipped if that is there.
    """
    vision, binding, joint = (max(1, round(steps * scale)) for steps in (VISION_STEPS, BINDING_STEPS, JOINT_STEPS))
    stages: dict[str, Callable[[Any], None]] = {
        "vision": lambda model: how.train_vision(model, vision, seed + 1),
        # as many pictures as steps
        "binding": lambda model: how.train_binding(model, processor.tokenizer, binding, max(8, binding), seed + 2),
        "joint": lambda model: how.train_jointly(model, processor.tokenizer, joint, seed + 3),
    }
    torch.manual_seed(seed)
    model = build()
    for name, stage in stages.items():
        if not (work / name).exists():
            torch.manual_seed(seed)
            model.set_attn_implementation(attention)
            stage(model)
            model.save_pretrained(work / name)
        model = AutoModelForImageTextToText.from_pretrained(work / name, dtype=torch.float32)
    model.bfloat16().save_pretrained(out)
    processor.save_pretrained(out)


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    batch_loss: Loss,
    steps: int,
    peak_rate: float,
    hold: float = 0.0,
    autocast: bool = False,
) -> None:
    """AdamW; the rate warms up, stays for the fraction `hold` of the steps, then falls along a cosine.

    `batch_loss` gets the progress from 0 to 1 and draws its own batch. autocast: matrix products in bfloat16.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98), fused=True)
    recent: Metrics = defaultdict(list)
    for step in tqdm(range(steps), desc=name):
        falling = max(0.0, (step / steps - hold) / (1 - hold))
        rate = peak_rate * min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * falling)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, metrics = batch_loss(step / steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for key, values in {"loss": [loss.item()], **metrics}.items():
            recent[key] += values
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            report = ", ".join(f"{key} {mean(recent[key]):.3f}" for key in sorted(recent))
            tqdm.write(f"{name} {step + 1}/{steps}: {report}")
            recent.clear()


class PatchHeads(nn.Module):
    """Reads shape and colour of what a patch shows from its feature; the last class of both is background."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_shape = nn.Linear(width, len(SHAPES) + 1)
        self.to_color = nn.Linear(width, len(COLORS) + 1)
        # most patches show background
        self.shape_weight = torch.tensor([1.0] * len(SHAPES) + [0.3])
        self.color_weight = torch.tensor([1.0] * len(COLORS) + [0.3])

    def loss(self, patches: Tensor, shapes: Tensor, colors: Tensor) -> tuple[Tensor, Metrics]:
        """Of normalised features (B, 576, width) with labels (B, 576)."""
        shape_logits = self.to_shape(patches).flatten(0, 1).float()
        color_logits = self.to_color(patches).flatten(0, 1).float()
        total = F.cross_entropy(shape_logits, shapes.flatten(), self.shape_weight)
        total = total + F.cross_entropy(color_logits, colors.flatten(), self.color_weight)
        objects = shapes.flatten() < len(SHAPES)
        return total, {
            "patch shape": (shape_logits.argmax(-1) == shapes.flatten())[objects].float().tolist(),
            "patch color": (color_logits.argmax(-1) == colors.flatten())[objects].float().tolist(),
        }


def train_binding(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    family: Family,
    trained: Iterable[nn.Parameter],
    steps: int,
    scenes: int,
    seed: int,
    rate: float,
    most: int,
) -> None:
    """The language model learns which shape goes with which colour, the vision tower being frozen.

    That needs to match tokens by content, which is found quickly among few tokens and hardly ever among 576.
    So the number of visual tokens grows: 2 per object, then 6 and some background, then at most `most`, nearly all that
    show anything. They keep their own positions.

    Features are computed once, for `scenes` pictures: 1 in 8 single, half of them collages of 2-3 objects.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    asked = [picture for picture in pictures("train") if picture.questions]
    pool: dict[str, list[tuple[Collage, Picture | None]]] = {"single": [], "easy": [], "hard": []}
    for i in range(scenes):
        if i % 8 == 7:
            picture = rng.choice(asked)
            pool["single"].append((enlarge(picture), picture))
        elif i % 2 == 0:
            pool["easy"].append((make_collage("train", rng, rng.randint(2, 3)), None))
        else:
            pool["hard"].append((make_collage("train", rng), None))
    features = precompute(model, family, [scene for group in pool.values() for scene, _ in group])

    def loss(progress: float) -> tuple[Tensor, Metrics]:
        if progress < 0.4:
            per_object, background, limit = 2, 0, 40
        elif progress < 0.8:
            per_object, background, limit = 6, 10, 64
        else:
            per_object, background, limit = family.side**2, 16, most
        visual, places, dialogues = [], [], []
        for _ in range(BINDING_BATCH):
            easy = rng.random() < max(0.25, 1 - 2.2 * progress)
            scene, picture = rng.choice(pool["single" if rng.random() < 0.1 else "easy" if easy else "hard"])
            kept = some_tokens(scene, family.side, per_object, background, limit, generator)
            visual.append(features[id(scene)][kept])
            places.append(kept)
            # the long answers wait until the short ones are learnt
            dialogues.append(ask(scene, picture, rng, 8, describe=progress >= 0.6))
        longest = max(map(len, places))
        # rows are filled up with copies, which change next to nothing
        fill = [torch.arange(longest) % len(row) for row in places]
        tokens = torch.stack([row[i] for row, i in zip(visual, fill, strict=True)])
        at = torch.stack([row[i] for row, i in zip(places, fill, strict=True)])
        layout = Layout(family.layout.positions[..., at], family.layout.extent)
        return answer_loss(model, tokenizer, family.prompt, family.project(model, tokens), layout, dialogues)

    fit("binding", trained, loss, steps, rate, hold=0.8, autocast=family.autocast)


def enlarge(picture: Picture) -> Collage:
    """One picture as large as a collage, with its object (if known) in every cell."""
    image = Image.fromarray(picture.pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    objects = dict.fromkeys(range(CELLS), picture.label) if picture.label else {}
    return Collage(np.asarray(image), objects, np.tile(picture.background, (CELLS, 1)))


def ask(
    scene: Collage, picture: Picture | None, rng: random.Random, count: int, describe: bool = True
) -> list[Question]:
    """Questions about a collage, or some of easy-VQA's own about an enlarged picture."""
    if picture:
        return rng.sample(picture.questions, min(count, len(picture.questions)))
    return collage_questions(scene.objects, rng, count, describe)


def cell_of(side: int) -> Tensor:
    """The cell of a collage that every token lies in, for `side` tokens along each edge, row by row."""
    third = torch.arange(side) * 3 // side
    return (third[:, None] * 3 + third).flatten()


def shown(scene: Collage, side: int, pixels: int) -> Tensor:
    """Which of side^2 tokens differ from the background in at least so many of their pixels."""
    background = scene.backgrounds.astype(np.int16)[cell_of(side)].reshape(side, 1, side, 1, 3)
    tokens = scene.pixels.astype(np.int16).reshape(side, IMAGE_SIZE // side, side, IMAGE_SIZE // side, 3)
    differs = abs(tokens - background).max(-1) > 40
    return torch.from_numpy(differs.sum((1, 3)).flatten() >= pixels)


def patch_labels(scene: Collage) -> tuple[Tensor, Tensor]:
    """Shape and colour of what every patch shows, (576,) row by row, the last class being background."""
    side = IMAGE_SIZE // PATCH_SIZE
    shapes = torch.full((PATCHES,), len(SHAPES))
    colors = torch.full((PATCHES,), len(COLORS))
    foreground = shown(scene, side, pixels=8)
    for cell, (color, shape) in scene.objects.items():
        inside = foreground & (cell == cell_of(side))
        shapes[inside] = SHAPES.index(shape)
        colors[inside] = COLORS.index(color)
    return shapes, colors


def some_tokens(
    scene: Collage, side: int, per_object: int, background: int, limit: int, generator: torch.Generator
) -> Tensor:
    """Random tokens of every object and of the background, at most `limit`, in ascending order."""
    foreground = shown(scene, side, pixels=6)
    kept = [
        _shuffled((foreground & (cell == cell_of(side))).nonzero()[:, 0], generator)[:per_object]
        for cell in range(CELLS)
    ]
    objects = _shuffled(torch.cat(kept), generator)[: limit - background]
    rest = _shuffled((~foreground).nonzero()[:, 0], generator)[:background]
    return torch.cat([objects, rest]).sort().values


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]


@torch.no_grad()
def precompute(model: Any, family: Family, scenes: list[Collage]) -> dict[int, Tensor]:
    """The features of every scene, by its id()."""
    features: dict[int, Tensor] = {}
    for i in tqdm(range(0, len(scenes), 16), desc="features"):
        batch = scenes[i : i + 16]
        rows = family.features(model, [scene.pixels for scene in batch])
        features |= {id(scene): row for scene, row in zip(batch, rows, strict=True)}
    return features


def answer_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    visual: Tensor,
    layout: Layout,
    dialogues: list[list[Question]],
) -> tuple[Tensor, Metrics]:
    """Cross entropy of all answers, and by kind of question whether each answer is right from end to end.

    visual: (B, n, D), the layout's positions: (B, n) or (3, B, n).
    """
    pairs = [[(question.text, question.answer) for question in dialogue] for dialogue in dialogues]
    packed = pack(tokenizer, prompt, pairs, layout)
    logits, labels = answer_logits(model, visual, packed)
    right = (logits.argmax(-1) == labels).split(packed.lengths)
    metrics: Metrics = defaultdict(list)
    questions = [question for dialogue in dialogues for question in dialogue]
    for question, tokens in zip(questions, right, strict=True):
        metrics[question.kind].append(float(tokens.all()))
    return F.cross_entropy(logits, labels), metrics
