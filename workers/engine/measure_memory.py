"""Reads what of a GPU's memory weights and the largest steps take."""

from collections.abc import Callable, Sequence

import torch

from workers.engine.pool_size import MeasuredMemory

Run = Callable[[], object]


def measure_memory(
    device: torch.device, steps: Sequence[Run], *, captured: Run | None = None
) -> MeasuredMemory:
    """Runs the largest steps there are; `captured` is the largest of those that will be captured, if any is."""
    with torch.cuda.device(device):
        allocated = torch.cuda.memory_allocated()
        captured_bytes = 0 if captured is None else _peak(captured) - allocated
        peaks = [_peak(step) - allocated for step in steps]
        free, total = torch.cuda.mem_get_info()
        return MeasuredMemory(
            total=total, free=free, reserved=torch.cuda.memory_reserved(), allocated=allocated,
            step=max(captured_bytes, *peaks), captured=captured_bytes,
        )  # fmt: skip


def _peak(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
