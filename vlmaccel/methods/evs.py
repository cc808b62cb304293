"""EVS: of a video, keep the tokens that differ from the same place in the frame before.

"Efficient Video Sampling", Bagrov et al., 2025, arXiv 2510.14624.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmaccel.hooks import DecoderLayer
from vlmaccel.methods.selection import SingleStage, drop, droppable
from vlmaccel.reduction import Reduction
from vlmaccel.run import Modality


@dataclass(frozen=True)
class EVS(SingleStage):
    """Before the decoder, rank the tokens of every video by 1 - cosine to the token at the same place one frame earlier; the
    first frame stays whole. Pictures are left as they are.

    ratio: retention ratio, int(N * ratio) tokens of a video of N, at least its first frame; default 0.25, the pruning rate of
        0.75 in the paper's examples. layer: default 0. positions: default "keep", as in vLLM. Needs a model whose videos have
        frames (Qwen-VL).
    """

    name = "evs"

    layer: int = 0
    ratio: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "text":
            raise ValueError('evs ranks the tokens of videos: target is "image" or None')

    @torch.no_grad()
    def decoder_layer(self, at: DecoderLayer) -> Reduction | None:
        segment = droppable(at, self.target)
        video = at.tokens.modality == Modality.VIDEO
        if segment is None or self.ratio == 1 or not bool(video.any()):
            return None
        dropped = torch.zeros_like(video)
        for sample in range(len(video)):
            for number in segment[sample][video[sample]].unique().tolist():
                index = (segment[sample] == number).nonzero().flatten()
                score = change(at.hidden[sample, index], at.tokens.grid[sample, index])
                if bool(score.isnan().any()):
                    raise ValueError("evs: tokens of a video are NaN; load the model in bfloat16 or float32")
                kept = max(int(score.isinf().sum()), int(len(index) * self.ratio))
                dropped[sample, index[score.argsort(descending=True, stable=True)[kept:]]] = True
        return drop(at, dropped) if bool(dropped.any()) else None


def change(x: Tensor, grid: Tensor) -> Tensor:
    """(m,) float32, how unlike the token at its place one frame earlier each token x (m, d) is, infinity where there is none.

    grid: (m, 3) frame, row and column.
    """
    at = {tuple(place): number for number, place in enumerate(grid.tolist())}
    before = torch.tensor(
        [at.get((frame - 1, row, column), -1) for frame, row, column in grid.tolist()], device=x.device
    )
    unlike = 1 - cosine_similarity(x.float(), x[before.clamp(min=0)].float(), dim=-1)
    return unlike.masked_fill(before < 0, torch.inf)
