"""The two limits of a GPU that kernels are measured against: copy bandwidth and the bf16 matrix rate.

Runs under any Python with torch and nothing of Penstock installed: `make gpu`.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

NUM_WARMUP = 3
NUM_RUNS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    copy_gb_s: float
    matrix_tflop_s: float


def median_ms(run: Callable[[], object]) -> float:
    """Milliseconds of one call by the device's own clock, the median of several after a warm-up."""
    times = []
    for index in range(NUM_WARMUP + NUM_RUNS):
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if index >= NUM_WARMUP:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth_gb_s(*, num_bytes: int = 1 << 31) -> float:
    """Bytes read and written per second by a copy within the device's memory."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / median_ms(lambda: target.copy_(source)) / 1e6


def matrix_rate_tflop_s(*, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    num_operations = 2 * size * size * size
    return num_operations / median_ms(lambda: a @ b) / 1e9


def measure_limits() -> Limits:
    return Limits(copy_gb_s=copy_bandwidth_gb_s(), matrix_tflop_s=matrix_rate_tflop_s())
