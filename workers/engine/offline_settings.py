"""How the offline engine runs: device, kernels, sizes. What is left open is settled by the device."""

from dataclasses import dataclass

import torch

from kvstore.layout import WHOLE_DTYPES
from workers.compute_device import ComputeDevice
from workers.quantization import KV_DTYPES, check_quantization
from workers.scheduler import SchedulerLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineSettings:
    """Validated at construction; `ValueError` names the offending value."""

    compute: ComputeDevice = ComputeDevice()  # noqa: RUF009 - a value like any other
    dtype: str | None = None  # of weights and computing; None: bfloat16 on cuda, float32 on cpu
    quantize: str = "none"  # weights of the layers, as `model.quantize` of a worker
    kv_dtype: str = "auto"  # of the pages, as `model.kv_dtype`: auto is that of the weights
    max_model_len: int | None = None  # None: the model's
    max_num_seqs: int = 64  # answers at the same time
    max_num_batched_tokens: int = 8192  # of a step
    num_pages: int | None = None  # None: what fits

    def __post_init__(self) -> None:
        _one_of("dtype", self.weight_dtype_name, WHOLE_DTYPES)
        _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        check_quantization(self.quantize, dtype=self.weight_dtype_name)
        self.compute.check_quantization(self.quantize)
        self.compute.check_kv_dtype(self.kv_dtype)
        if self.num_pages is not None and self.num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {self.num_pages}")
        _ = self.limits  # has bounds of its own

    @property
    def limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_num_pulls=1,
        )

    @property
    def weight_dtype_name(self) -> str:
        return self.dtype or ("bfloat16" if self.compute.is_cuda else "float32")

    @property
    def page_dtype_name(self) -> str:
        return self.weight_dtype_name if self.kv_dtype == "auto" else self.kv_dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.weight_dtype_name)
        return dtype


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
