"""Against transformers, for every family: prefill, chunked prefill, decode, mixed batches, greedy texts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.engine.batch import BatchBuilder
from workers.model.checkpoint import Checkpoint
from workers.model.config import load_config
from workers.model.cpu_operations import cpu_transformer
from workers.model.cpu_weights import load_cpu_weights
from workers.quantization import CPU_QUANTIZATIONS
from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import ScheduledRequest

TOLERANCE = 1e-4
INT8_ERROR = 0.15  # of the logits, relative; 0.03 to 0.11 with these random weights, 0.02 with learnt ones
BLOCK = 16
MAX_LEN = 256
OracleAndPath = tuple[Any, Path]


class Runner:
    """A model with pages and requests, stepped by hand; a request's pages are scattered over the pool."""

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32, quantize: str = "none") -> None:
        config = load_config(path)
        weights = load_cpu_weights(Checkpoint(path), config, dtype=dtype, quantize=quantize)
        self.builder = BatchBuilder(block_size_tokens=BLOCK, max_pages_per_request=MAX_LEN // BLOCK)
        shape = (len(config.layers), 64, 2, config.num_kv_heads, BLOCK, config.head_dim)
        # Not zeros: what a kernel must not read has to show in the result.
        pages = torch.full(shape, torch.nan, dtype=dtype)
        self.transformer = cpu_transformer(config, weights, pages_LP2GBC=pages, max_model_len=MAX_LEN)
        self.free = [PageId(page) for page in torch.randperm(64, generator=torch.manual_seed(3)).tolist()]
        self.requests: dict[str, Request] = {}

    def add(self, name: str, tokens: Sequence[int]) -> None:
        self.requests[name] = Request(
            request_id=RequestId(name), session_id=SessionId(0), prompt_token_ids=list(tokens),
            sampling=SamplingParams(), arrival_s=0.0,
        )  # fmt: skip

    def step(self, num_tokens_of: dict[str, int]) -> dict[str, torch.Tensor]:
        """Computes so many more tokens of each request; returns the logits after each one's last."""
        rows = [self._row(self.requests[name], num_tokens) for name, num_tokens in num_tokens_of.items()]
        batch, sampling = self.builder.build(rows)
        logits_RV = self.transformer.forward(batch)
        for row in rows:
            row.request.num_computed_tokens += row.num_new_tokens
        return {row.request.request_id: logits for row, logits in zip(sampling, logits_RV, strict=True)}

    def _row(self, request: Request, num_tokens: int) -> ScheduledRequest:
        stop = request.num_computed_tokens + num_tokens
        while len(request.page_ids) * BLOCK < stop:
            request.page_ids = (*request.page_ids, self.free.pop())
        return ScheduledRequest(
            request=request, num_computed_tokens=request.num_computed_tokens, num_new_tokens=num_tokens,
            page_ids=request.page_ids, samples=stop == request.num_tokens,
        )  # fmt: skip


@pytest.fixture
def oracle_and_runner(family: str, checkpoint_of: Callable[[str], OracleAndPath]) -> tuple[Any, Runner]:
    oracle, path = checkpoint_of(family)
    return oracle, Runner(path)


def random_tokens(num_tokens: int, *, seed: int = 0) -> list[int]:
    return torch.randint(3, 211, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def oracle_logits(oracle: Any, tokens: Sequence[int]) -> torch.Tensor:
    return oracle(torch.tensor([tokens])).logits[0]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("num_tokens", [41, 150])  # within a compiled program, and beyond it
def test_prefill_matches_the_oracle(num_tokens: int, oracle_and_runner: tuple[Any, Runner]) -> None:
    oracle, runner = oracle_and_runner
    tokens = random_tokens(num_tokens)
    runner.add("a", tokens)
    assert_close(runner.step({"a": num_tokens})["a"], oracle_logits(oracle, tokens)[-1])


@pytest.mark.parametrize("chunks", [(16, 7, 1, 24, 5, 22), (70, 66, 3, 81)])
def test_chunked_prefill_matches_the_oracle(
    chunks: tuple[int, ...], oracle_and_runner: tuple[Any, Runner]
) -> None:
    oracle, runner = oracle_and_runner
    tokens = random_tokens(sum(chunks))
    runner.add("a", tokens)
    for num_tokens in chunks[:-1]:
        assert runner.step({"a": num_tokens}) == {}
    assert_close(runner.step({"a": chunks[-1]})["a"], oracle_logits(oracle, tokens)[-1])


def test_decode_matches_the_oracle_after_every_token(oracle_and_runner: tuple[Any, Runner]) -> None:
    oracle, runner = oracle_and_runner
    tokens = random_tokens(50)
    expected = oracle_logits(oracle, tokens)
    runner.add("a", tokens[:10])
    assert_close(runner.step({"a": 10})["a"], expected[9])
    for position in range(10, 50):
        runner.requests["a"].output_token_ids.append(tokens[position])
        assert_close(runner.step({"a": 1})["a"], expected[position])


def test_a_batch_of_mixed_lengths_and_phases_matches_the_oracle(
    oracle_and_runner: tuple[Any, Runner],
) -> None:
    oracle, runner = oracle_and_runner
    texts = {
        f"r{number}": random_tokens(length, seed=number)
        for number, length in enumerate((40, 3, 33, 70, 1, 18, 69))
    }
    for name, tokens in texts.items():
        runner.add(name, tokens)
    expected = {name: oracle_logits(oracle, tokens)[-1] for name, tokens in texts.items()}
    runner.step({"r0": 39, "r2": 20})
    got = runner.step({"r3": 30, "r0": 1, "r1": 3})
    got |= runner.step({"r4": 1, "r2": 13, "r3": 40, "r5": 18, "r6": 69})
    assert got.keys() == texts.keys()
    for name, logits in got.items():
        assert_close(logits, expected[name])


@pytest.mark.parametrize("quantize", CPU_QUANTIZATIONS)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_token_comes_out_the_same_to_the_last_bit_whatever_it_is_computed_with(
    num_threads: int, quantize: str, family: str, checkpoint_of: Callable[[str], OracleAndPath]
) -> None:
    tokens = random_tokens(150)
    usual_num_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        # A prefill in one piece, then decoding alone.
        alone = Runner(checkpoint_of(family)[1], quantize=quantize)
        alone.add("a", tokens[:140])
        expected = [alone.step({"a": 140})["a"]]
        for token in tokens[140:]:
            alone.requests["a"].output_token_ids.append(token)
            expected.append(alone.step({"a": 1})["a"])
        # In chunks of all kinds beside others, decoding in batches of changing sizes.
        crowd = Runner(checkpoint_of(family)[1], quantize=quantize)
        crowd.add("a", tokens[:140])
        for number in range(6):
            crowd.add(f"b{number}", random_tokens(60, seed=number + 1))
        got = []
        for chunk, others in zip((1, 7, 65, 17, 50), (0, 1, 3, 6, 2), strict=True):
            logits = crowd.step({**{f"b{number}": 5 for number in range(others)}, "a": chunk})
        got.append(logits["a"])
        for number, token in enumerate(tokens[140:]):
            crowd.requests["a"].output_token_ids.append(token)
            sizes = {f"b{other}": 1 + number for other in range(number % 4)}
            got.append(crowd.step({"a": 1, **sizes})["a"])
        # As if it had died at the end and were computed again from all its tokens.
        again = Runner(checkpoint_of(family)[1], quantize=quantize)
        again.add("a", tokens)
        last = again.step({"a": 150})["a"]
    finally:
        torch.set_num_threads(usual_num_threads)
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * 11
    assert torch.equal(last, expected[-1])


def test_greedy_text_of_a_batch_is_the_oracles(oracle_and_runner: tuple[Any, Runner]) -> None:
    oracle, runner = oracle_and_runner
    prompts = {
        name: random_tokens(length, seed=length) for name, length in {"a": 21, "b": 5, "c": 16}.items()
    }
    expected = {
        name: oracle.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for name, prompt in prompts.items()
    }  # fmt: skip
    for name, prompt in prompts.items():
        runner.add(name, prompt)
    logits = runner.step({name: len(prompt) for name, prompt in prompts.items()})
    for _ in range(64):
        for name, request in runner.requests.items():
            request.output_token_ids.append(int(logits[name].argmax()))
        logits = runner.step(dict.fromkeys(prompts, 1))
    assert {name: request.output_token_ids for name, request in runner.requests.items()} == expected


def test_a_request_recomputed_after_preemption_goes_on_as_before(
    oracle_and_runner: tuple[Any, Runner],
) -> None:
    oracle, runner = oracle_and_runner
    tokens = random_tokens(40)
    runner.add("a", tokens[:30])
    runner.step({"a": 30})
    request = runner.requests["a"]
    request.output_token_ids += tokens[30:]
    request.num_computed_tokens = 0
    request.page_ids = ()
    assert_close(runner.step({"a": 40})["a"], oracle_logits(oracle, tokens)[-1])


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_bfloat16_is_as_near_to_float32_as_the_oracles_bfloat16(
    name: str, checkpoint_of: Callable[[str], OracleAndPath]
) -> None:
    oracle, path = checkpoint_of(name)
    tokens = random_tokens(40)
    exact = oracle_logits(oracle, tokens)[-1]
    theirs = oracle_logits(type(oracle).from_pretrained(path, dtype=torch.bfloat16), tokens)[-1].float()
    runner = Runner(path, dtype=torch.bfloat16)
    runner.add("a", tokens)
    runner.step({"a": 25})
    runner.step({"a": 14})
    ours = runner.step({"a": 1})["a"]
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("num_tokens", [41, 150])
def test_int8_logits_are_near_those_of_float32(
    num_tokens: int, family: str, checkpoint_of: Callable[[str], OracleAndPath]
) -> None:
    oracle, path = checkpoint_of(family)
    errors = []
    for seed in range(8):  # a token whose expert changes is far off alone
        tokens = random_tokens(num_tokens, seed=seed)
        runner = Runner(path, quantize="int8")
        runner.add("a", tokens)
        exact = oracle_logits(oracle, tokens)[-1]
        errors.append(float((runner.step({"a": num_tokens})["a"] - exact).norm() / exact.norm()))
    assert 0 < sorted(errors)[4] < INT8_ERROR, errors
