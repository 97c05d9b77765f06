"""Prefill and decode of a Llama of 213 million parameters in fp32, against transformers in the same run.

16 layers, hidden 1024, 16 query and 4 key/value heads, MLP 2816, vocabulary 32,000, random weights, two threads.
Prefill: 512 tokens. Decode, greedy: prompts of 128 tokens, 128 new ones, batches of 1, 8 and 32, from the first new
token to the last. Rounds of the two engines alternate, so that a slow moment of the machine hits both; ratios are of
medians. `--quick` keeps the model and shortens everything else.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

from bench.report import Claim, write_report
from workers.engine.engine import Engine, load_engine
from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import ScheduledRequest, StepPlan

NUM_THREADS = 2
PREFILL_TOKENS = 512
BATCHES = (1, 8, 32)
AIMS = {1: 1.9, 8: 2.8, 32: 2.8}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within a minute, for a first look")
    extent = QUICK if parser.parse_args().quick else FULL
    with tempfile.TemporaryDirectory() as directory:
        peer, model_bytes = make_checkpoint(Path(directory))
        engine = load_engine(model_path=Path(directory), num_pages=640, num_threads=NUM_THREADS)
    bandwidth = read_bandwidth()
    print(
        f"{'':22}{'transformers':>14}{'penstock':>14}{'ratio':>8}   medians and spreads of {extent.num_rounds}"
    )
    claims = [measure_prefill(engine, peer, extent)]
    for batch in BATCHES:
        ratio, ours_per_s = measure_decode(engine, peer, batch, extent)
        name = f"decode_b{batch}_vs_transformers"
        claims.append(Claim(name=name, value=ratio, unit="x", aim=AIMS[batch], better="higher"))
        if batch == 1:
            share = ours_per_s * model_bytes / bandwidth
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, weights read per token {model_bytes / 1e9:.3f} GB")
    claims.append(
        Claim(name="decode_b1_of_bandwidth", value=share, unit="fraction", aim=0.85, better="higher")
    )
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


def measure_prefill(engine: Engine, peer: transformers.LlamaForCausalLM, extent: Extent) -> Claim:
    prompts = random_prompts(1, PREFILL_TOKENS)
    rates = alternate(
        lambda: PREFILL_TOKENS / seconds(lambda: theirs_generate(peer, prompts, 1)),
        lambda: PREFILL_TOKENS / seconds(lambda: ours_generate(engine, prompts, 1)),
        2 * extent.num_rounds,
    )
    ratio = print_row("prefill 512", *rates)
    return Claim(name="prefill_vs_transformers", value=ratio, unit="x", aim=1.15, better="higher")


def measure_decode(
    engine: Engine, peer: transformers.LlamaForCausalLM, batch: int, extent: Extent
) -> tuple[float, float]:
    """(ratio to the peer, our tokens per second)."""
    prompts, num_new = random_prompts(batch, extent.num_prompt_tokens), extent.num_new_tokens

    def rate(stamps_s: list[float]) -> float:
        return batch * (len(stamps_s) - 1) / (stamps_s[-1] - stamps_s[0])

    theirs, ours = alternate(
        lambda: rate(theirs_generate(peer, prompts, num_new)),
        lambda: rate(ours_generate(engine, prompts, num_new)),
        extent.num_rounds,
    )
    return print_row(f"decode, batch {batch}", theirs, ours), statistics.median(ours)


def alternate(
    theirs: Callable[[], float], ours: Callable[[], float], num_rounds: int
) -> tuple[list[float], list[float]]:
    pairs = [(theirs(), ours()) for _ in range(num_rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


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
    stamps_s = [time.perf_counter()]
    for _ in range(num_new - 1):
        step(engine, requests)
        stamps_s.append(time.perf_counter())
    return stamps_s


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


def print_row(name: str, theirs: list[float], ours: list[float]) -> float:
    """Prints medians and half spreads; returns the ratio of the medians."""

    def cell(rates: list[float]) -> str:
        half = 50 * (max(rates) - min(rates)) / statistics.median(rates)
        return f"{statistics.median(rates):.1f} ±{half:.0f}%"

    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"{name:22}{cell(theirs):>14}{cell(ours):>14}{ratio:8.2f}   tok/s", flush=True)
    return ratio


if __name__ == "__main__":
    main()
