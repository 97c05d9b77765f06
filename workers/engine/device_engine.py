"""The parts of an engine on a device, with the kernels of a GPU or their formulas: importing this needs Triton."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from workers.engine.backends import BACKENDS
from workers.engine.device_batch import DeviceBatchBuilder
from workers.engine.device_forward import announcing
from workers.engine.device_kv_pool import DeviceKvPool
from workers.engine.device_sampler import DeviceSampler
from workers.engine.engine import Engine
from workers.engine.engine_parts import EngineParts, OpenedModel
from workers.engine.largest_step import LargestStep
from workers.engine.measure_memory import measure_memory
from workers.engine.pool_size import num_pages_that_fit
from workers.model.kv_pages import allocate_pages
from workers.model.weights import ModelWeights, load_weights

# Of a GPU's memory, all in all; the rest is for what libraries take behind torch's back.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceModel:
    opened: OpenedModel
    weights: ModelWeights  # on the device that computes
    device: torch.device
    attention: str


def load_device_model(
    opened: OpenedModel, *, device: torch.device, attention: str, on_progress: Callable[[float], None]
) -> DeviceModel:
    """Raises `CheckpointError`."""
    dtype = getattr(torch, opened.info.layout.dtype)
    weights = load_weights(
        opened.checkpoint, opened.config, dtype=dtype, device=device, on_progress=on_progress
    )
    return DeviceModel(opened=opened, weights=weights, device=device, attention=attention)


def device_parts(model: DeviceModel, *, num_pages: int) -> EngineParts:
    """All of `num_pages` are the pool's: a step here has no padding that would need one."""
    config, info = model.opened.config, model.opened.info
    pages = allocate_pages(
        config, num_pages=num_pages, block=info.layout.block_size_tokens,
        dtype=getattr(torch, info.layout.dtype), device=model.device,
    )  # fmt: skip
    backend = BACKENDS[model.attention](config, model.weights, pages, info.max_model_len)
    return EngineParts(
        forward=announcing(backend.transformer.forward, device=model.device),
        kv_pool=DeviceKvPool(info.layout, pages.pages_LP2GBC),
        batches=DeviceBatchBuilder(
            model.device,
            block_size_tokens=info.layout.block_size_tokens,
            max_pages_per_request=model.opened.max_pages_per_request,
        ),
        sampler=DeviceSampler(backend.sample, adjusting=model.opened.sampler),
    )


def num_pages_on(model: DeviceModel, largest: LargestStep) -> int:
    """Runs the largest step on a pool of one page; what it leaves of the GPU's memory is for pages."""
    info = model.opened.info
    layout = info.layout
    engine = Engine(model.opened, device_parts(model, num_pages=1))
    plan = largest.plan(max_model_len=info.max_model_len, block_size_tokens=layout.block_size_tokens)
    memory = measure_memory(model.device, [partial(engine.execute, plan)])
    return num_pages_that_fit(memory, share=_MEMORY_SHARE, page_bytes=layout.block_bytes)
