"""The three training stages of the demo's tiny LLaVA, each on top of the one before."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vlmaccel.evals.easy_vqa import CELLS, COLORS, SHAPES, Collage, make_collage, pictures
from vlmaccel.training import demo_stages
from vlmaccel.training.demo_llava_model import FAMILY, vision
from vlmaccel.training.demo_stages import Metrics, PatchHeads, answer_loss, ask, cell_of, enlarge, fit, patch_labels

VISION_BATCH, JOINT_BATCH = 8, 8


def train_vision(model: LlavaForConditionalGeneration, steps: int, seed: int) -> None:
    """The vision tower alone: every patch tells shape and colour of what it shows.

    Labels of whole pictures do not suffice: they leave the shape to the CLS token, which LLaVA never sees.
    CLS is trained here too, on what the picture contains, since token reduction methods read its attention.
    """
    rng = random.Random(seed)
    single = [picture for picture in pictures("train") if picture.label]
    width = model.model.vision_tower.config.hidden_size
    heads = PatchHeads(width)
    to_cell = nn.Linear(width, CELLS)
    to_pairs = nn.Linear(width, len(SHAPES) * len(COLORS))

    def loss(_: float) -> tuple[Tensor, Metrics]:
        scenes = [
            enlarge(rng.choice(single)) if rng.random() < 0.15 else make_collage("train", rng)
            for _ in range(VISION_BATCH)
        ]
        shapes, colors = (torch.stack(labels) for labels in zip(*map(patch_labels, scenes), strict=True))
        pairs = torch.stack([contained_pairs(scene) for scene in scenes])
        patches, cls = vision(model, [scene.pixels for scene in scenes])
        patches = heads.norm(patches)
        total, metrics = heads.loss(patches, shapes, colors)
        cells = cell_of(FAMILY.side).repeat(len(scenes))
        total = total + 0.3 * F.cross_entropy(to_cell(patches).flatten(0, 1), cells)
        total = total + 2 * F.binary_cross_entropy_with_logits(to_pairs(cls), pairs)
        return total, metrics

    trained = [model.model.vision_tower, heads, to_cell, to_pairs]
    fit("vision", [p for module in trained for p in module.parameters()], loss, steps, 1.5e-3)


def train_binding(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, scenes: int, seed: int
) -> None:
    """The language model on frozen features of so many scenes, see `demo_stages.train_binding`."""
    trained = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    demo_stages.train_binding(model, tokenizer, FAMILY, trained, steps, scenes, seed, rate=6e-4, most=112)


def train_jointly(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """Everything together, with all 576 visual tokens."""
    rng = random.Random(seed)
    asked = [picture for picture in pictures("train") if picture.questions]
    layout = FAMILY.layout.batch(JOINT_BATCH)

    def loss(_: float) -> tuple[Tensor, Metrics]:
        scenes, dialogues = [], []
        for _ in range(JOINT_BATCH):
            picture = rng.choice(asked) if rng.random() < 0.25 else None
            scene = enlarge(picture) if picture else make_collage("train", rng)
            scenes.append(scene)
            dialogues.append(ask(scene, picture, rng, 12))
        visual = FAMILY.project(model, FAMILY.features(model, [scene.pixels for scene in scenes]))
        return answer_loss(model, tokenizer, FAMILY.prompt, visual, layout, dialogues)

    fit("joint", model.parameters(), loss, steps, 6e-4)


def contained_pairs(scene: Collage) -> Tensor:
    """1 for every pair of shape and colour in the picture, (24,)."""
    pairs = torch.zeros(len(SHAPES), len(COLORS))
    for color, shape in scene.objects.values():
        pairs[SHAPES.index(shape), COLORS.index(color)] = 1
    return pairs.flatten()
