"""Reads what of a GPU's memory weights and the largest steps take."""

import gc
from collections.abc import Callable, Sequence

import torch

from workers.engine.pool_size import MeasuredMemory

Run = Callable[[], object]


def measure_memory(
    device: torch.device, steps: Sequence[Run], *, capture: Run | None = None
) -> MeasuredMemory:
    """Runs the largest steps there are; `capture` captures those that will be, if any, and returns what holds them."""
    with torch.cuda.device(device):
        allocated = torch.cuda.memory_allocated()
        peaks = [_peak(step) - allocated for step in steps]
        captured = 0 if capture is None else _kept(capture)
        free, total = torch.cuda.mem_get_info()
        return MeasuredMemory(
            total=total, free=free, reserved=torch.cuda.memory_reserved(), allocated=allocated,
            step=max(peaks), captured=captured,
        )  # fmt: skip


def _kept(make: Run) -> int:
    """Of the device: the driver's part of a graph is none of torch's memory."""
    before = _free()
    made = make()
    kept = before - _free()
    del made
    gc.collect()  # the steps hold the engine that they belong to
    _free()
    return max(kept, 0)


def _free() -> int:
    """What is left when torch has given back all that it does not use."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _peak(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
