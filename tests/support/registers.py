"""The slow account of registers: rows put in and taken out by hand, every row's mask written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.reference import Prompt, Reference

Picture = tuple[list[int], Tensor]  # its tokens in the sample, and its registers (R, D)


def pictures_of(model: Any, batch: dict[str, Tensor], b: int, lengths: Sequence[int]) -> list[list[int]]:
    """The tokens of every picture of sample b without its padding; lengths: of its pictures, in the order they come."""
    config = model.config
    special = (config.image_token_id, getattr(config, "video_token_id", None))
    ids = batch["input_ids"][b, batch["attention_mask"][b].bool()].tolist()
    visual = [place for place, token in enumerate(ids) if token in special]
    assert sum(lengths) == len(visual)
    found = []
    for n in lengths:
        found.append(visual[:n])
        visual = visual[n:]
    return found


@torch.no_grad()
def register_logits(
    model: nn.Module, sample: Any, pictures: list[Picture], layer: int, ends: Sequence[int] = ()
) -> Tensor:
    """(n, vocab) float64 logits of a sample's n tokens, NaN of those that were dropped before `layer`.

    sample: as `Reference.embed` or `Reference.followed` gives it. ends: tokens that ended a forward, which stay as the last one
    does. Every row sees itself and the rows that lie before it.
    """
    reference = Reference(model)
    if isinstance(sample, Tensor):
        sample = Prompt(sample, torch.arange(len(sample)), [])
    n = len(sample)
    rows, token, where, visual = [], [], [], set()
    added: list[list[Tensor]] = [[] for _ in sample.added]
    for place in range(n):
        rows.append(sample.embeds[place])
        token.append(place)
        for more, given in zip(added, sample.added, strict=True):
            more.append(given[place])
        for tokens, registers in pictures:
            if place != tokens[-1]:
                continue
            visual |= set(tokens)
            for register in registers.double():
                rows.append(register)
                token.append(-1)
                for more in added:
                    more.append(torch.zeros_like(register))
        where += [sample.places[..., place]] * (len(rows) - len(where))
    hidden, places = torch.stack(rows), torch.stack(where, -1)
    token, deep = torch.tensor(token), [torch.stack(more) for more in added]
    last = {n - 1, *ends}
    for k, weights in enumerate(reference.layers):
        if k == layer:  # the model reads its next token off the last one, whatever that is
            stays = [i for i, t in enumerate(token.tolist()) if t not in visual or t in last]
            hidden, places, token, deep = (
                hidden[stays],
                places[..., stays],
                token[stays],
                [more[stays] for more in deep],
            )
        rows_now = len(hidden)
        sees = torch.tensor([[j <= i for j in range(rows_now)] for i in range(rows_now)])[None]
        hidden = reference._layer(k, weights, hidden, torch.arange(rows_now), places, (), sees)
        if k < len(deep):
            hidden = hidden + deep[k]
    logits = torch.full((n, len(reference.head)), torch.nan, dtype=torch.double)
    logits[token[token >= 0]] = (reference._norm(hidden, reference.text.norm.weight.double()) @ reference.head.T)[
        token >= 0
    ]
    return logits


def assert_same(mine: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    """Logits (n, vocab) equal the reference's of every token that is still there."""
    there = ~theirs.isnan().any(1)
    assert there.any()
    assert (mine[there] - theirs[there]).abs().max() < tolerance
