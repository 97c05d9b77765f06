"""Compiles what a launcher launches for sm_90, ahead of time and without a GPU, and looks at the machine code.

The launcher itself runs, on tensors without memory, so that what is compiled is what a GPU would be given: types,
constants and the divisibility of every argument.
"""

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_LIMIT_BYTES = 232_448
LIMIT_S = 30  # a tile that is too large can take a minute


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """A configuration that runs in production, and the tensor core's instruction that each of its kernels must use."""

    name: str
    launch: Callable[[], object]
    units: tuple[Literal["wgmma", "mma.sync"] | None, ...]


class _Hopper:
    """As much of Triton's driver as compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def _compiling() -> Iterator[list]:
    """While it lasts, launches compile and do not run; gives the list of what they compiled."""
    kernels, run = [], JITFunction.run

    def compile_only(
        self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object
    ) -> object:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    triton.runtime.driver.set_active(_Hopper())
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def give_up(number: int, frame: object) -> None:
        raise TimeoutError(f"compiling takes more than {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and more, as the driver will see them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def compile_for_hopper(shipped: Shipped) -> dict[str, object]:
    with _compiling() as kernels, _time_limit(LIMIT_S):
        shipped.launch()
    figures = {}
    for index, (kernel, unit) in enumerate(zip(kernels, shipped.units, strict=True)):
        resources = _resources(kernel.asm["cubin"])
        assert resources["STACK"] == 0, f"{kernel.name} spills {resources['STACK']} bytes a thread"
        shared = kernel.metadata.shared
        assert shared <= SHARED_LIMIT_BYTES, f"{kernel.name} needs {shared} bytes of shared memory"
        used = [name for name in ("wgmma", "mma.sync") if f"{name}." in kernel.asm["ptx"]]
        assert used == ([] if unit is None else [unit]), f"{kernel.name} uses {used}, not {unit}"
        figures[f"{index}:{kernel.src.fn.__module__.rpartition('.')[2]}"] = {
            "registers": resources["REG"],
            "shared": shared,
            "warps": kernel.metadata.num_warps,
            "unit": unit,
            "async_copies": kernel.asm["ptx"].count("cp.async.cg"),
        }
    return figures
