"""Registers: rows behind a picture's tokens that stand for it once the tokens are dropped. Here, those that need no training.

Where they stand and when the tokens go is as in Victor (Wen et al., "Victor: Efficient Vision-Language Models with Visual
Registers", arXiv 2410.14072), whose registers are learned; here they are pooled from the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmaccel.hooks import DecoderLayer, Insertion, Method, VisualTokens
from vlmaccel.methods.pool import pool
from vlmaccel.methods.selection import check_choice, check_layer, drop, places
from vlmaccel.reduction import Reduction

Pooling = Literal["grid", "attention"]


class RegisterMethod(Method):
    """Put registers behind the tokens of every picture or video, and drop these before a decoder layer.

    Until then registers see all that is before them, and what follows sees tokens and registers; later, registers and text
    go on alone. Registers share the position of their picture's last token, so that no other position changes.
    layer: decoder layer (0-based) whose input is the first without the tokens. None: 3 of 32, as in Victor, in proportion, at
        least 1.
    """

    layer: int | None = None

    def first(self, depth: int) -> int:
        """The decoder layer before which tokens are dropped."""
        return max(1, round(3 * depth / 32)) if self.layer is None else self.layer

    def registers_of(self, at: VisualTokens, sample: int, index: Tensor) -> Tensor | None:
        """(R, D), registers of the picture whose tokens are the rows `index` (n,) of a sample; None leaves the picture as it
        is."""
        raise NotImplementedError

    def insert(self, at: VisualTokens) -> Insertion | None:
        image = at.tokens.image
        rows: list[Tensor] = []
        behind: list[list[int]] = [[] for _ in image]
        for sample, numbers in enumerate(image):
            for number in range(int(numbers.max()) + 1):
                index = (numbers == number).nonzero().flatten()
                registers = self.registers_of(at, sample, index) if len(index) else None
                if registers is not None:
                    rows.append(registers.to(at.hidden))
                    behind[sample] += [int(index[-1])] * len(registers)
        most = max(map(len, behind))
        if most == 0:
            return None
        token = torch.tensor([[*one, *[-1] * (most - len(one))] for one in behind], device=image.device)
        whole = at.hidden.new_zeros(*token.shape, at.hidden.shape[2])
        there = (token >= 0).to(whole.device)[..., None]
        return Insertion(token, whole.masked_scatter(there, torch.cat(rows)))

    def decoder_layers(self, depth: int) -> Sequence[int]:
        return (self.first(depth),)

    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        if at.run.reduction is None or not at.run.reduction.inserts:
            return None
        picture = at.run.tokens.image.gather(1, at.run.reduction.keep) + 1  # 0 collects what is in none
        summarised = torch.zeros(len(picture), int(picture.max()) + 1, dtype=torch.long, device=picture.device)
        summarised.scatter_add_(1, picture, at.run.reduction.inserted.long())
        return drop(at, (at.tokens.image >= 0) & (summarised.gather(1, picture) > 0))


@dataclass(frozen=True)
class Registers(RegisterMethod):
    """Drop every picture's tokens for a few registers that are pooled from them (training-free).

    registers: of a picture, at most; so many tokens or fewer stay as they are. Default 8, that of Victor's main result.
    layer: see `RegisterMethod`; 0 drops the tokens before the decoder.
    pooling: "grid" (default), means of the cells of a coarser grid, videos in as many stretches of time; or "attention", for each
        cell the mean of all tokens of the picture weighed by their attention from the cell's mean, softmax(q x / sqrt(D)).
    """

    name = "registers"

    registers: int = 8
    layer: int | None = None
    pooling: Pooling = "grid"

    def __post_init__(self) -> None:
        check_registers("registers", self.registers)
        if self.layer is not None:
            check_layer(self.layer)
        check_choice("pooling", self.pooling, get_args(Pooling))

    def registers_of(self, at: VisualTokens, sample: int, index: Tensor) -> Tensor | None:
        if len(index) <= self.registers:
            return None
        view = at.tokens.grid[sample, index, 0]
        label = pool(places(at)[sample, index], stretches(view, self.registers), self.registers)
        tokens = at.hidden[sample, index].float()
        member = torch.nn.functional.one_hot(label.unique(return_inverse=True)[1]).to(tokens).T  # (R, n)
        registers = member @ tokens / member.sum(1, keepdim=True)
        if self.pooling == "attention":
            registers = (registers @ tokens.T / tokens.shape[1] ** 0.5).softmax(1) @ tokens
        return registers


def check_registers(name: str, count: object) -> None:
    """Raise ValueError unless `count` is a number of registers."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"{name} is the number of registers of a picture, 1 or more, not {count!r}; "
            "learned ones come from a file, with the method 'victor'"
        )


def stretches(view: Tensor, most: int) -> Tensor:
    """(n,) the views (frames, tiles) of n tokens, neighbouring ones put together so that there are at most so many."""
    number = view.unique(return_inverse=True)[1]
    count = int(number.max()) + 1
    return number * min(count, most) // count
