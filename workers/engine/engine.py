"""Executes step plans: batch, model, sampling. Composed here; decides nothing and remembers no request's progress."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from workers.compute_device import ComputeDevice
from workers.engine.engine_parts import Drawn, EngineParts, OpenedModel, StopFinder
from workers.engine.find_device import find_device
from workers.engine.largest_step import LargestStep
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig, load_config
from workers.model.info import ModelInfo, load_model_info
from workers.model.quantized_checkpoint import open_checkpoint
from workers.model.weights import ModelWeights
from workers.request import RequestId
from workers.step import ScheduledRequest, StepPlan, StepResult

_CPU = ComputeDevice()
_CPU_POOL_BYTES = 512 << 20


class Engine:
    """One model on one device. Steps are launched and read by one thread; `forget` comes from any, but never while a
    step samples for this request, unless it was launched ahead: then nothing is kept of the request."""

    def __init__(self, opened: OpenedModel, parts: EngineParts) -> None:
        self.model = opened.info
        self.kv_pool = parts.kv_pool
        self._parts = parts
        self._stop_strings = opened.stop_strings

    def execute(self, plan: StepPlan, *, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Computes the rows of `plan`, all in one batch; `on_layer(l)` follows the last KV write of layer l."""
        return self.launch(plan, on_layer=on_layer).result() if plan.rows else StepResult(sampled={})

    @torch.inference_mode()
    def launch(self, plan: StepPlan, *, on_layer: Callable[[int], None] | None = None) -> "LaunchedStep":
        """As `execute`, but a device may still compute when this returns."""
        parts = self._parts
        with self.kv_pool.step() as wait:
            batch, sampling = parts.batches.build(plan.rows)
            logits_SV = parts.forward(batch, on_layer=on_layer)
            drawn: Drawn = parts.sampler.draw(sampling, logits_SV) if sampling else list
        return LaunchedStep(sampling, drawn, wait=wait, stop_strings=self._stop_strings)

    def can_launch_after(self, plan: StepPlan) -> bool:
        """Whether the next step, with tokens that this one samples, can be launched before its result is known."""
        return self._parts.sampler.can_draw_ahead(plan.rows)

    def forget(self, request_id: RequestId) -> None:
        """Drops what sampling keeps of a request, when it leaves the worker."""
        self._parts.sampler.forget(request_id)
        self._stop_strings.forget(request_id)


class LaunchedStep:
    def __init__(
        self,
        sampling: Sequence[ScheduledRequest],
        drawn: Drawn,
        *,
        wait: Callable[[], None],
        stop_strings: StopFinder,
    ) -> None:
        self._sampling = sampling
        self._drawn = drawn
        self._wait = wait
        self._stop_strings = stop_strings

    def wait(self) -> None:
        """Until the step is over on the device, and with it all that were launched before."""
        self._wait()

    def result(self) -> StepResult:
        """Waits until the step is over. Called once, in the order of the steps, by the thread that launches them."""
        self.wait()
        sampled = {}
        for row, token in zip(self._sampling, self._drawn(), strict=True):
            request = row.request
            if request.sampling.stop_strings:
                stop_string = self._stop_strings.find(request, token.token_id)
                token = replace(token, stop_string=stop_string)
            sampled[request.request_id] = token
        return StepResult(sampled=sampled)


def load_engine(
    *,
    model_path: Path,
    dtype: str = "float32",
    quantize: str = "none",
    kv_dtype: str = "auto",
    num_pages: int | None = None,
    kv_cache_bytes: int | None = None,
    max_model_len: int | None = None,
    num_threads: int = 1,
    compute: ComputeDevice = _CPU,
    largest_step: LargestStep = LargestStep(),  # noqa: B008 - a value like any other
    on_progress: Callable[[float], None] = lambda share: None,
) -> Engine:
    """Loads a checkpoint directory. Sets torch's number of threads.

    `num_pages` goes before `kv_cache_bytes`; without both, a GPU has as many pages as its memory leaves after a step as
    large as `largest_step`, and a CPU 512 MiB of them.
    `on_progress` hears the share of layers that are loaded, while they are.

    Raises `CheckpointError` for a checkpoint that cannot be served, `ValueError` for settings that do not fit it, or a
    device that is not there.
    """
    compute.check_quantization(quantize)
    compute.check_kv_dtype(kv_dtype)
    find_device(compute)  # before all weights are read
    torch.set_num_threads(num_threads)
    checkpoint = open_checkpoint(model_path)
    info = load_model_info(
        model_path, checkpoint, dtype=dtype, quantize=quantize, kv_dtype=kv_dtype, max_model_len=max_model_len
    )
    opened = _opened(model_path, info)
    if num_pages is None and kv_cache_bytes is not None:
        num_pages = pages_of(info, kv_cache_bytes)
    weights = load_model_weights(
        checkpoint,
        opened.config,
        compute,
        dtype=getattr(torch, dtype),
        quantize=quantize,
        on_progress=on_progress,
    )
    return compose_engine(opened, weights, compute, num_pages=num_pages, largest_step=largest_step)


# Kernels are imported when they are chosen: a bare GPU machine has no numba, and serving on a CPU has no Triton.


def load_model_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    compute: ComputeDevice,
    *,
    dtype: torch.dtype,
    quantize: str,
    on_progress: Callable[[float], None],
) -> ModelWeights:
    """As the kernels of the device multiply them. Raises `CheckpointError`, or `ValueError` for what does not fit."""
    if compute.backend == "numba":
        from workers.model.cpu_weights import load_cpu_weights

        return load_cpu_weights(checkpoint, config, dtype=dtype, quantize=quantize, on_progress=on_progress)
    from workers.engine.device_engine import load_device_weights

    return load_device_weights(
        checkpoint,
        config,
        dtype=dtype,
        quantize=quantize,
        device=find_device(compute),
        on_progress=on_progress,
    )


def compose_engine(
    opened: OpenedModel,
    weights: ModelWeights,
    compute: ComputeDevice,
    *,
    num_pages: int | None,
    largest_step: LargestStep,
) -> Engine:
    """`num_pages` None: as many as a GPU has room for beside the largest step, and 512 MiB of them on a CPU."""
    device = find_device(compute)
    if num_pages is None and device.type == "cpu":
        num_pages = pages_of(opened.info, _CPU_POOL_BYTES)
    if compute.backend == "numba":
        from workers.engine.cpu_engine import cpu_parts

        assert num_pages is not None  # numba computes on a CPU
        return Engine(opened, cpu_parts(opened, weights, num_pages=num_pages))
    from workers.engine.device_engine import DeviceModel, make_engine

    model = DeviceModel(opened=opened, weights=weights, device=device, attention=compute.backend)
    return make_engine(model, num_pages=num_pages, largest=largest_step)


def _opened(model_path: Path, info: ModelInfo) -> OpenedModel:
    from workers.engine.sampler import Sampler
    from workers.engine.stop_strings import StopStrings

    return OpenedModel(
        config=load_config(model_path),
        info=info,
        sampler=Sampler(eos_token_ids=info.eos_token_ids, vocab_size=info.vocab_size),
        stop_strings=StopStrings(model_path / "tokenizer.json"),
    )


def pages_of(model: ModelInfo, kv_cache_bytes: int) -> int:
    """Raises `ValueError` for less than one."""
    num_pages = kv_cache_bytes // model.layout.block_bytes
    if num_pages < 1:
        raise ValueError(
            f"kv_cache_bytes {kv_cache_bytes} is less than one page of {model.layout.block_bytes} bytes"
        )
    return num_pages
