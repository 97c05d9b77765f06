"""How the offline engine runs: device, backend, sizes. What is left open is settled by the device."""

from dataclasses import dataclass

import torch

from workers.compute_device import ComputeDevice
from workers.model.kv_pages import PAGE_DTYPES
from workers.quantization import GPU_QUANTIZATIONS

_WEIGHT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineSettings:
    """Validated at construction; `ValueError` names the offending value."""

    device: str = "cpu"
    attention: str | None = None  # of all operations; None: triton on cuda, numba on cpu
    dtype: str | None = None  # of weights and computing; None: bfloat16 on cuda, float32 on cpu
    quantize: str | None = (
        None  # weights of the layers: w8a16, w4a16 or fp8, with a scale for each group of inputs
    )
    kv_dtype: str | None = None  # of the pages; None: that of the weights
    max_model_len: int | None = None  # None: the model's
    num_slots: int = 64  # answers at the same time
    max_step_tokens: int = 8192  # of prompts
    num_pages: int | None = None  # None: what fits
    memory_share: float = 0.9  # of a GPU's memory, all in all
    overlaps: bool = True  # a step is launched before the results of the one before are read
    captures: bool = True  # decode steps as CUDA graphs, where there is CUDA

    def __post_init__(self) -> None:
        _one_of("device", self.device, ("cpu", "cuda"))
        _one_of("dtype", self.weight_dtype_name, _WEIGHT_DTYPES)
        _one_of("kv_dtype", self.page_dtype_name, tuple(PAGE_DTYPES))
        if self.quantize is not None:
            _one_of("quantize", self.quantize, GPU_QUANTIZATIONS)
            if self.backend == "numba":
                raise ValueError(f"attention numba has whole weights, got quantize {self.quantize}")
        for name in ("num_slots", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.backend == "numba" and self.page_dtype_name != self.weight_dtype_name:
            raise ValueError(f"attention numba has pages of {self.weight_dtype_name}, got {self.kv_dtype}")

    @property
    def backend(self) -> str:
        """Raises `ValueError` for kernels that do not fit the device."""
        return ComputeDevice(device=self.device, attention=self.attention).backend

    @property
    def weight_dtype_name(self) -> str:
        return self.dtype or ("bfloat16" if self.device == "cuda" else "float32")

    @property
    def page_dtype_name(self) -> str:
        return self.kv_dtype or self.weight_dtype_name

    @property
    def weight_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.weight_dtype_name)
        return dtype

    @property
    def page_dtype(self) -> torch.dtype:
        return PAGE_DTYPES[self.page_dtype_name]


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
