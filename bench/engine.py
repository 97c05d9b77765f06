"""Prefill and decode of a Llama of 213 million parameters, fp32 against transformers and int8 against our fp32.

16 layers, hidden 1024, 16 query and 4 key/value heads, MLP 2816, vocabulary 32,000, random weights, two threads.
Prefill: 512 tokens. Decode, greedy: prompts of 128 tokens, 128 new ones, batches of 1, 8 and 32, from the first new
token to the last. Rounds of the three engines alternate in one run, after a warm-up, so that a slow moment of the
machine hits all; ratios are of medians. What int8 costs is measured on the shipped model (`bench.quantized_quality`).
`--quick` keeps the models and shortens everything else.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

from bench.quantized_quality import qualities
from bench.report import Claim, write_report
from workers.engine.engine import Engine, load_engine
from workers.quantization import CPU_QUANTIZATIONS
from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import ScheduledRequest, StepPlan

NUM_THREADS = 2
PREFILL_TOKENS = 512
BATCHES = (1, 8, 32)
AIMS = {1: 1.9, 8: 2.8, 32: 2.8}
INT8_PREFILL_AIM, INT8_AIMS = 1.6, {1: 2.2, 32: 1.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much to measure."""

    num_rounds: int
    num_prompt_tokens: int
    num_new_tokens: int


FULL = Extent(num_rounds=3, num_prompt_tokens=128, num_new_tokens=128)
QUICK = Extent(num_rounds=1, num_prompt_tokens=48, num_new_tokens=16)


class StepTimes(transformers.LogitsProcessor):
    """Notes when each step of `generate` has its logits."""

    def __init__(self) -> None:
        self.stamps_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.stamps_s.append(time.perf_counter())
        return scores


# Prompts and a number of new tokens -> when each step was done, in seconds.
Generate = Callable[[list[list[int]], int], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within a minute, for a first look")
    extent = QUICK if parser.parse_args().quick else FULL
    with tempfile.TemporaryDirectory() as directory:
        peer, model_bytes = make_checkpoint(Path(directory))
        engines = [
            load_engine(model_path=Path(directory), quantize=quantize, num_pages=640, num_threads=NUM_THREADS)
            for quantize in CPU_QUANTIZATIONS
        ]
    sides = [partial(theirs_generate, peer), *(partial(ours_generate, engine) for engine in engines)]
    for generate in sides:
        generate(random_prompts(2, 80), 4)  # warm-up
    bandwidth = read_bandwidth()
    print(
        f"{'':18}{'transformers':>14}{'float32':>14}{'ratio':>7}{'int8':>14}{'ratio':>7}"
        f"   medians and spreads of {extent.num_rounds}"
    )
    claims = measure_prefill(sides, extent)
    for batch in BATCHES:
        found, ours_per_s = measure_decode(sides, batch, extent)
        claims += found
        if batch == 1:
            share = ours_per_s * model_bytes / bandwidth
    print(
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s, fp32 weights read per token {model_bytes / 1e9:.3f} GB"
    )
    claims.append(
        Claim(name="decode_b1_of_bandwidth", value=share, unit="fraction", aim=0.85, better="higher")
    )
    claims.append(measure_quality(num_samples=50 if extent is FULL else 2))
    write_report("engine", claims, keep=extent is FULL)


def make_checkpoint(directory: Path) -> tuple[transformers.LlamaForCausalLM, int]:
    """Writes a random checkpoint; returns the peer that has its weights, and the bytes one token must read."""
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(config)
    peer.train(False)
    peer.save_pretrained(directory)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    num_embedding_weights = config.vocab_size * config.hidden_size
    return peer, 4 * (sum(p.numel() for p in peer.parameters()) - num_embedding_weights)


def read_bandwidth() -> float:
    """Bytes per second that two threads read: the median of sums over 512 MiB, after a warm-up."""
    memory = torch.ones(2**27)
    memory.sum()
    return memory.nbytes / statistics.median(seconds(memory.sum) for _ in range(9))


def measure_prefill(sides: Sequence[Generate], extent: Extent) -> list[Claim]:
    prompts = random_prompts(1, PREFILL_TOKENS)

    def rate(generate: Generate) -> float:
        return PREFILL_TOKENS / seconds(lambda: generate(prompts, 1))

    theirs, ours, int8 = alternate(rate, sides, 2 * extent.num_rounds)
    print_row("prefill 512", theirs, ours, int8)
    return [
        ratio_claim("prefill_vs_transformers", ours, theirs, aim=1.15),
        ratio_claim("int8_prefill_vs_fp32", int8, ours, aim=INT8_PREFILL_AIM),
    ]


def measure_decode(sides: Sequence[Generate], batch: int, extent: Extent) -> tuple[list[Claim], float]:
    """(claims, our tokens per second in fp32)."""
    prompts = random_prompts(batch, extent.num_prompt_tokens)

    def rate(generate: Generate) -> float:
        stamps_s = generate(prompts, extent.num_new_tokens)
        return batch * (len(stamps_s) - 1) / (stamps_s[-1] - stamps_s[0])

    theirs, ours, int8 = alternate(rate, sides, extent.num_rounds)
    print_row(f"decode, batch {batch}", theirs, ours, int8)
    claims = [ratio_claim(f"decode_b{batch}_vs_transformers", ours, theirs, aim=AIMS[batch])]
    if batch in INT8_AIMS:
        claims.append(ratio_claim(f"int8_decode_b{batch}_vs_fp32", int8, ours, aim=INT8_AIMS[batch]))
    return claims, statistics.median(ours)


def ratio_claim(name: str, rates: list[float], others: list[float], *, aim: float) -> Claim:
    ratio = statistics.median(rates) / statistics.median(others)
    return Claim(name=name, value=ratio, unit="x", aim=aim, better="higher")


def measure_quality(*, num_samples: int) -> Claim:
    exact, int8 = qualities(CPU_QUANTIZATIONS, num_samples=num_samples)
    rise = int8.figures.perplexity / exact.figures.perplexity - 1
    print(f"shipped model, {num_samples} problems a task: float32, int8")
    print(f"  perplexity          {exact.figures.perplexity:.3f}, {int8.figures.perplexity:.3f}")
    for task, share in exact.figures.accuracy.items():
        print(f"  {task:20}{share:.3f}, {int8.figures.accuracy[task]:.3f}")
    print(
        f"  error of the logits {int8.logits_error:.4f} of their size; same best token {int8.same_best:.4f}"
    )
    return Claim(name="int8_perplexity_rise", value=rise, unit="fraction", aim=0.01, better="lower")


def alternate(
    rate: Callable[[Generate], float], sides: Sequence[Generate], num_rounds: int
) -> list[list[float]]:
    """Each side's rates."""
    rounds = [[rate(generate) for generate in sides] for _ in range(num_rounds)]
    return [list(rates) for rates in zip(*rounds, strict=True)]


def theirs_generate(
    peer: transformers.LlamaForCausalLM, prompts: list[list[int]], num_new: int
) -> list[float]:
    """When each step was done, in seconds."""
    tokens, times = torch.tensor(prompts), StepTimes()
    generate = cast(Any, peer).generate  # its annotations demand a class that is only a type to them
    with torch.inference_mode():
        generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_new, do_sample=False,
            eos_token_id=None, pad_token_id=0, logits_processor=transformers.LogitsProcessorList([times]),
        )  # fmt: skip
    return times.stamps_s


def ours_generate(engine: Engine, prompts: list[list[int]], num_new: int) -> list[float]:
    """When each step was done, in seconds. A prompt is a step of its own."""
    requests = prefilled(engine, prompts, num_new)
    stamps_s = [time.perf_counter()]
    for _ in range(num_new - 1):
        step(engine, requests)
        stamps_s.append(time.perf_counter())
    return stamps_s


def prefilled(engine: Engine, prompts: list[list[int]], num_new: int) -> list[Request]:
    """A request for each prompt with its first token, and pages for `num_new`."""
    pages_each = -(-(len(prompts[0]) + num_new) // 16)
    requests = [
        Request(
            request_id=RequestId(str(number)), session_id=SessionId(0), prompt_token_ids=prompt,
            sampling=SamplingParams(temperature=0.0, ignore_eos=True), arrival_s=0.0,
            page_ids=tuple(PageId(number * pages_each + page) for page in range(pages_each)),
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    for request in requests:
        step(engine, [request])
    return requests


def step(engine: Engine, requests: list[Request]) -> None:
    rows = tuple(
        ScheduledRequest(
            request=request, num_computed_tokens=request.num_computed_tokens,
            num_new_tokens=request.num_tokens - request.num_computed_tokens, page_ids=request.page_ids, samples=True,
        )
        for request in requests
    )  # fmt: skip
    result = engine.execute(StepPlan(rows=rows))
    for request in requests:
        request.num_computed_tokens = request.num_tokens
        request.output_token_ids.append(result.sampled[request.request_id].token_id)


def random_prompts(batch: int, num_tokens: int) -> list[list[int]]:
    prompts: list[list[int]] = np.random.default_rng(1).integers(3, 32_000, (batch, num_tokens)).tolist()
    return prompts


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def print_row(name: str, theirs: list[float], ours: list[float], int8: list[float]) -> None:
    """Medians and half spreads, ours against theirs, int8 against ours."""

    def cell(rates: list[float]) -> str:
        half = 50 * (max(rates) - min(rates)) / statistics.median(rates)
        return f"{statistics.median(rates):.1f} ±{half:.0f}%"

    middle = [statistics.median(rates) for rates in (theirs, ours, int8)]
    print(
        f"{name:18}{cell(theirs):>14}{cell(ours):>14}{middle[1] / middle[0]:7.2f}{cell(int8):>14}"
        f"{middle[2] / middle[1]:7.2f}   tok/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
