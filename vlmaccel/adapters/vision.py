"""Merging inside the blocks of a vision tower, between attention and MLP, by hooks alone.

A block adds its MLP's output to the residual stream x that it holds. In inference, x itself (the tensor that the norm
before the MLP is called with) is given the merged values, and the rest of the block runs on fewer tokens. Autograd and
torch.compile cannot follow that: there the MLP runs on the merged tokens, its output is spread over their members, and the
sum is merged. As every member has the same share of the output, merge(x + spread(y)) is merge(x) + y: the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmaccel.adapters.fast_attention import FastAttention
from vlmaccel.flops import BlockCost
from vlmaccel.hooks import Method, Tower, VisionBlock, check_fits
from vlmaccel.reduction import Reduction, gather
from vlmaccel.run import Stage

MASKS = ("attention_mask", "attn_mask", "key_padding_mask")


@dataclass(frozen=True, eq=False)
class BlockParts:
    """One block of a vision tower.

    keys, metric: `metric` makes (B, N, head_dim), the keys averaged over heads, of what the module `keys` gives out.
    norm: the norm before the MLP, whose input is the residual stream. mlp: its output is added to that, scaled or not.
    mask: the keyword, one of `MASKS`, by which the attention takes an additive mask.
    """

    block: nn.Module
    attention: nn.Module
    keys: nn.Module
    metric: Callable[[Tensor], Tensor]
    norm: nn.Module
    mlp: nn.Module
    mask: str


@dataclass(frozen=True, eq=False)
class VisionParts:
    """A vision tower.

    tower: is called with pictures (B, 3, H, W), or at least whenever the blocks run one after the other.
    prefix: leading tokens that are no patches. last: the only block whose output is used; None if it is the final one and
        others may be asked for. prop_attn: whether the family does better with proportional attention.
    projector: what makes one token for a decoder of every patch; None if nothing does.
    prefix_only: whether all that a call of the tower itself uses of its last block are the prefix tokens, so that the
        patches need not be put back; None if it never is.
    """

    tower: nn.Module
    blocks: Sequence[BlockParts]
    prefix: int
    last: int | None = None
    prop_attn: bool = True
    projector: nn.Module | None = None
    prefix_only: Callable[[nn.Module], bool] | None = None


@dataclass(eq=False)
class Pass:
    """One pass of a batch of pictures through the tower.

    acting: the methods that merge in each block, if any. image: height and width of the pictures if known.
    everywhere: whether each block's output is looked at, so that every patch has to be there between blocks.
    learns: whether there is a gradient. again: whether this is one block that gradient checkpointing runs once more, and known
    what it merged.
    whole, here, after: merges of all blocks so far, of the block at hand, and of both.
    """

    tower: Tower
    acting: dict[int, list[Method]]
    image: tuple[int, int] | None
    everywhere: bool
    learns: bool = False
    again: bool = False
    known: Reduction | None = None
    whole: Reduction | None = None
    here: Reduction | None = None
    after: Reduction | None = None
    merged: bool = False  # whether the residual stream of the block at hand is merged already
    bias: Tensor | None = None  # (B, n) float on the keys
    metric: Tensor | None = None
    fast: FastAttention | None = None
    done: bool = False
    stages: list[Stage] = field(default_factory=list)


class Local(threading.local):
    """What this thread is at. entered: image size, `everywhere` and `learns` of a call of the tower that is about to start.
    again: the pass of blocks that run while gradients are worked out."""

    entered: tuple[tuple[int, int] | None, bool, bool] | None = None
    now: Pass | None = None
    again: Pass | None = None


class Traced:
    """The same for torch.compile, which cannot follow thread-local state."""

    entered: tuple[tuple[int, int] | None, bool, bool] | None = None
    now: Pass | None = None
    again: Pass | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What the last pass did. batch: pictures. tokens: at the first block, the prefix included. image: see `Pass`."""

    batch: int
    tokens: int
    image: tuple[int, int] | None
    stages: tuple[Stage, ...]


class VisionHooks:
    """Calls `vision_block` of the methods in every block, and spreads the tokens out again at the end.

    Hooks are bound methods, so that copies of the model take their own along; tensors of a pass are never kept here.
    """

    def __init__(self, parts: VisionParts, methods: Sequence[Method]) -> None:
        self.parts, self.methods = parts, tuple(methods)
        self.prop_attn = any(parts.prop_attn if m.prop_attn is None else m.prop_attn for m in methods)
        self.cost = BlockCost.of(parts.blocks[0].attention, parts.blocks[0].mlp)
        self.last: Seen | None = None
        self._local, self._traced = Local(), Traced()

    def install(self, model: nn.Module) -> list[Any]:
        """Put the hooks in and return their handles."""
        handles: list[Any] = [self.parts.tower.register_forward_pre_hook(self._on_tower, with_kwargs=True)]
        for i, part in enumerate(self.parts.blocks):
            handles += [
                part.block.register_forward_pre_hook(partial(self._before_block, i), with_kwargs=True),
                part.attention.register_forward_pre_hook(partial(self._before_attention, part.mask), with_kwargs=True),
                part.attention.register_forward_hook(self._after_attention, always_call=True),
                part.keys.register_forward_hook(partial(self._on_keys, i, part.metric)),
                part.norm.register_forward_pre_hook(partial(self._on_norm, i)),
                part.mlp.register_forward_hook(self._on_mlp),
                # before the hooks with which transformers records hidden states, so that it records every patch
                part.block.register_forward_hook(partial(self._after_block, i), prepend=True),
            ]
        if self.parts.projector is not None:
            handles.append(self.parts.projector.register_forward_hook(self._on_projector))
        return handles

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_local", "_traced")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=Local(), _traced=Traced())

    @property
    def merged(self) -> tuple[Reduction | None, Tensor | None]:
        """The merges of all blocks before the one that runs, and the bias (B, n) on its keys; None where there are none."""
        now = self._now
        return (None, None) if now is None else (now.whole, now.bias)

    @property
    def _last(self) -> int:
        """The block behind which every patch is there again."""
        return len(self.parts.blocks) - 1 if self.parts.last is None else self.parts.last

    @property
    def _state(self) -> Local | Traced:
        return self._traced if torch.compiler.is_compiling() else self._local

    @property
    def _now(self) -> Pass | None:
        return self._state.again if in_backward() else self._state.now

    def _on_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs.get("pixel_values")
        image = (pixels.shape[2], pixels.shape[3]) if isinstance(pixels, Tensor) and pixels.ndim == 4 else None
        config = getattr(module, "config", None)
        recorded = kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", False))
        state = self._state
        state.entered = (image, bool(recorded) and self.parts.last is None, torch.is_grad_enabled())
        state.again = None  # of this thread: what follows is all of the tower, even if gradients are worked out

    def _start(self, hidden: Tensor) -> None:
        # blocks that run without a call of the tower (timm's forward_intermediates) are there to be looked at
        state = self._state
        image, everywhere, learns = state.entered or (None, True, torch.is_grad_enabled())
        tower = Tower(self._last + 1, hidden.shape[1], self.parts.prefix, self.cost)
        acting: dict[int, list[Method]] = {}
        for method in self.methods:
            for block in method.vision_blocks(tower):
                acting.setdefault(block, []).append(method)
        state.entered = None
        now = Pass(tower, acting, image, everywhere, learns)
        if in_backward():
            state.again = now
        else:
            state.now = now

    def _before_block(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        now = self._now
        if i == 0 and (now is None or not now.again):
            self._start(hidden)
        now = self._now
        if now is None or now.whole is None or now.done:
            return None
        if now.everywhere:
            hidden = gather(hidden, now.whole.keep)
        if kwargs.get("rope") is not None:
            patches = now.whole.keep[:, self.parts.prefix :] - self.parts.prefix
            kwargs = {**kwargs, "rope": rope_rows(kwargs["rope"], patches)}
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    def _before_attention(self, mask: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        now = self._now
        if now is None or not now.acting or now.done:
            return None
        queries_only = args if mask == "key_padding_mask" else args[:1]
        own = [*args[len(queries_only) :], *(kwargs.get(name) for name in MASKS), kwargs.get("is_causal") or None]
        if any(x is not None for x in own):
            why = "torch.export makes one for this model; unpatch it first, or use torch.compile"
            raise NotImplementedError(
                "tokens cannot be merged in a tower that is given an attention mask"
                + (f": {why}" if torch.compiler.is_exporting() else "")
            )
        if now.bias is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        bias = now.bias.to(hidden.device, hidden.dtype)
        kwargs = {**kwargs, mask: bias if mask == "key_padding_mask" else bias[:, None, None]}
        return queries_only, kwargs

    def _after_attention(self, module: nn.Module, args: tuple, output: Any) -> None:
        now = self._now
        if now is not None and now.fast is not None:
            now.fast.__exit__(None, None, None)
            now.fast = None

    def _on_keys(
        self, i: int, metric: Callable[[Tensor], Tensor], module: nn.Module, args: tuple, output: Tensor
    ) -> None:
        now = self._now
        if now is None or not now.acting or now.done:
            return
        if i in now.acting and not now.again:  # at once, while the keys are still in the cache
            now.metric = metric(output.detach())
        if not torch.compiler.is_compiling() and FastAttention.fits(output):  # the attention itself comes next
            now.fast = FastAttention(now.bias)
            now.fast.__enter__()

    def _on_norm(self, i: int, module: nn.Module, args: tuple) -> Any:
        now, hidden = self._now, args[0]
        if now is None or now.done:
            return None
        metric, now.metric = now.metric, None
        whole, acting = now.whole, [] if now.again else now.acting.get(i, [])
        if now.known is not None:
            hidden = now.known.apply(hidden, None if whole is None else whole.size)
            now.here, whole = now.known, now.known if whole is None else whole.then(now.known)
        for method in acting:
            assert metric is not None
            size = None if whole is None else whole.size
            reduction = method.vision_block(VisionBlock(now.tower, i, hidden, metric, size))
            if reduction is None:
                continue
            check_fits(method, reduction, hidden)
            hidden = reduction.apply(hidden, size)
            if len(acting) > 1:
                metric = reduction.apply(metric, size)
            now.here = reduction if now.here is None else now.here.then(reduction)
            whole = reduction if whole is None else whole.then(reduction)
        if now.here is None:
            return None
        now.after = whole
        if now.learns or torch.compiler.is_compiling():
            return (hidden, *args[1:])
        args[0].set_(hidden)
        now.merged = True
        return None

    def _on_mlp(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        now = self._now
        return None if now is None or now.here is None or now.merged else now.here.unmerge(output)

    def _after_block(self, i: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        now = self._now
        if now is None or now.done:
            return None
        if now.learns and not torch.is_grad_enabled():
            raise RuntimeError(
                "merging in this vision tower cannot train with reentrant gradient checkpointing; give use_reentrant=False "
                "(timm: timm.layers.set_reentrant_ckpt(False))"
            )
        learns = now.learns and not now.again and not torch.compiler.is_compiling()
        before = replace(now, again=True, known=now.here, here=None, stages=[]) if learns else None
        here, merged = now.here, now.merged
        now.here, now.merged, now.metric = None, False, None
        if here is not None:
            if not merged:
                output = here.apply(output, None if now.whole is None else now.whole.size)
            self._merged(now, i, torch.promote_types(output.dtype, torch.float))
        last = i == self._last
        if last:
            now.done = True
        if last and not now.again:
            self.last = Seen(output.shape[0], now.tower.tokens, now.image, tuple(now.stages))
        if now.whole is not None and (now.everywhere or (last and not self._prefix_only())):
            output = now.whole.unmerge(output)
        if before is not None and output.requires_grad:
            output.register_hook(partial(self._before_gradient, before))
        return output

    def _before_gradient(self, before: Pass, gradient: Tensor) -> None:
        """Gradient checkpointing may run a block once more now, on what it was given and with what it merged."""
        self._state.again = replace(before)

    def _prefix_only(self) -> bool:
        only = self.parts.prefix_only
        return only is not None and not torch.is_grad_enabled() and only(self.parts.tower)

    def _merged(self, now: Pass, i: int, dtype: torch.dtype) -> None:
        """Note what block `i` merged, and what it means for the attention of later blocks."""
        assert now.after is not None
        now.whole = whole = now.after
        now.stages.append(Stage(i, whole.keep, whole.size, whole.group))
        now.bias = whole.size.to(dtype).log() if self.prop_attn else None
        if not whole.partition:
            bias = torch.zeros_like(whole.size, dtype=dtype) if now.bias is None else now.bias
            now.bias = bias.masked_fill(whole.size == 0, -1e4)  # in the range of every dtype, and exp of it is 0

    def _on_projector(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Give the members of a group the same features to the bit, whatever rounding the projector did to each."""
        now = self._now
        if now is None or now.whole is None or output.ndim != 3:
            return None
        first = gather(now.whole.keep[..., None], now.whole.group.clamp(min=0))[..., 0]
        left = now.tower.tokens - output.shape[1]  # class and register tokens are not projected by most
        return gather(output, first[:, left:] - left) if 0 <= left <= self.parts.prefix else None


def in_backward() -> bool:
    """Whether this runs while gradients are worked out, as blocks do that gradient checkpointing runs once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


def rope_rows(rope: Tensor, index: Tensor) -> Tensor:
    """(B, 1 or H, n, d) rotary embedding of the patches `index` (B, n), from that of all: (N, d), (H, N, d) where heads
    differ, or (B, 1 or H, N, d)."""
    rope = rope[(None,) * (4 - rope.ndim)]
    return gather(rope, index, 2)
