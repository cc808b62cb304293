"""Merging inside the blocks of a vision tower, between attention and MLP, by hooks alone.

A block adds its MLP's output to what went into the MLP, so it has to be given back as many tokens as it holds: the MLP
runs on the merged tokens, its output is spread over their members, and the sum is merged. As every member has the same
share of the output, merge(x + spread(y)) is merge(x) + y: exactly the block on merged tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmaccel.hooks import Method, VisionBlock, check_fits
from vlmaccel.reduction import Reduction


@dataclass(frozen=True, eq=False)
class BlockParts:
    """One block of a vision tower. keys: the projection whose output (B, N, heads * head_dim) is the keys."""

    block: nn.Module
    attention: nn.Module
    keys: nn.Module
    norm: nn.Module
    mlp: nn.Module
    heads: int


@dataclass(frozen=True, eq=False)
class VisionParts:
    """A vision tower. prefix: leading tokens that are no patches. last: block after which every patch has to be there
    again, because its output is used."""

    tower: nn.Module
    blocks: Sequence[BlockParts]
    prefix: int
    last: int


class VisionLocal(threading.local):
    """State of the tower's forward pass in this thread."""

    whole: Reduction | None = None  # of all blocks so far
    here: Reduction | None = None  # of the block at hand
    metric: Tensor | None = None
    done: bool = False


class VisionHooks:
    """Calls `vision_block` of the methods in every block, and spreads the tokens out again at the end."""

    def __init__(self, parts: VisionParts, methods: Sequence[Method]) -> None:
        self.parts, self.methods = parts, tuple(methods)
        self.proportional = any(method.proportional for method in methods)
        self._local = VisionLocal()

    def install(self) -> list[Any]:
        """Put the hooks in and return their handles."""
        handles = [self.parts.tower.register_forward_pre_hook(self._on_tower)]
        for i, part in enumerate(self.parts.blocks):
            handles += [
                part.attention.register_forward_pre_hook(self._on_attention, with_kwargs=True),
                part.keys.register_forward_hook(partial(self._on_keys, part.heads)),
                part.norm.register_forward_pre_hook(partial(self._on_norm, i)),
                part.mlp.register_forward_hook(self._on_mlp),
                # before the hooks with which transformers records hidden states, so that it records every patch
                part.block.register_forward_hook(partial(self._on_block, i), prepend=True),
            ]
        return handles

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=VisionLocal())

    @torch.compiler.disable
    def _on_tower(self, module: nn.Module, args: tuple) -> None:
        if module.training and getattr(module, "is_gradient_checkpointing", False):
            raise RuntimeError("merging in a vision tower cannot train with gradient checkpointing; disable it first")
        local = self._local
        local.whole, local.here, local.metric, local.done = None, None, None, False

    @torch.compiler.disable
    def _on_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        whole = self._local.whole
        if whole is None or not bool((whole.size != 1).any()):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        size = whole.size.to(hidden.device)
        bias = size.clamp(min=1).log() if self.proportional else torch.zeros_like(size, dtype=torch.float)
        bias = bias.to(hidden.dtype).masked_fill(size == 0, torch.finfo(hidden.dtype).min)
        return args[:1], {**kwargs, "attention_mask": bias[:, None, None]}

    @torch.compiler.disable
    def _on_keys(self, heads: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._local.metric = output.detach().unflatten(-1, (heads, -1)).mean(2)

    @torch.compiler.disable
    def _on_norm(self, i: int, module: nn.Module, args: tuple) -> Any:
        local, hidden = self._local, args[0]
        metric, local.metric = local.metric, None
        if local.done or metric is None:
            return None
        whole = local.whole  # with what this block adds; `local` learns of it when the block is through
        for method in self.methods:
            size = None if whole is None else whole.size
            at = VisionBlock(i, len(self.parts.blocks), hidden, metric, size, self.parts.prefix)
            reduction = method.vision_block(at)
            if reduction is None:
                continue
            check_fits(method, reduction, hidden)
            hidden, metric = reduction.apply(hidden, size), reduction.apply(metric, size)
            local.here = reduction if local.here is None else local.here.then(reduction)
            whole = reduction if whole is None else whole.then(reduction)
        return None if local.here is None else (hidden, *args[1:])

    @torch.compiler.disable
    def _on_mlp(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        here = self._local.here
        return None if here is None else here.unmerge(output)

    @torch.compiler.disable
    def _on_block(self, i: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        local = self._local
        here, local.here = local.here, None
        if here is not None:
            output = here.apply(output, None if local.whole is None else local.whole.size)
            local.whole = here if local.whole is None else local.whole.then(here)
        if i == self.parts.last:
            local.done = True
            if local.whole is not None:
                whole, local.whole = local.whole, None
                return whole.unmerge(output)
        return output if here is not None else None
