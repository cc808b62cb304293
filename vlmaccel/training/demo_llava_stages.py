"""The three training stages of the demo's tiny LLaVA, each on top of the one before."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import mean

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vlmaccel.evals.easy_vqa import (
    CELLS,
    COLORS,
    SHAPES,
    Collage,
    Picture,
    Question,
    collage_questions,
    make_collage,
    pictures,
)
from vlmaccel.training.demo_llava_model import (
    GRID,
    IMAGE_SIZE,
    PATCH_SIZE,
    VISUAL_TOKENS,
    answer_logits,
    pack,
    to_pixels,
    vision,
)

VISION_BATCH, BINDING_BATCH, JOINT_BATCH = 8, 16, 8
WARM_UP = 60
REPORT_EVERY = 50
# the cell of a collage that every patch lies in
CELL_OF_PATCH = (torch.arange(GRID)[:, None] * 3 // GRID * 3 + torch.arange(GRID) * 3 // GRID).flatten()

Metrics = dict[str, list[float]]


def train_vision(model: LlavaForConditionalGeneration, steps: int, seed: int) -> None:
    """The vision tower alone: every patch tells shape and colour of what it shows.

    Labels of whole pictures do not suffice: they leave the shape to the CLS token, which LLaVA never sees.
    CLS is trained here too, on what the picture contains, since token reduction methods read its attention.
    """
    rng = random.Random(seed)
    single = [picture for picture in pictures("train") if picture.label]
    width = model.model.vision_tower.config.hidden_size
    norm = nn.LayerNorm(width)
    to_shape = nn.Linear(width, len(SHAPES) + 1)
    to_color = nn.Linear(width, len(COLORS) + 1)
    to_cell = nn.Linear(width, CELLS)
    to_pairs = nn.Linear(width, len(SHAPES) * len(COLORS))
    heads = nn.ModuleList([norm, to_shape, to_color, to_cell, to_pairs])
    # most patches show background, the last class
    shape_weight = torch.tensor([1.0] * len(SHAPES) + [0.3])
    color_weight = torch.tensor([1.0] * len(COLORS) + [0.3])

    def loss(_: float) -> tuple[Tensor, Metrics]:
        scenes = [
            enlarge(rng.choice(single)) if rng.random() < 0.15 else make_collage("train", rng)
            for _ in range(VISION_BATCH)
        ]
        shapes, colors = (torch.stack(labels) for labels in zip(*map(patch_labels, scenes), strict=True))
        pairs = torch.stack([contained_pairs(scene) for scene in scenes])
        patches, cls = vision(model, to_pixels([scene.pixels for scene in scenes]))
        patches = norm(patches)
        shape_logits, color_logits = to_shape(patches).flatten(0, 1), to_color(patches).flatten(0, 1)
        cells = CELL_OF_PATCH.repeat(len(scenes))
        total = F.cross_entropy(shape_logits, shapes.flatten(), shape_weight)
        total = total + F.cross_entropy(color_logits, colors.flatten(), color_weight)
        total = total + 0.3 * F.cross_entropy(to_cell(patches).flatten(0, 1), cells)
        total = total + 2 * F.binary_cross_entropy_with_logits(to_pairs(cls), pairs)
        objects = shapes.flatten() < len(SHAPES)
        return total, {
            "patch shape": (shape_logits.argmax(-1) == shapes.flatten())[objects].float().tolist(),
            "patch color": (color_logits.argmax(-1) == colors.flatten())[objects].float().tolist(),
        }

    fit("vision", [*model.model.vision_tower.parameters(), *heads.parameters()], loss, steps, 1.5e-3)


def train_binding(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    scenes: int,
    seed: int,
) -> None:
    """The language model learns which shape goes with which colour, the vision tower being frozen.

    That needs to match tokens by content, which is found quickly among few tokens and hardly ever among 576.
    So the number of visual tokens grows: 2 per object, then 6 and some background, then nearly all that show
    anything. They keep their own positions.

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
    features = precompute(model, [scene for group in pool.values() for scene, _ in group])

    def loss(progress: float) -> tuple[Tensor, Metrics]:
        if progress < 0.4:
            per_object, background, limit = 2, 0, 40
        elif progress < 0.8:
            per_object, background, limit = 6, 10, 64
        else:
            per_object, background, limit = VISUAL_TOKENS, 16, 112
        visual, positions, dialogues = [], [], []
        for _ in range(BINDING_BATCH):
            easy = rng.random() < max(0.25, 1 - 2.2 * progress)
            scene, picture = rng.choice(pool["single" if rng.random() < 0.1 else "easy" if easy else "hard"])
            kept = some_patches(scene, per_object, background, limit, generator)
            visual.append(features[id(scene)][kept])
            positions.append(kept)
            # the long answers wait until the short ones are learnt
            dialogues.append(ask(scene, picture, rng, 8, describe=progress >= 0.6))
        longest = max(map(len, positions))
        # rows are filled up with copies, which change next to nothing
        fill = [torch.arange(longest) % len(row) for row in positions]
        tokens = torch.stack([row[i] for row, i in zip(visual, fill, strict=True)])
        at = torch.stack([row[i] for row, i in zip(positions, fill, strict=True)])
        return answer_loss(model, tokenizer, model.model.multi_modal_projector(tokens), at, dialogues)

    trained = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    fit("binding", trained, loss, steps, 6e-4, hold=0.8)


def train_jointly(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """Everything together, with all 576 visual tokens."""
    rng = random.Random(seed)
    asked = [picture for picture in pictures("train") if picture.questions]
    positions = torch.arange(VISUAL_TOKENS).expand(JOINT_BATCH, -1)

    def loss(_: float) -> tuple[Tensor, Metrics]:
        scenes, dialogues = [], []
        for _ in range(JOINT_BATCH):
            picture = rng.choice(asked) if rng.random() < 0.25 else None
            scene = enlarge(picture) if picture else make_collage("train", rng)
            scenes.append(scene)
            dialogues.append(ask(scene, picture, rng, 12))
        patches, _cls = vision(model, to_pixels([scene.pixels for scene in scenes]))
        return answer_loss(model, tokenizer, model.model.multi_modal_projector(patches), positions, dialogues)

    fit("joint", model.parameters(), loss, steps, 6e-4)


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    batch_loss: Callable[[float], tuple[Tensor, Metrics]],
    steps: int,
    peak_rate: float,
    hold: float = 0.0,
) -> None:
    """AdamW; the rate warms up, stays for the fraction `hold` of the steps, then falls along a cosine.

    `batch_loss` gets the progress from 0 to 1 and draws its own batch.
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


def shown(scene: Collage, least: float) -> Tensor:
    """Which patches (576,) differ from the background in more than the fraction `least` of their pixels."""
    background = scene.backgrounds.astype(np.int16)[CELL_OF_PATCH].reshape(GRID, 1, GRID, 1, 3)
    patches = scene.pixels.astype(np.int16).reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE, 3)
    differs = abs(patches - background).max(-1) > 40
    return torch.from_numpy(differs.mean((1, 3)).flatten() > least)


def patch_labels(scene: Collage) -> tuple[Tensor, Tensor]:
    """Shape and colour of what every patch shows, the last class being background."""
    shapes = torch.full((VISUAL_TOKENS,), len(SHAPES))
    colors = torch.full((VISUAL_TOKENS,), len(COLORS))
    foreground = shown(scene, least=0.12)
    for cell, (color, shape) in scene.objects.items():
        inside = foreground & (cell == CELL_OF_PATCH)
        shapes[inside] = SHAPES.index(shape)
        colors[inside] = COLORS.index(color)
    return shapes, colors


def contained_pairs(scene: Collage) -> Tensor:
    """1 for every pair of shape and colour in the picture, (24,)."""
    pairs = torch.zeros(len(SHAPES), len(COLORS))
    for color, shape in scene.objects.values():
        pairs[SHAPES.index(shape), COLORS.index(color)] = 1
    return pairs.flatten()


@torch.no_grad()
def precompute(model: LlavaForConditionalGeneration, scenes: list[Collage]) -> dict[int, Tensor]:
    """The patch features of every scene, by its id()."""
    features: dict[int, Tensor] = {}
    for i in tqdm(range(0, len(scenes), 16), desc="features"):
        batch = scenes[i : i + 16]
        patches, _cls = vision(model, to_pixels([scene.pixels for scene in batch]))
        features |= {id(scene): feature for scene, feature in zip(batch, patches, strict=True)}
    return features


def some_patches(scene: Collage, per_object: int, background: int, limit: int, generator: torch.Generator) -> Tensor:
    """Random patches of every object and of the background, at most `limit`, in ascending order."""
    foreground = shown(scene, least=0.08)
    kept = [
        shuffled((foreground & (cell == CELL_OF_PATCH)).nonzero()[:, 0], generator)[:per_object]
        for cell in range(CELLS)
    ]
    objects = shuffled(torch.cat(kept), generator)[: limit - background]
    rest = shuffled((~foreground).nonzero()[:, 0], generator)[:background]
    return torch.cat([objects, rest]).sort().values


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]


def answer_loss(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    visual: Tensor,
    positions: Tensor,
    dialogues: list[list[Question]],
) -> tuple[Tensor, Metrics]:
    """Cross entropy of all answers, and by kind of question whether each answer is right from end to end."""
    pairs = [[(question.text, question.answer) for question in dialogue] for dialogue in dialogues]
    packed = pack(tokenizer, pairs, positions)
    logits, labels = answer_logits(model, visual, packed)
    right = (logits.argmax(-1) == labels).split(packed.lengths)
    metrics: Metrics = defaultdict(list)
    questions = [question for dialogue in dialogues for question in dialogue]
    for question, tokens in zip(questions, right, strict=True):
        metrics[question.kind].append(float(tokens.all()))
    return F.cross_entropy(logits, labels), metrics
