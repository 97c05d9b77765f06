"""On which device a model is computed and with whose kernels, and what of that goes together. Without torch."""

import os
import re
from dataclasses import dataclass

from workers.quantization import GPU_QUANTIZATIONS

ATTENTIONS = ("numba", "triton", "reference")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeDevice:
    """Validated at construction; `ValueError` names the offending value. Whether the device is there torch knows."""

    device: str = "cpu"  # or cuda, or cuda:N
    attention: str | None = None  # of all operations; None: triton on cuda, numba on cpu

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device must be one of cpu, cuda, cuda:N, got {self.device!r}")
        if self.attention not in (None, *ATTENTIONS):
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")
        if self.backend == "numba" and self.is_cuda:
            raise ValueError(f"attention numba computes on the cpu, got device {self.device}")
        if self.backend == "triton" and not self.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("attention triton on the cpu needs TRITON_INTERPRET=1 in the environment")

    @property
    def is_cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def backend(self) -> str:
        return self.attention or ("triton" if self.is_cuda else "numba")

    def check_quantization(self, quantize: str) -> None:
        """Raises `ValueError`."""
        if quantize == "int8" and self.backend != "numba":
            raise ValueError(f"quantize int8 is served with attention numba alone, got {self.backend}")
        if quantize in GPU_QUANTIZATIONS and self.backend == "numba":
            raise ValueError(
                f"quantize {quantize} is served with attention triton or reference, got numba; int8 is for a CPU"
            )

    def check_kv_dtype(self, kv_dtype: str) -> None:
        """Raises `ValueError`."""
        if kv_dtype != "auto" and self.backend == "numba":
            raise ValueError(f"kv_dtype {kv_dtype} is served with attention triton or reference, got numba")
