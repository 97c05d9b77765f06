"""Prompts in, tokens out, without a server: the engine and the decisions of a worker, in one thread.

Nothing here is of its own kind: `EngineState` has the requests and their pages, `schedule` and `look_ahead` decide the
steps, `Engine` computes them. A worker's loop does the same between sessions, pulls and tiers (`workers.loop`).
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import torch

from workers.engine.device_sampler import needs_logits
from workers.engine.engine import Engine, LaunchedStep, compose_engine, load_model_weights
from workers.engine.engine_parts import OpenedModel, TokenSampler
from workers.engine.largest_step import LargestStep
from workers.engine.offline_settings import OfflineSettings
from workers.model.config import ModelConfig, load_config, load_eos_token_ids
from workers.model.info import ModelInfo, checked_length, kv_layout
from workers.model.quantized_checkpoint import open_checkpoint
from workers.model.weights import ModelWeights
from workers.policies import fcfs
from workers.request import FinishReason, Request, RequestId, RequestOutput, SamplingParams, SessionId
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState, StateLimits
from workers.step import StepPlan


@dataclass(kw_only=True, slots=True, eq=False)
class Generation:
    """A prompt and its answer so far."""

    request: Request
    finish_reason: FinishReason | None = None  # None: it goes on

    @property
    def output_token_ids(self) -> list[int]:
        return self.request.output_token_ids


class OfflineEngine:
    """One model on one device. Not to be used by two threads at once, nor again after a step that failed."""

    def __init__(self, engine: Engine, limits: SchedulerLimits) -> None:
        model = engine.model
        self.engine = engine
        self.state = EngineState(
            StateLimits(
                num_pages=engine.kv_pool.num_pages,
                max_model_len=model.max_model_len,
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
                model_fingerprint=model.fingerprint,
                max_num_waiting=sys.maxsize,  # prompts are here before they are added
            ),
            policy=fcfs,
        )
        self._limits = limits
        self._num_added = 0
        self._generations: dict[RequestId, Generation] = {}  # those that have not ended
        self._under_way: tuple[StepPlan, LaunchedStep] | None = None

    def generate(self, prompts: Iterable[tuple[Sequence[int], SamplingParams]]) -> list[Generation]:
        """The answers, all complete, in the order of the prompts. Raises as `add` does; then none of them is here."""
        generations: list[Generation] = []
        try:
            for prompt, sampling in prompts:
                generations.append(self.add(prompt, sampling))
        except Exception:
            for generation in generations:
                self._drop(generation)
            raise
        while self.step():
            pass
        return generations

    def add(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """First come, first served. Raises `InvalidRequest`, or `ValueError` for what only a server's engine does."""
        _check(sampling)
        number = self._num_added
        request = Request(
            request_id=RequestId(str(number)),
            session_id=SessionId(0),
            prompt_token_ids=list(prompt_token_ids),
            sampling=sampling,
            arrival_s=float(number),
        )
        self.state.add(request, now_s=time.time())
        self._num_added += 1
        generation = self._generations[request.request_id] = Generation(request=request)
        return generation

    def step(self) -> bool:
        """Launches the step after the one under way if it can be known, then records what that one sampled; false:
        all answers are complete."""
        under_way = self._under_way or self._launch(schedule(self.state.view(), self._limits))
        if under_way is None:
            return False
        plan, launched = under_way
        self._under_way = None
        if self.engine.can_launch_after(plan) and (following := self.state.look_ahead(plan, self._limits)):
            self._under_way = self._launch(following)
        for output in self.state.apply(plan, launched.result(), now_s=time.time()):
            self._take(output)
        self.state.take_computed_runs()  # nobody keeps them beyond their pages
        return True

    def _launch(self, plan: StepPlan) -> tuple[StepPlan, LaunchedStep] | None:
        if plan.is_empty:
            return None
        self.state.begin(plan, now_s=time.time())
        return plan, self.engine.launch(plan)

    def _drop(self, generation: Generation) -> None:
        if (output := self.state.abort(generation.request.request_id, now_s=time.time())) is not None:
            self._take(output)

    def _take(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self._generations.pop(output.request_id).finish_reason = output.finish_reason
            self.engine.forget(output.request_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    config: ModelConfig
    weights: ModelWeights  # on the device that computes
    eos_token_ids: frozenset[int]


def load_model(model_path: Path, settings: OfflineSettings, *, on_progress: Callable[[float], None]) -> Model:
    """Raises `CheckpointError` for a checkpoint that cannot be computed, `ValueError` for a missing device."""
    config = load_config(model_path)
    weights = load_model_weights(
        open_checkpoint(model_path), config, settings.compute, dtype=settings.weight_dtype,
        quantize=settings.quantize, on_progress=on_progress,
    )  # fmt: skip
    return Model(config=config, weights=weights, eos_token_ids=load_eos_token_ids(model_path))


def build_engine(model: Model, settings: OfflineSettings) -> OfflineEngine:
    """Raises `ValueError` for settings that do not fit the model or the device."""
    largest = LargestStep(
        max_num_seqs=settings.max_num_seqs, max_num_batched_tokens=settings.max_num_batched_tokens
    )
    engine = compose_engine(
        _opened(model, settings), model.weights, settings.compute, num_pages=settings.num_pages,
        largest_step=largest,
    )  # fmt: skip
    return OfflineEngine(engine, settings.limits)


def _opened(model: Model, settings: OfflineSettings) -> OpenedModel:
    config = model.config
    info = ModelInfo(
        fingerprint=b"",  # nobody else sees its KV
        vocab_size=config.vocab_size,
        max_model_len=checked_length(config, settings.max_model_len),
        eos_token_ids=model.eos_token_ids,
        dtype=settings.weight_dtype_name,
        layout=kv_layout(config, dtype=settings.page_dtype_name),
    )
    return OpenedModel(config=config, info=info, sampler=_sampler(info, settings), stop_strings=_Unasked())


def _sampler(info: ModelInfo, settings: OfflineSettings) -> TokenSampler:
    if settings.compute.backend != "numba":
        return _Unasked()
    from workers.engine.sampler import Sampler

    return Sampler(eos_token_ids=info.eos_token_ids, vocab_size=info.vocab_size)


def _check(sampling: SamplingParams) -> None:
    """What needs numba or a tokenizer, which a bare GPU machine has not, is done by no offline engine."""
    if needs_logits(sampling, num_sampled=0) or sampling.stop_strings:
        raise ValueError(
            "penalties, logit_bias, min_tokens, logprobs and stop strings need the server's engine, got"
            f" {sampling}"
        )


class _Unasked:
    """In place of what works on logits and texts on this machine, and needs packages for it."""

    def sample(self, requests: Sequence[Request], logits_SV: torch.Tensor) -> Never:
        raise AssertionError(f"requests {[request.request_id for request in requests]} ask for logits")

    def find(self, request: Request, new_token_id: int) -> Never:
        raise AssertionError(f"request {request.request_id!r} has stop strings")

    def forget(self, request_id: RequestId) -> None:
        pass
