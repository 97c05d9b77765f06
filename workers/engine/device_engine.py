"""The parts of an engine on a device, with the kernels of a GPU or their formulas: importing this needs Triton."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from workers.engine.backends import BACKENDS
from workers.engine.captured_forward import CapturedForward, DecodeRows
from workers.engine.device_batch import DeviceBatchBuilder
from workers.engine.device_forward import announcing
from workers.engine.device_kv_pool import DeviceKvPool
from workers.engine.device_sampler import DeviceSampler
from workers.engine.engine import Engine
from workers.engine.engine_parts import EngineParts, Forward, OpenedModel
from workers.engine.graph_capture import Capture, GraphCapture
from workers.engine.largest_step import LargestStep
from workers.engine.latest_tokens import LatestTokens
from workers.engine.measure_memory import measure_memory
from workers.engine.pool_size import num_pages_that_fit
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.model.kv_pages import PAGE_DTYPES, allocate_pages
from workers.model.stored_products import products_of
from workers.model.weights import ModelWeights, load_weights
from workers.step import StepPlan

# Of a GPU's memory, all in all; the rest is for what libraries take behind torch's back.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceModel:
    opened: OpenedModel
    weights: ModelWeights  # on the device that computes
    device: torch.device
    attention: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedSizes:
    """Decode steps of up to `max_num_seqs` rows."""

    max_num_seqs: int
    capture: Capture


def load_device_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    quantize: str,
    device: torch.device,
    on_progress: Callable[[float], None],
) -> ModelWeights:
    """Raises `CheckpointError`, or `ValueError` for a layer that cannot be quantised."""
    return load_weights(
        checkpoint, config, dtype=dtype, device=device, stored=products_of(checkpoint, quantize),
        on_progress=on_progress,
    )  # fmt: skip


def device_parts(model: DeviceModel, *, num_pages: int, captured: CapturedSizes | None = None) -> EngineParts:
    """`captured`: steps that only decode are programs of these sizes."""
    config, info = model.opened.config, model.opened.info
    block, dtype = info.layout.block_size_tokens, PAGE_DTYPES[info.layout.dtype]
    # One page more than the pool has, for the rows that fill up a program.
    pages = allocate_pages(config, num_pages=num_pages + 1, block=block, dtype=dtype, device=model.device)
    backend = BACKENDS[model.attention](config, model.weights, pages, info.max_model_len)
    forward: Forward = announcing(backend.transformer.forward, device=model.device)
    if captured is not None:
        rows = DecodeRows(
            captured.max_num_seqs,
            max_pages_per_request=model.opened.max_pages_per_request,
            vocab_size=info.vocab_size,
            padding_slot=num_pages * block,
            device=model.device,
        )
        forward = CapturedForward(forward, rows, capture=captured.capture)
    latest = LatestTokens()
    return EngineParts(
        forward=forward,
        kv_pool=DeviceKvPool(info.layout, pages, num_pages=num_pages),
        batches=DeviceBatchBuilder(
            model.device,
            latest,
            block_size_tokens=block,
            max_pages_per_request=model.opened.max_pages_per_request,
        ),
        sampler=DeviceSampler(backend.sample, latest, adjusting=model.opened.sampler),
    )


def make_engine(model: DeviceModel, *, num_pages: int | None, largest: LargestStep) -> Engine:
    """With as many pages as the device has room for unless it is said. On a GPU all is compiled and captured."""
    if num_pages is None:
        num_pages = num_pages_on(model, largest)
    captured = _captured_sizes(model, largest)
    engine = Engine(model.opened, device_parts(model, num_pages=num_pages, captured=captured))
    if captured is not None:
        engine.execute(_plan(model, largest))  # so that no request waits for its kernels to be compiled
    return engine


def num_pages_on(model: DeviceModel, largest: LargestStep) -> int:
    """Runs the largest step on a pool of one page, whose staging counts as well, and captures what will be captured.

    What all of that leaves of the GPU's memory is for pages.
    """
    engine = Engine(model.opened, device_parts(model, num_pages=1))
    captured = _captured_sizes(model, largest)
    memory = measure_memory(
        model.device,
        [partial(engine.execute, _plan(model, largest))],
        capture=None if captured is None else partial(device_parts, model, num_pages=1, captured=captured),
    )
    page_bytes = model.opened.info.layout.block_bytes
    return num_pages_that_fit(memory, share=_MEMORY_SHARE, page_bytes=page_bytes) - 1  # one for padding


def _captured_sizes(model: DeviceModel, largest: LargestStep) -> CapturedSizes | None:
    if model.device.type != "cuda" or model.attention != "triton":
        return None
    return CapturedSizes(max_num_seqs=largest.max_num_seqs, capture=GraphCapture(model.device))


def _plan(model: DeviceModel, largest: LargestStep) -> StepPlan:
    info = model.opened.info
    return largest.plan(max_model_len=info.max_model_len, block_size_tokens=info.layout.block_size_tokens)
