"""What an object really holds, the storages of all tensors that can be reached from it, and what a function makes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmaccel.cache import KeyBias


def held_bytes(root: Any) -> int:
    """Bytes of all storages reachable from `root`, each counted once; what belongs to the model is left out."""
    seen: set[int] = set()
    storages: dict[int, int] = {}

    def walk(x: Any) -> None:
        if id(x) in seen or isinstance(x, KeyBias):
            return
        seen.add(id(x))
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes() if storage.nbytes() else 0
        elif isinstance(x, dict):
            for value in x.values():
                walk(value)
        elif isinstance(x, (list, tuple, set)):
            for value in x:
                walk(value)
        elif is_dataclass(x) and not isinstance(x, type):
            for field in fields(x):
                walk(getattr(x, field.name))
        elif type(x).__module__.startswith("vlmaccel"):
            walk(x.__dict__)

    walk(root)
    return sum(storages.values())


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made inside, views left out. It does not look into operators of our own."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out
