"""Address sanitizer and race detector for Triton's interpreter, which by itself reads and writes any address it is given
and runs programs one after another, so that races do not show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

Program = tuple[int, int, int]
SEVERAL = (-1, -1, -1)


class TritonAccessError(AssertionError):
    """Triton wraps it into its own InterpreterError, which keeps the message."""


class _Launch:
    """What the programs of one launch may touch, and who touched what."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.low, self.high = _extents(tensors)
        self.writer: dict[int, Program] = {}  # by address of an element
        self.reader: dict[int, Program] = {}

    def check(self, what: str, pointers: Any, mask: Any, program: Program) -> list[int]:
        """The addresses that are accessed, all of which are in an argument's memory."""
        address, masked = np.broadcast_arrays(pointers.data, mask.data)
        address = address[masked.astype(bool)]
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        at = np.searchsorted(self.low, address, side="right") - 1
        inside = at >= 0
        inside[inside] = address[inside] + size <= self.high[at[inside]]
        if not inside.all():
            raise TritonAccessError(
                f"{what}: {(~inside).sum()} of {address.size} addresses out of bounds, "
                f"first {int(address[~inside][0]):#x}, program {program}"
            )
        return address.tolist()

    def read(self, addresses: list[int], program: Program) -> None:
        for address in addresses:
            writer = self.writer.get(address, program)
            if writer != program:
                raise TritonAccessError(f"write/read race at {address:#x}: programs {writer} and {program}")
            self.reader[address] = program if self.reader.get(address, program) == program else SEVERAL

    def write(self, addresses: list[int], program: Program) -> None:
        for address in addresses:
            for kind, other in (("write/write", self.writer.get(address)), ("read/write", self.reader.get(address))):
                if other not in (None, program):
                    raise TritonAccessError(f"{kind} race at {address:#x}: programs {other} and {program}")
            self.writer[address] = program


def _extents(tensors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """First byte and end of what tensors cover: each view, not its storage, so that reading a neighbour in a packed
    buffer shows. Views that overlap are one."""
    spans: list[list[int]] = []
    for tensor in sorted((t for t in tensors if t.numel()), key=lambda t: t.data_ptr()):
        elements = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        start, end = tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
        if spans and start < spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([start, end])
    return tuple(np.array([span[side] for span in spans], dtype=np.uint64) for side in (0, 1))


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, (tuple, list)):
        return [tensor for part in argument for tensor in _tensors(part)]
    if hasattr(argument, "block_shape"):  # a tensor descriptor
        return _tensors(argument.base)
    if hasattr(argument, "data_ptr"):
        return [argument if hasattr(argument, "stride") else argument.base]
    return []


@contextmanager
def sanitize() -> Iterator[None]:
    """Launches in here raise where a program loads or stores outside the launch's tensors, where two programs touch an
    element that one of them stores, and where one store has two values for an element. Atomics are checked for bounds."""
    saved = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    saved_atomics = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    saved_arguments = GridExecutor._init_args_hst
    load, store = saved
    rmw, cas = saved_atomics
    launch = _Launch([])

    def arguments(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal launch
        on_host, named = saved_arguments(self, args, kwargs)
        launch = _Launch(_tensors([*on_host, *named.values()]))
        return on_host, named

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launch.read(launch.check("load", pointers, mask, self.grid_idx), self.grid_idx)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses = launch.check("store", pointers, mask, self.grid_idx)
        if len(set(addresses)) < len(addresses) and (value.data != value.data.flat[0]).any():
            raise TritonAccessError(f"one store has two values for an address, program {self.grid_idx}")
        launch.write(addresses, self.grid_idx)
        return store(self, pointers, value, mask, *rest)

    def checked_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.check("atomic", pointers, mask, self.grid_idx)
        return rmw(self, op, pointers, value, mask, *rest)

    def checked_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        launch.check("atomic", pointers, _Everything, self.grid_idx)
        return cas(self, pointers, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas = checked_rmw, checked_cas
    GridExecutor._init_args_hst = arguments
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = saved
        InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas = saved_atomics
        GridExecutor._init_args_hst = saved_arguments


class _Everything:
    """A mask that is true everywhere."""

    data = np.ones(1, dtype=bool)
