"""Prompts in, tokens out, without a server: composed here of the model, the device's pages and the runner."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers.engine.backends import BACKENDS
from workers.engine.device_copies import Launched
from workers.engine.device_runner import DeviceRunner
from workers.engine.generations import (
    Generation,
    OfflineLimits,
    OfflineState,
    OfflineStep,
    PromptChunk,
    next_step,
)
from workers.engine.graph_capture import GraphCapture
from workers.engine.measure_memory import measure_memory
from workers.engine.offline_settings import OfflineSettings
from workers.engine.pool_size import num_pages_that_fit
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig, load_config, load_eos_token_ids
from workers.model.kv_pages import allocate_pages, page_bytes
from workers.model.quantized_checkpoint import QuantizedCheckpoint, open_checkpoint
from workers.model.weights import ModelWeights, Stored, load_weights
from workers.request import SamplingParams

_CPU_POOL_BYTES = 1 << 30


class OfflineEngine:
    """One model on one device. Not to be used by two threads at once."""

    def __init__(self, state: OfflineState, runner: DeviceRunner, *, overlaps: bool) -> None:
        self.state = state
        self._runner = runner
        self._overlaps = overlaps
        self._pending: tuple[OfflineStep, Launched] | None = None

    def generate(self, prompts: Iterable[tuple[Sequence[int], SamplingParams]]) -> list[Generation]:
        """The answers, all complete, in the order of the prompts. Raises `ValueError` for what cannot run."""
        generations = [self.state.add(prompt, sampling) for prompt, sampling in prompts]
        while self.step():
            pass
        return generations

    def step(self) -> bool:
        """Launches the next step, then records what the one before sampled; false: there was neither."""
        step = next_step(self.state)
        launched = None
        if step is not None:
            launched = step, self._runner.launch(step)
            self.state.launched(step)
        known, self._pending = (self._pending, launched) if self._overlaps else (launched, None)
        if known is not None:
            self.state.apply(known[0], known[1].token_ids())
        return step is not None or known is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    config: ModelConfig
    weights: ModelWeights  # on the device that computes
    eos_token_ids: frozenset[int]


def load_model(model_path: Path, settings: OfflineSettings, *, on_progress: Callable[[float], None]) -> Model:
    """Raises `CheckpointError` for a checkpoint that cannot be computed, `ValueError` for a missing device."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds none on this machine")
    config = load_config(model_path)
    checkpoint = open_checkpoint(model_path)
    weights = load_weights(
        checkpoint, config, dtype=settings.weight_dtype, device=torch.device(settings.device),
        stored=_stored(checkpoint, settings), on_progress=on_progress,
    )  # fmt: skip
    if settings.quantize is not None:
        from workers.model.quantize import quantize_weights  # needs triton, which serving on a CPU has not

        weights = quantize_weights(weights, settings.quantize)
    return Model(config=config, weights=weights, eos_token_ids=load_eos_token_ids(model_path))


def _stored(checkpoint: Checkpoint, settings: OfflineSettings) -> Stored | None:
    """Numba's kernels multiply whole weights, and what is to be quantised anew has to be whole first."""
    if (
        not isinstance(checkpoint, QuantizedCheckpoint)
        or settings.backend == "numba"
        or settings.quantize is not None
    ):
        return None
    from workers.model.stored_products import stored_product  # needs triton, as above

    return partial(stored_product, checkpoint)


def build_engine(model: Model, settings: OfflineSettings) -> OfflineEngine:
    """Raises `ValueError` for settings that do not fit the model or the device."""
    config = model.config
    max_model_len = config.max_positions if settings.max_model_len is None else settings.max_model_len
    if not 1 <= max_model_len <= config.max_positions:
        raise ValueError(
            f"max_model_len must be between 1 and the model's {config.max_positions}, got {max_model_len}"
        )
    limits = OfflineLimits(
        num_slots=settings.num_slots, num_pages=0, block_size_tokens=BLOCK_SIZE_TOKENS,
        max_step_tokens=settings.max_step_tokens, max_model_len=max_model_len, vocab_size=config.vocab_size,
    )  # fmt: skip
    num_pages = settings.num_pages
    if num_pages is None:
        num_pages = _num_pages(model, settings, limits)
    limits = replace(limits, num_pages=num_pages)
    return OfflineEngine(
        OfflineState(limits, eos_token_ids=model.eos_token_ids),
        _runner(model, settings, limits),
        overlaps=settings.overlaps,
    )


def _runner(model: Model, settings: OfflineSettings, limits: OfflineLimits) -> DeviceRunner:
    device = torch.device(settings.device)
    pages = allocate_pages(
        model.config, num_pages=limits.num_pages + 1, block=limits.block_size_tokens,
        dtype=settings.page_dtype, device=device,
    )  # fmt: skip
    backend = BACKENDS[settings.backend](model.config, model.weights, pages, limits.max_model_len)
    can_capture = settings.device == "cuda" and settings.backend == "triton"
    return DeviceRunner(
        limits,
        forward=backend.transformer.forward,
        sample=backend.sample,
        device=device,
        capture=GraphCapture(device) if settings.captures and can_capture else None,
    )


def _num_pages(model: Model, settings: OfflineSettings, limits: OfflineLimits) -> int:
    num_bytes = page_bytes(model.config, block=limits.block_size_tokens, dtype=settings.page_dtype)
    if settings.device == "cpu":
        return max(
            1, min(_CPU_POOL_BYTES // num_bytes, limits.num_slots * limits.pages_for(limits.max_model_len))
        )
    runner = _runner(model, replace(settings, captures=False), limits)
    # Their tokens all go to the one page of the padding.
    decode, prompt = (partial(_run, runner, step) for step in largest_steps(limits))
    memory = measure_memory(torch.device(settings.device), [prompt], captured=decode)
    return (
        num_pages_that_fit(memory, share=settings.memory_share, page_bytes=num_bytes) - 1
    )  # one for padding


def _run(runner: DeviceRunner, step: OfflineStep) -> None:
    runner.launch(step).token_ids()


def largest_steps(limits: OfflineLimits) -> tuple[OfflineStep, OfflineStep]:
    """A token in every slot; then as many prompt tokens as a step may have, of prompts as long as may be."""
    sampling, length = SamplingParams(temperature=0.0), min(limits.max_step_tokens, limits.max_model_len)
    slots = [
        Generation(prompt_token_ids=(0,) * length, sampling=sampling, slot=slot)
        for slot in range(limits.num_slots)
    ]
    num_prompts = max(1, min(limits.num_slots, limits.max_step_tokens // length))
    chunks = tuple(
        PromptChunk(generation=generation, slot=generation.slot, page_ids=(), start=0, stop=length)
        for generation in slots[:num_prompts]
    )
    return OfflineStep(decoding=tuple(slots)), OfflineStep(chunks=chunks)
