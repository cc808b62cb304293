"""Pictures and videos on their way into a decoder: what the vision tower makes of them, and where it goes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vlmaccel.adapters.base import picture_token_map, run_lengths
from vlmaccel.run import Modality, TokenMap

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def encode_pictures(base: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run the vision tower as `generate` does, so that one route tells every picture's number of tokens."""
    if inputs.get("mm_encoder_outputs") is not None:
        return inputs
    encoded = {}
    for modality, pixels in PIXELS.items():
        if inputs.get(pixels) is not None and inputs[pixels].shape[0] > 0:
            encoder = getattr(base, f"get_{modality}_features")
            wanted = [name for name in inspect.signature(encoder).parameters if name != "kwargs"]
            encoded[modality] = encoder(**{name: inputs[name] for name in wanted if name in inputs}, return_dict=True)
    if not encoded:
        return inputs
    return {**inputs, **dict.fromkeys(set(PIXELS.values()) & set(inputs)), "mm_encoder_outputs": encoded}


def placeholders(base: nn.Module, inputs: dict[str, Any], modality: str) -> Tensor:
    """(B, N) bool, the places that the model fills with the features of images or videos."""
    token = getattr(base.config, f"{modality}_token_id")
    if inputs.get("input_ids") is not None:
        return inputs["input_ids"] == token
    embeds = inputs["inputs_embeds"]
    return (embeds == base.get_input_embeddings()(torch.tensor(token, device=embeds.device))).all(-1)


def tiled_token_map(special: Tensor, side: int) -> TokenMap:
    """Token map of a batch whose images are the tokens `special` (B, N) bool: a picture is a run of them, of one or several
    square tiles of `side` rows, which are its views."""
    grids = []
    for n in run_lengths(special):
        tiles = n // side**2
        whole = tiles * side**2 == n  # but not where a chunk of a prompt has a part of one
        grids.append(torch.cat([raster(tile, side**2, side) for tile in range(tiles)]) if whole else nowhere(n))
    return picture_token_map(special, [len(grid) for grid in grids], Modality.IMAGE, None, grids)


def raster(view: int, n: int, width: int) -> Tensor:
    """(n, 3) view, row and column of n tokens in rows of `width`."""
    index = torch.arange(n)
    return torch.stack([torch.full_like(index, view), index // width, index % width], 1)


def nowhere(n: int) -> Tensor:
    """(n, 3), tokens without a place in a grid."""
    return torch.full((n, 3), -1)
