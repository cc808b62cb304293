"""Compile a Triton kernel for a GPU that this machine does not have, and read what came out.

Needs neither a driver nor a CUDA toolkit: Triton's wheel carries ptxas and cuobjdump. It must not run in an interpreting
process (TRITON_INTERPRET=1), where Triton's library functions do not compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.support.occupancy import LIMITS, occupancy
from vlmaccel.kernels.gpu.target import Example

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that one block may have. Compiling does not check it, a launch does. CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"; CDNA 3 instruction set reference.
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
MATRIX_INSTRUCTIONS = {  # in the machine code of NVIDIA GPUs
    "wgmma": r"\b[HIQ]GMMA\.",
    "mma.sync": r"\b[HIQ]MMA\.",
    "tcgen05": r"\bUTC\w*MMA",
}


@dataclass
class Report:
    """What a compiled kernel takes and does. Bytes and registers are those of a thread, shared memory that of a block."""

    target: str
    registers: int
    stack: int  # bytes of local memory, where spilled registers go
    local_instructions: int  # loads and stores of local memory
    shared: int
    num_warps: int
    tensor_core: str  # kind and number of matrix instructions, "" if there are none
    wide_loads: int  # of 128 bits, to registers or to shared memory

    @property
    def occupancy(self) -> float | None:
        """Share of the warps that a multiprocessor has places for; None for AMD."""
        if self.target not in LIMITS:
            return None
        return occupancy(self.target, self.registers, self.shared, self.num_warps)

    def violations(self, tensor_core: bool, wide_loads: bool) -> list[str]:
        """What is wrong with it, in words. The arguments say what it must have."""
        found = []
        if self.stack or self.local_instructions:
            found.append(f"spills: {self.stack} B of local memory, {self.local_instructions} instructions on it")
        if self.shared > SHARED_MEMORY[self.target]:
            found.append(f"shared memory: {self.shared} B of {SHARED_MEMORY[self.target]} B")
        if tensor_core and not self.tensor_core:
            found.append("no matrix instruction")
        if wide_loads and not self.wide_loads:
            found.append("no load of 128 bits")
        return found


class _StubDriver:
    """As much of a driver as JITFunction.warmup asks for, so that arguments are specialised as at a real launch."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return f"stub of {self.target}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUS[self.target]

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def _as_if_on(target: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_StubDriver(target))
    try:
        yield
    finally:
        driver._active = before


def compile_for(target: str, example: Example) -> Report:
    """target: a key of GPUS. Raises what the compiler raises."""
    with _as_if_on(target):
        compiled = example.kernel.warmup(*example.args, grid=(1,), **example.meta, **example.options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
    size = {"shared": compiled.metadata.shared, "num_warps": compiled.metadata.num_warps}
    read = _read_nvidia if GPUS[target].backend == "cuda" else _read_amd
    return Report(target=target, **size, **read(compiled))


def _read_nvidia(compiled: Any) -> dict[str, Any]:
    """From the binary that would be launched."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage, code = (_cuobjdump(option, binary) for option in ("--dump-resource-usage", "--dump-sass"))
    kinds = {name: len(re.findall(pattern, code)) for name, pattern in MATRIX_INSTRUCTIONS.items()}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "local_instructions": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "tensor_core": " ".join(f"{name} {n}" for name, n in kinds.items() if n),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128|\bUTMALDG", code)),
    }


def _cuobjdump(option: str, binary: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout


def _read_amd(compiled: Any) -> dict[str, Any]:
    """From the assembly. Spilled scalar registers are not counted: they go to vector registers, not to memory."""
    code = compiled.asm["amdgcn"]
    matrix = re.findall(r"\bv_mfma_\w+|\bv_smfmac_\w+", code)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "stack": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1]),
        "local_instructions": len(re.findall(r"\bscratch_(?:load|store)", code)),
        "tensor_core": f"mfma {len(matrix)}" if matrix else "",
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128)", code)),
    }
