"""How many blocks of a kernel a multiprocessor of an NVIDIA GPU holds at a time.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". That registers are given out 256 at
a time, to a warp, from a quarter of the register file, and shared memory 128 bytes at a time, is what NVIDIA's occupancy
calculator does.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple


class Limits(NamedTuple):
    """Of one multiprocessor; shared memory in bytes, `reserved` is what the system takes of it for every block."""

    warps: int
    blocks: int
    shared: int
    reserved: int


LIMITS = {
    "sm_80": Limits(64, 32, 167936, 1024),
    "sm_86": Limits(48, 16, 102400, 1024),
    "sm_89": Limits(48, 24, 102400, 1024),
    "sm_90": Limits(64, 32, 233472, 1024),
    "sm_100": Limits(64, 32, 233472, 1024),
    "sm_120": Limits(48, 24, 102400, 1024),
}


def blocks_per_multiprocessor(target: str, registers: int, shared: int, num_warps: int) -> int:
    """registers: of a thread. shared: bytes of a block."""
    limits = LIMITS[target]
    registers_of_a_warp = ceil(registers * 32 / 256) * 256
    by_registers = 16384 // registers_of_a_warp * 4 // num_warps
    by_shared = limits.shared // (ceil((shared + limits.reserved) / 128) * 128)
    return min(limits.blocks, limits.warps // num_warps, by_registers, by_shared)


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """Warps that are resident, of those that a multiprocessor has places for."""
    return blocks_per_multiprocessor(target, registers, shared, num_warps) * num_warps / LIMITS[target].warps
