"""Adapter: one model family, described; and how the right one is found for a model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from vlmaccel.adapters.patches import PatchParts
from vlmaccel.adapters.vision import VisionParts
from vlmaccel.hooks import Method
from vlmaccel.run import Modality, TokenMap

BUILTIN = (
    "llava",
    "qwen_vl",
    "internvl",
    "idefics3",
    "timm_vit",
    "open_clip_vit",
    "transformers_vit",
    "text",
)  # modules of this folder, most specific first


@dataclass(frozen=True, eq=False)
class Parts:
    """Where a model keeps what the hooks need.

    base: the module that is given `input_ids` (and pictures). text: the decoder stack, which calls `layers` one after
    the other, then `norm`; `rotary(hidden, position_ids)` gives cos and sin. `config` has the decoder's sizes. axes: positions
    that a token has, 3 for time, row and column (M-RoPE). deepstack: after so many first layers, `text` adds features of the
    pictures to its hidden states, which have to be whole there.
    """

    base: nn.Module
    text: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary: nn.Module
    config: Any
    axes: int = 1
    deepstack: int = 0


class Adapter:
    """A model family. A package adds one with the entry point group `vlmaccel.adapters`, or with `register`."""

    name: str = ""
    summary: str = ""
    hook_points: tuple[str, ...] = ("visual_tokens", "decoder_layer", "attention", "cache")
    multimodal: bool = False

    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter is meant for `model`."""
        raise NotImplementedError

    def parts(self, model: nn.Module) -> Parts | None:
        """Find the parts of the decoder, None if there is none; raises NotImplementedError naming what is missing."""
        raise NotImplementedError

    def default(self, depth: int) -> Method:
        """The recipe of `patch(model)` for a decoder of `depth` layers (or a tower of so many blocks without one)."""
        raise NotImplementedError

    def vision(self, model: nn.Module) -> VisionParts:
        """Find the blocks of the vision tower, where the adapter has the hook point `vision_block`."""
        raise NotImplementedError

    def patches(self, model: nn.Module) -> PatchParts:
        """Find where the vision tower's attention can be seen; raises NotImplementedError where it cannot."""
        raise NotImplementedError(
            f"the method reads the attention of a vision tower, which the adapter {self.name!r} does not have; those of "
            "LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL and Qwen3-VL do"
        )

    def depth(self, model: nn.Module) -> int:
        """Layers of the decoder, or blocks of the tower where there is no decoder."""
        parts = self.parts(model)
        return len(self.vision(model).blocks if parts is None else parts.layers)

    def encode(self, base: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], TokenMap | None]:
        """Given the keyword inputs of `Parts.base`, say what every token is (None: all text).

        It may return other inputs that mean the same, such as pictures already encoded.
        """
        return inputs, None


_registered: list[Adapter] = []


def register(adapter: Adapter) -> Adapter:
    """Add an adapter; it is asked before the ones that come with vlmaccel."""
    if not adapter.name or not adapter.summary:
        raise ValueError(f"an adapter needs a name and a one-line summary, {type(adapter).__name__} has not both")
    _registered.insert(0, adapter)
    return adapter


@cache
def _installed() -> tuple[Adapter, ...]:
    external = [point.load() for point in entry_points(group="vlmaccel.adapters")]
    builtin = [import_module(f"vlmaccel.adapters.{name}").ADAPTER for name in BUILTIN]
    return (*external, *builtin)


def all_adapters() -> list[Adapter]:
    """Every adapter there is, in the order they are asked."""
    return [*_registered, *_installed()]


def find_adapter(model: nn.Module) -> Adapter:
    """The first adapter that is meant for `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch needs a torch.nn.Module, not {type(model).__name__}")
    for adapter in all_adapters():
        if adapter.matches(model):
            return adapter
    known = "; ".join(f"{a.name} ({a.summary})" for a in all_adapters())
    raise NotImplementedError(
        f"no adapter for {type(model).__name__}. There are: {known}. "
        "A new family is one Adapter, added with vlmaccel.adapters.base.register or the entry point vlmaccel.adapters"
    )


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module` as keywords."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def picture_token_map(
    special: Tensor,
    lengths: list[int],
    modality: int,
    others: TokenMap | None = None,
    grids: list[Tensor] | None = None,
) -> TokenMap:
    """Token map of a batch whose tokens of a `modality`, image or video, are `special` (B, N) bool.

    lengths: tokens of each picture, over the batch in order. others: the map so far, None if all else is text; its pictures
    come before these in every sample's count. grids: (length, 3) place of each picture's tokens, None if there is none.
    Chunked prefill gives what a chunk has of all pictures in one piece; it is taken apart where the tokens are, of videos only
    sample by sample, since there may be words between the frames of one.
    Raises ValueError if the pictures do not fill the tokens, sample by sample.
    """
    if len(lengths) == 1 and lengths[0] == int(special.sum()):
        lengths = run_lengths(special) if modality == Modality.IMAGE else [n for n in special.sum(1).tolist() if n]
    batch, n = special.shape
    what, shown = ("image", "pictures") if modality == Modality.IMAGE else ("video", "videos")
    tokens = TokenMap.text(batch, n, special.device) if others is None else others
    before = (tokens.image.amax(1) + 1).tolist()
    number: list[int] = []
    left = list(lengths)
    for sample, wanted in enumerate(special.sum(1).tolist()):
        filled, count = 0, before[sample]
        while filled < wanted:
            if not left or filled + left[0] > wanted:
                raise ValueError(
                    f"sample {sample} has {wanted} {what} tokens, which the {shown} given (of {lengths} tokens, in order "
                    f"over the batch) do not fill: each sample needs one {what} token per feature of its {shown}"
                )
            number += [count] * left[0]
            filled, count = filled + left.pop(0), count + 1
    if left:
        raise ValueError(
            f"{len(lengths)} {shown} were given, but the {what} tokens of the prompts are filled by "
            f"{len(lengths) - len(left)}"
        )
    image = tokens.image.masked_scatter(special, torch.tensor(number, dtype=torch.long, device=special.device))
    grid = tokens.grid.clone()
    if grids:
        grid[special] = torch.cat(grids).to(special.device)
    return TokenMap(tokens.modality.masked_fill(special, modality), image, grid)


def run_lengths(special: Tensor) -> list[int]:
    """Lengths of the runs of neighbouring true entries of (B, N) bool, sample by sample."""
    edges = torch.nn.functional.pad(special.int(), (1, 1)).diff()
    return (edges.eq(-1).nonzero()[:, 1] - edges.eq(1).nonzero()[:, 1]).tolist()
