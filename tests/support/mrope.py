"""Positions with three axes, time, row and column (M-RoPE, arXiv 2409.12191), worked out from the token ids alone.

Text has the same number on every axis. A picture's tokens add their frame, row and column to the number that follows the text
before it; what comes next goes on after the largest number so far. In Qwen2.5-VL (arXiv 2502.13923) time runs in
`tokens_per_second` steps a second; in Qwen3-VL (arXiv 2511.21631) every frame of a video is a picture of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def places(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """(3, n) positions of every sample of a batch, without its padding."""
    config = model.config
    merge = config.vision_config.spatial_merge_size
    grids = {
        config.image_token_id: inputs.get("image_grid_thw", torch.empty(0, 3)).tolist(),
        config.video_token_id: inputs.get("video_grid_thw", torch.empty(0, 3)).tolist(),
    }
    if config.model_type.startswith("qwen3_vl"):
        grids[config.video_token_id] = [[1, h, w] for t, h, w in grids[config.video_token_id] for _ in range(t)]
    seconds = inputs.get("second_per_grid_ts", torch.ones(0)).tolist()
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        row, at = ids[mask].tolist(), []
        while len(at) < len(row):
            token, start = row[len(at)], 1 + max((max(place) for place in at), default=-1)
            if token not in grids:
                at.append((start, start, start))
                continue
            frames, height, width = grids[token].pop(0)
            step = 1.0
            if token == config.video_token_id and config.model_type == "qwen2_5_vl":
                step = seconds.pop(0) * config.vision_config.tokens_per_second
            # transformers goes on behind the last row or column even if a video's time runs further
            assert (frames - 1) * step < max(height, width) // merge
            at += [
                (start + int(f * step), start + r, start + c)
                for f in range(frames)
                for r in range(height // merge)
                for c in range(width // merge)
            ]
        found.append(torch.tensor(at).T)
    return found


def axis_of(config: Any, half: int) -> list[int] | None:
    """Which axis each of the `half` rotary frequencies of a head turns by; None if there is only one.

    Qwen2-VL and Qwen2.5-VL: so many for time, then so many for rows, then for columns. Qwen3-VL: in turn, as far as the counts
    of rows and columns go.
    """
    sections = (config.rope_parameters or {}).get("mrope_section")
    if sections is None:
        return None
    if config.model_type.startswith("qwen3_vl"):
        return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(half)]
    return [axis for axis, count in enumerate(sections) for _ in range(count)]


def places_behind(model: Any, inputs: dict[str, Tensor], seen: int, n: int) -> dict[str, Tensor]:
    """`position_ids` (3, B, n) for a call with n text tokens over a cache that holds the prompt and `seen` more of them.

    Nothing where models count positions by themselves; Qwen-VL does so in `generate` only.
    """
    if "mm_token_type_ids" not in inputs:
        return {}
    ends = torch.stack([at.max() for at in places(model, inputs)])
    return {"position_ids": (ends[:, None] + 1 + seen + torch.arange(n)).expand(3, -1, -1)}
