"""The engine on a Llama of 8 billion parameters (noise, bf16) as fractions of what the device can do.

What computes here is what workers serve with, without their sessions (`workers.engine.offline_engine`). A decode step
reads all weights but the embedding once, and the keys and values of every context: that many bytes at the copy
bandwidth are its floor. Times are of the engine as it is called, with deciding, launching and reading results.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import torch

from bench.gpu_limits import Limits
from bench.report import Claim
from workers.compute_device import ComputeDevice
from workers.engine.find_device import find_device
from workers.engine.offline_engine import Model, OfflineEngine, build_engine
from workers.engine.offline_settings import OfflineSettings
from workers.model.config import parse_config
from workers.model.weights import DenseMlp, ModelWeights, load_weights
from workers.request import SamplingParams

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "max_position_embeddings": 16_384,
}  # fmt: skip
SETTINGS = OfflineSettings(
    compute=ComputeDevice(device="cuda"), max_num_seqs=64, max_num_batched_tokens=8192, max_model_len=8320
)
CONTEXT, PROMPT = 1024, 8192
NUM_WARMUP, NUM_STEPS, NUM_PROMPTS = 8, 64, 5
AIMS = {1: 0.8, 64: 0.7}


class Noise:
    """As a checkpoint, but filled on the device."""

    def has(self, name: str) -> bool:
        return True

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        target.fill_(1.0) if "norm" in name else target.normal_(std=0.02)


def measure(limits: Limits) -> list[Claim]:
    torch.cuda.empty_cache()
    config = parse_config(LLAMA_3_8B)
    device = find_device(SETTINGS.compute)
    weights = load_weights(Noise(), config, dtype=SETTINGS.weight_dtype, device=device)
    model = Model(config=config, weights=weights, eos_token_ids=frozenset())
    engine = build_engine(model, SETTINGS)
    print(f"engine: {engine.engine.kv_pool.num_pages} pages of 16 tokens")
    claims = [measure_prefill(engine, model, limits)]
    claims += [measure_decode(engine, model, limits, batch=batch) for batch in AIMS]
    for batch in AIMS if SETTINGS.compute.is_cuda else ():
        print(f"launch gaps at batch {batch}: {gap_share(replays(engine, batch=batch)):.1%}")
    return claims


def measure_decode(engine: OfflineEngine, model: Model, limits: Limits, *, batch: int) -> Claim:
    config, seconds = model.config, decode_step_s(engine, batch=batch)
    context = CONTEXT + NUM_WARMUP + NUM_STEPS / 2  # on average while it is measured
    kv_bytes = batch * context * len(config.layers) * 2 * config.num_kv_heads * config.head_dim * 2
    floor_s = (2 * num_multiplied_weights(model.weights) + kv_bytes) / (limits.copy_gb_s * 1e9)
    print(
        f"decode step at batch {batch}, contexts of {context:.0f}: {seconds * 1e3:.2f} ms, floor {floor_s * 1e3:.2f}"
    )
    name = f"decode_b{batch}_of_floor"
    return Claim(name=name, value=floor_s / seconds, unit="", aim=AIMS[batch], better="higher")


def decode_step_s(engine: OfflineEngine, *, batch: int) -> float:
    """Of steps in which nothing but decoding happens: the mean of NUM_STEPS in a row."""
    with decoding(engine, batch=batch):
        return timed(lambda: [engine.step() for _ in range(NUM_STEPS)]) / NUM_STEPS


@contextlib.contextmanager
def decoding(engine: OfflineEngine, *, batch: int) -> Iterator[None]:
    """The next NUM_STEPS steps do nothing else."""
    num_tokens = NUM_WARMUP + NUM_STEPS + 4
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    generations = [engine.add([7 + row] * CONTEXT, sampling) for row in range(batch)]
    while any(len(generation.output_token_ids) < NUM_WARMUP for generation in generations):
        engine.step()
    yield
    while engine.step():
        pass


def replays(engine: OfflineEngine, *, batch: int) -> list[tuple[torch.Event, torch.Event]]:
    """When the graph of each of NUM_STEPS decode steps began and ended, by the device's own clock."""
    marks: list[tuple[torch.Event, torch.Event]] = []
    replay = torch.cuda.CUDAGraph.replay

    def marked(graph: torch.cuda.CUDAGraph) -> None:
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        replay(graph)
        end.record()
        marks.append((start, end))

    with decoding(engine, batch=batch), mock.patch.object(torch.cuda.CUDAGraph, "replay", marked):
        for _ in range(NUM_STEPS):
            engine.step()
    torch.cuda.synchronize()
    return marks


def gap_share(marks: Sequence[tuple[torch.Event, torch.Event]]) -> float:
    """Of the time of decode steps, what lies between two graphs: there the device waits for the next launch, and copies
    a few numbers."""
    gaps_ms = sum(end.elapsed_time(start) for (_, end), (start, _) in itertools.pairwise(marks))
    return gaps_ms / marks[0][0].elapsed_time(marks[-1][1])


def measure_prefill(engine: OfflineEngine, model: Model, limits: Limits) -> Claim:
    config, sampling = model.config, SamplingParams(temperature=0.0, max_tokens=1)
    # Another each time: what begins as one before is not computed again.
    first, *prompts = torch.randint(0, config.vocab_size, (NUM_PROMPTS + 1, PROMPT)).tolist()
    engine.generate([(first, sampling)])
    seconds = statistics.median(timed(partial(engine.generate, [(prompt, sampling)])) for prompt in prompts)
    # The output matrix has one row to multiply; causal attention does half of two square products.
    products = 2 * PROMPT * (num_multiplied_weights(model.weights) - model.weights.lm_head.weight.numel())
    attention = 2 * PROMPT * PROMPT * config.num_heads * config.head_dim * len(config.layers)
    rate = (products + attention) / seconds / 1e12
    print(f"prefill of {PROMPT}: {seconds * 1e3:.0f} ms, {rate:.0f} TFLOP/s, {PROMPT / seconds:.0f} tokens/s")
    value = rate / limits.matrix_tflop_s
    return Claim(name="prefill_of_matrix_rate", value=value, unit="", aim=0.6, better="higher")


def num_multiplied_weights(weights: ModelWeights) -> int:
    """Numbers in the matrices that a token is multiplied by."""
    total: int = weights.lm_head.weight.numel()
    for layer in weights.layers:
        assert isinstance(layer.mlp, DenseMlp)
        matrices = layer.qkv, layer.output, layer.mlp.gate_up, layer.mlp.down
        total += sum(matrix.weight.numel() for matrix in matrices)
    return total


def timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start_s
