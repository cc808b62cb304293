"""patch, unpatch, patched, stats: the front door."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from vlmaccel.adapters.base import all_adapters, find_adapter
from vlmaccel.adapters.install import Patch
from vlmaccel.hooks import Method
from vlmaccel.kernels.block_compiled import COMPILED_ATTENTION
from vlmaccel.methods import check_options, make, registry
from vlmaccel.stats import Stats, TowerStats, stats_of

MARK = "_vlmaccel"  # where a patched model keeps its Patch, so that a copy of the model finds its own
MethodLike = str | Method | Sequence["str | Method"] | None


def patch(model: nn.Module, method: MethodLike = None, **options: object) -> nn.Module:
    """Make a model faster at inference, in place.

    model: a transformers model that an adapter knows, see `adapters()`; also one wrapped by `torch.compile`.
    method: a name of `methods()`, a Method, a list of these, or None for the default of the model's family.
    options: hyper-parameters of the method, when it is given by name (or is the default).
    Returns the same model. A model that is patched already gets the methods in addition.

    Raises NotImplementedError for a model that no adapter knows or that lacks what is needed, ValueError for a method
    or a value that does not exist, or a kind of method that is in place already, TypeError for an unknown option.
    The model is left as it was whenever something is raised.
    """
    target = _unwrapped(model)
    adapter = find_adapter(target)
    if method is None:
        default = adapter.default(adapter.depth(target))
        check_options(type(default), options)
        new: tuple[Method, ...] = (replace(default, **options),)  # type: ignore[type-var]
    else:
        new = _methods(method, options)
    old: Patch | None = getattr(target, MARK, None)
    before = () if old is None else old.methods
    for i, added in enumerate(new):
        if any(type(added) is type(other) for other in (*before, *new[:i])):
            raise ValueError(
                f"the model is patched with {added.name or type(added).__name__} already: "
                f"vlmaccel.unpatch(model) first to change it"
            )
    _install(target, (*before, *new))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Take every hook out again: the model is bit for bit what it was. Returns it; one that is not patched is left."""
    _install(_unwrapped(model), ())
    return model


@contextmanager
def patched(model: nn.Module, method: MethodLike = None, **options: object) -> Iterator[nn.Module]:
    """`with patched(model, "fastv", ratio=0.25): model.generate(...)`; on leaving, the model is as it was on entering."""
    target = _unwrapped(model)
    old: Patch | None = getattr(target, MARK, None)
    patch(model, method, **options)
    try:
        yield model
    finally:
        _install(target, () if old is None else old.methods)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` has changed the model."""
    return hasattr(_unwrapped(model), MARK)


def stats(model: nn.Module) -> Stats | TowerStats:
    """What the last prefill of a patched model did; of a plain vision transformer, what the last pictures cost.

    Raises RuntimeError if the model is not patched, or has not run since.
    """
    found: Patch | None = getattr(_unwrapped(model), MARK, None)
    if found is None:
        raise RuntimeError("the model is not patched: call vlmaccel.patch(model) first")
    if (done := stats_of(found)) is None:
        raise RuntimeError("the patched model has not run yet: call it, or model.generate, first")
    return done


def methods() -> dict[str, str]:
    """Every method by name, with one line on what it does."""
    return {name: _first_line(method) for name, method in registry().items()}


def adapters() -> dict[str, str]:
    """Every adapter by name, with the models it is for."""
    return {adapter.name: adapter.summary for adapter in all_adapters()}


def _install(model: nn.Module, wanted: tuple[Method, ...]) -> None:
    old: Patch | None = getattr(model, MARK, None)
    if old is None and not wanted:
        return
    new = Patch(model, find_adapter(model), wanted) if wanted else None
    if old is not None:
        old.remove()
        delattr(model, MARK)
    if new is not None:
        new.install(model)
        setattr(model, MARK, new)
    if _anything_compiled():  # which does not look whether hooks have come or gone
        torch.compiler.reset()


def _anything_compiled() -> bool:
    """Whether torch.compile has compiled something in this process, except our own attention, which is in no model."""
    if "torch._dynamo" not in sys.modules:
        return False
    codes = [code() for code in torch._dynamo.convert_frame.input_codes.seen]
    return any(code is not None and code is not COMPILED_ATTENTION for code in codes)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile(model)` wrapped it."""
    return getattr(model, "_orig_mod", model)


def _methods(method: MethodLike, options: dict[str, object]) -> tuple[Method, ...]:
    if isinstance(method, str):
        return (make(method, **options),)
    if options:
        raise TypeError(
            f"options ({', '.join(options)}) go with a method's name; give them to the Method itself instead"
        )
    if isinstance(method, Method):
        return (method,)
    if isinstance(method, Sequence) and method and all(isinstance(m, (str, Method)) for m in method):
        return tuple(make(m) if isinstance(m, str) else m for m in method)
    raise TypeError(f"method must be a name, a Method or a non-empty list of them, not {method!r}")


def _first_line(method: type[Method]) -> str:
    lines = (method.__doc__ or "").strip().splitlines()
    return lines[0].strip() if lines else ""
