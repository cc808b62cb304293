"""The three training stages of the demo's tiny Qwen2-VL, each on top of the one before."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from vlmaccel.evals.easy_vqa import CELLS, PICTURE_SIZE, Collage, make_collage, pictures
from vlmaccel.training import demo_stages
from vlmaccel.training.demo_qwen2_vl_model import FAMILY, GRID, MERGE, TOKEN_SIZE, layout, vision
from vlmaccel.training.demo_stages import (
    PATCHES,
    Metrics,
    PatchHeads,
    answer_loss,
    ask,
    enlarge,
    fit,
    patch_labels,
)

VISION_BATCH, JOINT_BATCH = 8, 8
# patches in the tower's order, in which those of a visual token follow one another, by their numbers row by row
TOWER_ORDER = torch.arange(PATCHES).view(GRID, MERGE, GRID, MERGE).transpose(1, 2).flatten()


class PatchProjection(nn.Module):
    """A convolution whose kernel is as large as its inputs, as the one matrix product that it is.

    In bfloat16 on a CPU the convolution's backward pass takes longer than the rest of a training step.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = convolution.weight

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1))


def train_vision(model: Qwen2VLForConditionalGeneration, steps: int, seed: int) -> None:
    """The blocks of the vision tower alone: every patch tells shape and colour of what it shows."""
    rng = random.Random(seed)
    single = [picture for picture in pictures("train") if picture.label]
    visual = model.model.visual
    visual.patch_embed.proj = PatchProjection(visual.patch_embed.proj)
    heads = PatchHeads(visual.config.embed_dim)

    def loss(_: float) -> tuple[Tensor, Metrics]:
        scenes = [
            enlarge(rng.choice(single)) if rng.random() < 0.15 else make_collage("train", rng)
            for _ in range(VISION_BATCH)
        ]
        shapes, colors = (torch.stack(labels) for labels in zip(*map(patch_labels, scenes), strict=True))
        patches, _tokens = vision(model, [scene.pixels for scene in scenes])
        return heads.loss(heads.norm(patches.flatten(1, 2)), shapes[:, TOWER_ORDER], colors[:, TOWER_ORDER])

    blocks = [p for name, p in visual.named_parameters() if "merger" not in name]
    fit("vision", [*blocks, *heads.parameters()], loss, steps, 1.5e-3, autocast=True)


def train_binding(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, scenes: int, seed: int
) -> None:
    """Merger and language model on frozen features of so many scenes, see `demo_stages.train_binding`."""
    trained = [p for name, p in model.named_parameters() if "visual" not in name or "merger" in name]
    demo_stages.train_binding(model, tokenizer, FAMILY, trained, steps, scenes, seed, rate=1e-3, most=GRID * GRID)


def train_jointly(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """Everything together, with all visual tokens; one batch in five is of smaller pictures, all of one size."""
    rng = random.Random(seed)
    asked = [picture for picture in pictures("train") if picture.questions]
    patch_embed = model.model.visual.patch_embed
    patch_embed.proj = PatchProjection(patch_embed.proj)

    def loss(_: float) -> tuple[Tensor, Metrics]:
        rows, columns = (rng.randint(1, 3), rng.randint(1, 3)) if rng.random() < 0.2 else (3, 3)
        scenes, dialogues = [], []
        for _ in range(JOINT_BATCH):
            picture = rng.choice(asked) if rows == columns == 3 and rng.random() < 0.2 else None
            scene = enlarge(picture) if picture else corner(rng, rows, columns)
            scenes.append(scene)
            dialogues.append(ask(scene, picture, rng, 12))
        _patches, tokens = vision(model, [scene.pixels for scene in scenes])
        cell = PICTURE_SIZE // TOKEN_SIZE
        places = layout(rows * cell, columns * cell).batch(JOINT_BATCH)
        return answer_loss(model, tokenizer, FAMILY.prompt, tokens, places, dialogues)

    fit("joint", model.parameters(), loss, steps, 6e-4, autocast=FAMILY.autocast)


def corner(rng: random.Random, rows: int, columns: int) -> Collage:
    """So many rows and columns from the top left of a collage, with something in them."""
    while True:
        collage = make_collage("train", rng)
        inside = [cell for cell in range(CELLS) if cell // 3 < rows and cell % 3 < columns]
        objects = {cell: collage.objects[cell] for cell in inside if cell in collage.objects}
        if objects:
            pixels = collage.pixels[: rows * PICTURE_SIZE, : columns * PICTURE_SIZE]
            return Collage(pixels, objects, collage.backgrounds[inside])
