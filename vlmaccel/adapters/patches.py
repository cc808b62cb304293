"""What a vision tower looks at, on its way to methods that act before the decoder.

`generate` encodes pictures before the decoder's forward, repeats them for beams and cuts them into chunks; models put
newlines between patches, and leave out padding. So the patch of a token is found by what the token is, to the bit,
wherever it went.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vlmaccel.adapters.vision import VisionHooks
from vlmaccel.adapters.watched_attention import WatchedAttention
from vlmaccel.kernels.score_rows import score_rows
from vlmaccel.reduction import Reduction, gather
from vlmaccel.run import Patches, TokenMap

MARK = "_vlmaccel_patches"  # where what a tower gives out keeps what it looked at


@dataclass(frozen=True, eq=False)
class Block:
    """The attention of a block, as it has just run.

    projected: outputs of its modules that make queries and keys, by name. kwargs: what it was called with.
    merged: what tokens were merged in blocks before, None if none. bias: (B, n) float on the keys, or None.
    lse: (B, H, n) float32, the log-sum-exp of the rows, where the block's attention told it.
    """

    attention: Any
    projected: Mapping[str, Tensor]
    kwargs: Mapping[str, Any]
    merged: Reduction | None
    bias: Tensor | None
    lse: Tensor | None


@dataclass(frozen=True, eq=False)
class PatchParts:
    """Where a model makes tokens of pictures.

    tower: gives out a `ModelOutput` that lives at least as long as the pictures' features are on their way.
    attention: of the block to look at. projections: the names of its modules that make queries and keys.
    look: makes of them what `Patches` calls attention (P, n) and keys (P, n, head_dim), leading tokens that are no
        patches included.
    projector: makes tokens (..., D). one_by_one: whether each of one patch, so that methods average what goes in.
    newline: gives a token (D,) that the model puts between those of patches; None if it puts none.
    """

    tower: nn.Module
    attention: nn.Module
    projections: tuple[str, ...]
    look: Callable[[Block], tuple[Tensor, Tensor]]
    projector: nn.Module
    one_by_one: bool
    newline: Callable[[], Tensor | None] | None = None


@dataclass(eq=False)
class Seen:
    """What one pass of pictures looked at: as from `PatchParts.look`, then of the M patches alone, with features (M, C) and
    tokens (M, D)."""

    attention: Tensor
    keys: Tensor
    features: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(eq=False)
class Local(threading.local):
    """The passes of this thread: what the running one has projected, the last one, and what is left of all."""

    projected: dict[str, Tensor] = field(default_factory=dict)
    watched: WatchedAttention | None = None
    now: Seen | None = None
    outputs: list[weakref.ref[ModelOutput]] = field(default_factory=list)


class PatchHooks:
    """Watches one block of a vision tower and its projector, and finds their patches among the decoder's tokens.

    Hooks are bound methods, so that copies of the model take their own along; tensors live in what the tower gives out.
    """

    def __init__(self, parts: PatchParts, vision: VisionHooks | None) -> None:
        self.parts, self.vision = parts, vision
        self._local = Local()

    def install(self, model: nn.Module) -> list[Any]:
        """Put the hooks in and return their handles."""
        parts = self.parts
        handles: list[Any] = [
            getattr(parts.attention, name).register_forward_hook(partial(self._on_projection, name))
            for name in parts.projections
        ]
        handles.append(parts.attention.register_forward_pre_hook(self._before_attention))
        handles.append(parts.attention.register_forward_hook(self._leave_attention, always_call=True))
        handles.append(parts.attention.register_forward_hook(self._on_attention, with_kwargs=True))
        handles.append(parts.projector.register_forward_hook(self._on_projector))
        handles.append(parts.tower.register_forward_hook(self._on_tower))
        return handles

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=Local())

    @torch.compiler.disable
    def _on_projection(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._local.projected[name] = output.detach()

    @torch.compiler.disable
    def _before_attention(self, module: nn.Module, args: tuple) -> None:
        self._local.watched = WatchedAttention()
        self._local.watched.__enter__()

    @torch.compiler.disable
    def _leave_attention(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._local.watched is not None:
            self._local.watched.__exit__(None, None, None)

    @torch.compiler.disable
    @torch.no_grad()
    def _on_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        projected, self._local.projected = self._local.projected, {}
        watched, self._local.watched = self._local.watched, None
        merged, bias = (None, None) if self.vision is None else self.vision.merged
        lse = None if watched is None else watched.lse
        self._local.now = Seen(*self.parts.look(Block(module, projected, kwargs, merged, bias, lse)))

    @torch.compiler.disable
    def _on_projector(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        now = self._local.now
        if now is None or now.tokens is not None:
            return
        pictures, n = now.attention.shape
        tokens = output.detach().reshape(pictures, -1, output.shape[-1])
        patches = slice(n - tokens.shape[1], None)  # class and register tokens are not projected by most
        now.tokens = tokens.flatten(0, 1)
        features = args[0].detach() if self.parts.one_by_one else tokens
        now.features = features.reshape(len(now.tokens), -1)
        now.attention, now.keys = now.attention[:, patches].flatten(), now.keys[:, patches].flatten(0, 1)

    @torch.compiler.disable
    def _on_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._local.now is not None and isinstance(output, ModelOutput):
            setattr(output, MARK, self._local.now)
            self._local.outputs = [ref for ref in self._local.outputs if ref() is not None] + [weakref.ref(output)]

    @torch.no_grad()
    def find(self, tokens: TokenMap, embeds: Tensor) -> Patches:
        """See `vlmaccel.hooks.VisualTokens.patches`. tokens: what the rows of the input embeddings (B, N, D) are."""
        visual = (tokens.image >= 0).to(embeds.device)
        wanted = embeds[visual]
        if not bool(wanted.isfinite().all()):
            raise ValueError("tokens of pictures are not finite; load the model in bfloat16 or float32")
        number = torch.full((len(wanted),), -1, device=embeds.device)
        used: list[Seen] = []
        rows = 0
        for seen in self._seen():
            assert seen.tokens is not None and seen.features is not None
            found = find_rows(wanted, seen.tokens.to(wanted))
            found.masked_fill_(number >= 0, -1)
            if bool((found >= 0).any()):
                number = torch.where(found >= 0, found + rows, number)
                rows += len(seen.tokens)
                used.append(seen)
            if bool((number >= 0).all()):
                break
        self._check(wanted[number < 0], len(wanted))
        row = torch.full_like(tokens.image, -1, device=embeds.device).masked_scatter(visual, number)
        attention, keys, features = (
            torch.cat([getattr(seen, name).to(embeds.device) for seen in used])
            if used
            else embeds.new_zeros(1, *[1] * (name != "attention"))  # newlines only
            for name in ("attention", "keys", "features")
        )
        if bool(attention.isnan().any()):
            raise ValueError("the vision tower's attention is NaN; load the model in bfloat16 or float32")
        return Patches(row, attention, keys, features, self.parts.projector if self.parts.one_by_one else unchanged)

    def _seen(self) -> list[Seen]:
        """What is left of the passes, the last one first."""
        outputs = [ref() for ref in reversed(self._local.outputs)]
        found = [getattr(output, MARK) for output in outputs if output is not None]
        return [seen for seen in found if seen.tokens is not None]

    def _check(self, others: Tensor, visual: int) -> None:
        """Raise ValueError unless the visual tokens (K, D) that are no patch are newlines."""
        newline = self.parts.newline() if len(others) and self.parts.newline else None
        if newline is not None:
            others = others[find_rows(others, newline.to(others)[None]) < 0]
        if len(others):
            raise ValueError(
                f"of {visual} visual tokens, {len(others)} are not what the projector made of patches in this thread, so "
                "there is no attention to go by: they were interpolated (large pictures and videos in LLaVA-OneVision), or "
                "encoded before the model was patched"
            )


def received(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    """(B, n) float32, the sum over all queries (B, H, Q, head_dim) of the softmax attention that each key (B, H, n,
    head_dim) gets, the mean over heads. bias: (B, n) on the keys' logits, or None. lse: (B, H, Q) of all logits, if known."""
    batch, _, n, _ = key.shape
    row = torch.zeros(batch, query.shape[2], dtype=torch.long, device=key.device)
    index = torch.zeros(batch, 1, n, dtype=torch.long, device=key.device)  # all see all
    bias = None if bias is None else bias.float()[:, None]
    return score_rows(query, key, row, index, bias, scale, 0, "sum", lse).mean(1)


def look_at_batch(classified: bool, block: Block) -> tuple[Tensor, Tensor]:
    """`PatchParts.look` of a tower whose pictures are a batch: q_proj and k_proj give out (B, n, H * head_dim).

    classified: whether the first token is a class token, whose attention counts; otherwise that of all tokens.
    """
    attention, merged = block.attention, block.merged
    query, key = (
        block.projected[name].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in ("q_proj", "k_proj")
    )
    if classified:
        query = query[:, :, :1]
    elif merged is not None:
        query = gather(query, merged.group, 2)  # every token that was merged looks
    lse = block.lse
    if lse is not None:
        lse = lse[:, :, :1] if classified else lse if merged is None else gather(lse, merged.group, 2)
    share, keys = received(query, key, attention.head_dim**-0.5, block.bias, lse), key.float().mean(1)
    return (share, keys) if merged is None else (merged.unmerge(share / merged.size), merged.unmerge(keys))


def find_rows(x: Tensor, table: Tensor) -> Tensor:
    """(K,) int64, the row of `table` (M, D), the first of several, that each row of x (K, D) equals to the bit, or -1."""
    if not len(table):
        return torch.full((len(x),), -1, device=x.device)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    x, table = x.contiguous().view(kind), table.contiguous().view(kind)
    some = torch.arange(0, x.shape[-1], max(1, x.shape[-1] // 256), device=x.device)
    factor = torch.randint(2**62, some.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    # equal for equal rows, and for hardly any others
    name, names = ((rows[:, some] * factor).sum(-1) for rows in (x, table))
    names, order = names.sort(stable=True)
    row = order[torch.searchsorted(names, name).clamp(max=len(names) - 1)]
    return row.masked_fill((table[row] != x).any(-1), -1)


def unchanged(x: Tensor) -> Tensor:
    """What averages of tokens become: tokens."""
    return x
