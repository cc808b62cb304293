"""StreamingLLM: keep the first tokens, where attention sinks, and the newest.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv 2309.17453.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmaccel.hooks import CacheEntries
from vlmaccel.methods.streaming import Streaming


@dataclass(frozen=True)
class StreamingLLM(Streaming):
    """Keep `sinks` first tokens (default 4, section 3) and the newest; nothing is scored. A floor for other methods: of a
    picture before a long question nothing is left.

    Tokens keep their original positions; the official code numbers what is left from 0, which a model needs only beyond
    the length that it was trained on. every, budget, recent: see `Streaming`.
    """

    name = "streaming-llm"

    def score(self, at: CacheEntries) -> Tensor:
        return at.slots.index.float()
