"""What an object really holds: the storages of all tensors that can be reached from it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

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
