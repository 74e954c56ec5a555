"""Compile every Triton kernel for the GPUs that users have, on a machine without one: registers, spills, instructions.

    python scripts/check_kernels.py [capability ...]      # 75 80 86 89 90 100 120

Prints Markdown. The kernels are launched as the library launches them, on tensors of the CPU; only the launch itself is
left out, so what is compiled is what a GPU of that capability would run.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dpopt.grad_sample import triton_kernels as per_example
from dpopt.optim import MicroAdam
from dpopt.optim.microadam import triton_kernels  # noqa: F401 (imported here, before step says that there is an interpreter)
from dpopt.privacy.noise_triton import add_noise_kernel
from dpopt.rng import RandomKey

CAPABILITIES = {
    75: "T4, RTX 20",
    80: "A100",
    86: "A10, RTX 30",
    89: "L4, RTX 40",
    90: "H100, H200",
    100: "B200",
    120: "RTX 50",
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass
class Compiled:
    """A kernel as `ptxas` made it for one capability."""

    capability: int
    launch: str
    kernel: str
    registers: int
    stack: int  # bytes of a thread in local memory: what did not fit into registers
    shared: int  # bytes of a program
    instructions: int
    widest: int  # bits of the widest load


def step(**options: Any) -> None:
    """Launch one step of MicroAdam on a matrix and a bias."""
    dtype = options.pop("dtype", torch.float32)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((256, 64), (8,))]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = MicroAdam(parameters, **{"lr": 1e-3, "kernels": "triton", **options})
    os.environ["TRITON_INTERPRET"] = "1"  # says that the kernels may be used on a CPU; they are compiled already
    try:
        optimizer.step()
    finally:
        del os.environ["TRITON_INTERPRET"]


def rows(dimensions: int = 2) -> Tensor:
    """Per-example gradients, or activations, of 64 examples."""
    return torch.zeros({2: (64, 4096), 3: (64, 64, 256), 4: (64, 1, 64, 576)}[dimensions])


def filters(pieces: bool = False) -> tuple[Any, ...]:
    """Weight and gain of a standardized convolution, and how it is standardized."""
    weight = torch.zeros(64, 576)
    return weight[None] if pieces else weight, torch.ones(64), (1e-4, 0.0, 1.0)


def convolution(dtype: torch.dtype) -> Tensor:
    """Weight gradients of a 3×3 convolution."""
    a, g = torch.zeros(2, 16, 4, 64, 16, 16, dtype=dtype)[:, :, :1]
    return per_example.conv_weight_gradient(a, g, (3, 3), (1, 1), (1, 1), (1, 1), 1)


LAUNCHES: dict[str, Callable[[], Any]] = {
    "MicroAdam": step,
    "MicroAdam, weight decay": lambda: step(weight_decay=0.1),
    "MicroAdam, bf16": lambda: step(dtype=torch.bfloat16),
    "MicroAdam, fp16": lambda: step(dtype=torch.float16),
    "MicroAdam, 2 bits": lambda: step(bits=2),
    "MicroAdam, 8 bits, stochastic": lambda: step(bits=8, rounding="stochastic"),
    "MicroAdam, 32 bits": lambda: step(bits=32),
    "MicroAdam, no feedback": lambda: step(error_feedback=False),
    "MicroAdam, window 1": lambda: step(window=1),
    "MicroAdam, density 5%": lambda: step(density=0.05),
    "noise": lambda: add_noise_kernel(torch.zeros(4096), 1.0, 4.0, 2.0**-20, RandomKey.from_seed(0, "check"), 1),
    "sum": lambda: per_example.weighted_sum(rows(), torch.ones(64)),
    "sum, bf16": lambda: per_example.weighted_sum(rows().bfloat16(), torch.ones(64)),
    "norms": lambda: per_example.square_norms(rows()),
    "norms, bf16": lambda: per_example.square_norms(rows().bfloat16()),
    "convolution": lambda: convolution(torch.float32),
    "convolution, bf16": lambda: convolution(torch.bfloat16),
    "convolution, fp16": lambda: convolution(torch.float16),
    "group normalization": lambda: per_example.group_norm_gradients(rows(3), rows(3), 16, 1e-5),
    "group normalization, bf16": lambda: per_example.group_norm_gradients(
        rows(3).bfloat16(), rows(3).bfloat16(), 16, 1e-5
    ),
    "norms, standardized": lambda: per_example.standardized_square_norms(*(rows(4), *filters(True), (True, True))),
    "gradients, standardized": lambda: per_example.standardized_gradients(torch.zeros(64, 576).double(), *filters()),
}


@contextmanager
def compiled_only(capability: int) -> Iterator[list[Any]]:
    """Compile what is launched for a capability, run none of it, and collect the kernels."""
    kernels: list[Any] = []
    run, real = JITFunction.run, per_example.capability

    def collect(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return kernels[-1]

    class Pretended:
        """A driver of one device, of this capability."""

        def get_current_device(self) -> int:
            return capability  # its number, too: compiled kernels are kept by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    JITFunction.run, per_example.capability = collect, lambda x: capability
    driver.set_active(Pretended())
    try:
        yield kernels
    finally:
        JITFunction.run, per_example.capability = run, real
        driver._active = None


def examine(capability: int, launch: str, kernel: Any) -> Compiled:
    """Read registers, stack and instructions off a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of {launch} for {capability}: {usage}")
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", code, re.M)
    loads = [re.search(r"\.(64|128)\b", word) for word in instructions if word.startswith("LDG")]
    widest = max((int(size[1]) if size else 32 for size in loads), default=0)
    registers, stack = int(found[1]), int(found[2])
    name = kernel.metadata.name.strip("_")
    return Compiled(capability, launch, name, registers, stack, kernel.metadata.shared, len(instructions), widest)


def compile_all(capabilities: list[int], launches: list[str]) -> Iterator[Compiled]:
    """Yield each kernel of each launch for each capability.

    Raises:
        Exception: what Triton or ptxas says where a kernel does not compile.
    """
    for capability in capabilities:
        for launch in launches:
            with compiled_only(capability) as kernels:
                LAUNCHES[launch]()
            for kernel in kernels:
                yield examine(capability, launch, kernel)


def page(found: list[Compiled]) -> str:
    """Return the table, a row per kernel, and per capability its registers, stack and instructions."""
    columns = sorted({one.capability for one in found})
    names = {capability: f"sm_{capability} ({CAPABILITIES.get(capability, '?')})" for capability in columns}
    lines = [
        f"Triton {triton.__version__}, torch {torch.__version__}. A cell: registers of a thread / bytes of a thread "
        "that spill into local memory / instructions. Compiled, not run.\n",
        "| launch | kernel | " + " | ".join(names[c] for c in columns) + " | shared memory | widest load |",
        "|---|---|" + "---|" * (len(columns) + 2),
    ]
    cells = {(one.launch, one.kernel, one.capability): one for one in found}
    for launch, kernel in dict.fromkeys((one.launch, one.kernel) for one in found):
        row = [cells[launch, kernel, c] for c in columns]
        text = " | ".join(f"{one.registers} / {one.stack} / {one.instructions:,}" for one in row)
        lines.append(f"| {launch} | {kernel} | {text} | {row[-1].shared:,} B | {row[-1].widest} bits |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(list(compile_all([int(word) for word in sys.argv[1:]] or list(CAPABILITIES), list(LAUNCHES)))))
