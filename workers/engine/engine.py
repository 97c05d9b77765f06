"""Executes step plans: batch, model, sampling. Composed here; decides nothing and remembers no request's progress."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kernels.int8_linear import Int8Weights
from workers.engine.batch import BatchBuilder
from workers.engine.kv_pool import KvPool
from workers.engine.sampler import Sampler
from workers.engine.stop_strings import StopStrings
from workers.model.config import load_config
from workers.model.cpu_operations import cpu_transformer
from workers.model.info import ModelInfo, load_model_info
from workers.model.quantized_checkpoint import open_checkpoint
from workers.model.transformer import Transformer
from workers.model.weights import load_weights
from workers.request import RequestId
from workers.step import StepPlan, StepResult


class Engine:
    """One model on this machine's CPU. Every method is called from one thread at a time."""

    def __init__(
        self,
        model: ModelInfo,
        *,
        transformer: Transformer,
        kv_pool: KvPool,
        sampler: Sampler,
        stop_strings: StopStrings,
    ) -> None:
        self.model = model
        self.kv_pool = kv_pool
        self._transformer = transformer
        self._sampler = sampler
        self._stop_strings = stop_strings
        self._batches = BatchBuilder(
            block_size_tokens=model.layout.block_size_tokens,
            max_pages_per_request=-(-model.max_model_len // model.layout.block_size_tokens),
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan, *, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Computes the rows of `plan`, all in one batch; `on_layer(l)` follows the last KV write of layer l."""
        if not plan.rows:
            return StepResult(sampled={})
        batch, sampling = self._batches.build(plan.rows)
        logits_RV = self._transformer.forward(batch, on_layer=on_layer)
        if not sampling:
            return StepResult(sampled={})
        requests = [row.request for row in sampling]
        sampled = {}
        for request, token in zip(requests, self._sampler.sample(requests, logits_RV), strict=True):
            if request.sampling.stop_strings:
                stop_string = self._stop_strings.find(request, token.token_id)
                token = replace(token, stop_string=stop_string)
            sampled[request.request_id] = token
        return StepResult(sampled=sampled)

    def forget(self, request_id: RequestId) -> None:
        """Drops what sampling keeps of a request. Called between steps, when the request leaves the worker."""
        self._sampler.forget(request_id)
        self._stop_strings.forget(request_id)


def load_engine(
    *,
    model_path: Path,
    dtype: str = "float32",
    quantize: str = "none",
    num_pages: int | None = None,
    kv_cache_bytes: int = 0,
    max_model_len: int | None = None,
    num_threads: int = 1,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Engine:
    """Loads a checkpoint directory; `num_pages` goes before `kv_cache_bytes`. Sets torch's number of threads.

    `on_progress` hears the share of layers that are loaded, while they are.

    Raises `CheckpointError` for a checkpoint that cannot be served, `ValueError` for settings that do not fit it.
    """
    torch.set_num_threads(num_threads)
    config = load_config(model_path)
    checkpoint = open_checkpoint(model_path)
    model = load_model_info(
        model_path, checkpoint, dtype=dtype, quantize=quantize, max_model_len=max_model_len
    )
    layout = model.layout
    if num_pages is None:
        num_pages = kv_cache_bytes // layout.block_bytes
        if num_pages < 1:
            raise ValueError(
                f"kv_cache_bytes {kv_cache_bytes} is less than one page of {layout.block_bytes} bytes"
            )
    weights = load_weights(
        checkpoint,
        config,
        dtype=getattr(torch, dtype),
        packed=Int8Weights if quantize == "int8" else None,
        on_progress=on_progress,
    )
    kv_pool = KvPool(layout, num_pages=num_pages)
    return Engine(
        model,
        transformer=cpu_transformer(
            config, weights, pages_LP2GBC=kv_pool.pages_LP2GBC, max_model_len=model.max_model_len
        ),
        kv_pool=kv_pool,
        sampler=Sampler(eos_token_ids=model.eos_token_ids, vocab_size=model.vocab_size),
        stop_strings=StopStrings(model_path / "tokenizer.json"),
    )
