"""Victor: learned registers stand for every picture, whose tokens are dropped after the first layers.

Wen et al., "Victor: Efficient Vision-Language Models with Visual Registers", arXiv 2410.14072. `vlmaccel.training.registers`
trains them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmaccel._version import __version__
from vlmaccel.hooks import VisualTokens
from vlmaccel.methods.registers import RegisterMethod, check_registers
from vlmaccel.methods.selection import check_layer

NAME = "registers"  # of the tensor in a file
FACTS = ("count", "width", "layer", "model_type", "vlmaccel")  # its metadata


@dataclass(frozen=True, eq=False, repr=False)
class Victor(RegisterMethod):
    """Drop every picture's tokens for a few learned registers.

    registers: a file that `save_registers` wrote, or a tensor (M, D) of the width D of the decoder, which may be a parameter that
        is being trained.
    layer: see `RegisterMethod`; default None, the file's. At least 1: registers have to see the tokens.
    count: M that is expected, or None; registers trained for one M are not good at another.
    Raises FileNotFoundError if there is no such file, ValueError for one that is not of registers or not of so many.
    """

    name = "victor"

    registers: str | PathLike[str] | Tensor
    layer: int | None = None
    count: int | None = None
    learned: Tensor = field(init=False)
    model_type: str | None = field(init=False)

    def __post_init__(self) -> None:
        learned, layer, model_type = self.registers, None, None
        if not isinstance(learned, Tensor):
            learned, facts = load_registers(learned)
            layer, model_type = int(facts["layer"]), facts["model_type"]
        if learned.ndim != 2 or not len(learned) or not learned.is_floating_point():
            raise ValueError(
                f"registers are a floating point tensor (M, D), not {learned.dtype} of shape {tuple(learned.shape)}"
            )
        if self.layer is not None:
            check_layer(self.layer, first=1)
        if self.count is not None:
            check_registers("count", self.count)
            if self.count != len(learned):
                raise ValueError(
                    f"{self._where} has {len(learned)} registers, not the {self.count} that count asks for"
                )
        object.__setattr__(self, "learned", learned)
        object.__setattr__(self, "layer", layer if self.layer is None else self.layer)
        object.__setattr__(self, "model_type", model_type)

    @property
    def _where(self) -> str:
        given = self.registers
        return f"the tensor {tuple(given.shape)}" if isinstance(given, Tensor) else str(given)

    def __repr__(self) -> str:
        return f"Victor(registers={self._where!r}, layer={self.layer}, count={len(self.learned)})"

    def check_decoder(self, width: int, model_type: str) -> None:
        mine = f"width {self.learned.shape[1]}", self.model_type or model_type
        theirs = f"width {width}", model_type
        if mine != theirs:
            raise ValueError(
                f"{self._where} has registers for a decoder of {' in '.join(mine)}, and this model's is one of {' in '.join(theirs)}: "
                "they were trained for another model"
            )

    def registers_of(self, at: VisualTokens, sample: int, index: Tensor) -> Tensor:
        return self.learned


def save_registers(path: str | PathLike[str], registers: Tensor, layer: int, model_type: str) -> None:
    """Write registers (M, D) as a safetensors file, in their dtype.

    layer: the decoder layer (0-based, 1 or more) that they were trained for. model_type: of the model's configuration.
    """
    check_layer(layer, first=1)
    count, width = registers.shape
    facts = dict(zip(FACTS, map(str, (count, width, layer, model_type, __version__)), strict=True))
    save_file({NAME: registers.detach().cpu().contiguous()}, Path(path), metadata=facts)


def load_registers(path: str | PathLike[str]) -> tuple[Tensor, dict[str, str]]:
    """Registers (M, D) and the `FACTS` of a file that `save_registers` wrote.

    Raises FileNotFoundError, or ValueError saying what is wrong with the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of registers {path}")
    try:
        with safe_open(path, framework="pt") as file:
            facts, names = file.metadata() or {}, list(file.keys())
            if NAME not in names or (lacks := [fact for fact in FACTS if fact not in facts]):
                missing = f"tensor {NAME!r}" if NAME not in names else f"metadata {', '.join(lacks)}"
                raise ValueError(f"{path} is not a file of registers: it has no {missing}")
            registers = file.get_tensor(NAME)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if [str(n) for n in registers.shape] != [facts["count"], facts["width"]]:
        raise ValueError(
            f"{path} says {facts['count']} registers of width {facts['width']}, but holds {tuple(registers.shape)}"
        )
    return registers, facts
