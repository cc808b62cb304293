"""Patch: the hooks of one patched model, in its vision tower and in its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vlmaccel.adapters.base import Adapter
from vlmaccel.adapters.decoder import DecoderHooks
from vlmaccel.adapters.patches import PatchHooks
from vlmaccel.adapters.vision import VisionHooks
from vlmaccel.hooks import Method


class Patch:
    """What `vlmaccel.patch` puts into a model. decoder, vision, patches: the hooks there, None where there are none."""

    def __init__(self, model: nn.Module, adapter: Adapter, methods: Sequence[Method]) -> None:
        self.methods = tuple(methods)
        for method in self.methods:
            for point in method.hook_points():
                if point not in adapter.hook_points:
                    raise NotImplementedError(
                        f"{method!r} acts at {point}, which the adapter {adapter.name!r} does not have; "
                        f"it has {', '.join(adapter.hook_points)}"
                    )
        merging = [method for method in self.methods if "vision_block" in method.hook_points()]
        self.vision = VisionHooks(adapter.vision(model), merging) if merging else None
        looking = any(method.sees_patches for method in self.methods)
        self.patches = PatchHooks(adapter.patches(model), self.vision) if looking else None
        parts = adapter.parts(model)
        self.decoder = None if parts is None else DecoderHooks(parts, adapter, self.methods, self.patches)
        for method in merging:
            if "visual_tokens" in method.hook_points() and self.vision and self.vision.parts.projector is None:
                raise NotImplementedError(
                    f"{method!r} hands merged tokens on to the decoder, but {type(model).__name__} does not give its "
                    'decoder one token for each patch; use after="unmerge"'
                )
        self._handles: list[Any] = []

    def install(self, model: nn.Module) -> None:
        """Put the hooks into the model that this Patch was made for."""
        for hooks in (self.decoder, self.vision, self.patches):
            self._handles += [] if hooks is None else hooks.install(model)

    def remove(self) -> None:
        """Take every hook out again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
