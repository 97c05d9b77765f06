"""The engine on a device, which is the CPU here, with the formulas of a GPU's kernels: it says what the CPU's says."""

import shutil
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from workers.compute_device import ATTENTIONS, ComputeDevice
from workers.engine.backends import BACKENDS
from workers.engine.device_batch import DeviceBatchBuilder
from workers.engine.device_engine import CapturedSizes, DeviceModel, device_parts, load_device_weights
from workers.engine.device_kv_pool import DeviceKvPool
from workers.engine.engine import Engine, LaunchedStep, load_engine
from workers.engine.engine_parts import OpenedModel
from workers.engine.graph_capture import Run
from workers.engine.largest_step import LargestStep
from workers.engine.latest_tokens import LatestTokens
from workers.engine.sampler import Sampler
from workers.engine.stop_strings import StopStrings
from workers.model.checkpoint import Checkpoint
from workers.model.config import load_config
from workers.model.info import load_model_info
from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import SampledToken, ScheduledRequest, StepPlan

REFERENCE = ComputeDevice(attention="reference")
PROMPTS = ((5, 9, 33, 20, 7), (4,), tuple(range(3, 40)))


@pytest.fixture
def engines(checkpoint: Path) -> tuple[Engine, Engine]:
    """The CPU's own, and the one of a device."""
    cpu, device = (
        load_engine(model_path=checkpoint, num_pages=32, max_model_len=128, compute=compute)
        for compute in (ComputeDevice(), REFERENCE)
    )
    return cpu, device


WIDE = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module", params=["Llama", "Qwen3Moe"])
def wide_checkpoint(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of a model whose layers have inputs in whole groups of 128."""
    path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(3)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64}
    config = getattr(transformers, f"{request.param}Config")(
        **WIDE, **(experts if request.param == "Qwen3Moe" else {})
    )
    getattr(transformers, f"{request.param}ForCausalLM")(config).save_pretrained(path)
    shutil.copy(checkpoint / "tokenizer.json", path)
    return path


def new_requests(**sampling: Any) -> list[Request]:
    return [
        Request(
            request_id=RequestId(str(number)), session_id=SessionId(0), prompt_token_ids=list(prompt),
            sampling=SamplingParams(**{"seed": number, "max_tokens": 64, **sampling}), arrival_s=0.0,
        )
        for number, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def advance(
    engine: Engine,
    requests: Sequence[Request],
    *,
    most: int = 100,
    on_layer: Callable[[int], None] | None = None,
) -> dict[str, SampledToken]:
    """One step for all requests, of at most so many tokens each. Pages: eight for each, in an order of its own."""
    rows = [
        ScheduledRequest(
            request=request, num_computed_tokens=request.num_computed_tokens,
            num_new_tokens=min(most, request.num_tokens - request.num_computed_tokens),
            page_ids=tuple(PageId(31 - 8 * number - page) for page in range(8)),
            samples=request.num_tokens - request.num_computed_tokens <= most,
        )
        for number, request in enumerate(requests)
    ]  # fmt: skip
    result = engine.execute(StepPlan(rows=tuple(rows)), on_layer=on_layer)
    for row in rows:
        row.request.num_computed_tokens += row.num_new_tokens
        if row.samples:
            row.request.output_token_ids.append(result.sampled[row.request.request_id].token_id)
    return {str(name): token for name, token in result.sampled.items()}


def answers(engine: Engine, requests: list[Request], *, num_steps: int = 24) -> list[list[int]]:
    advance(engine, requests, most=11)  # so that decoding and a prompt's chunks meet in a step
    for _ in range(num_steps):
        advance(engine, requests)
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
        {"temperature": 0.8, "logit_bias": ((7, 3.0), (9, -3.0)), "min_tokens": 8, "frequency_penalty": 0.5},
    ],
    ids=["greedy", "drawn", "adjusted"],
)
def test_tokens_are_those_of_the_cpu(engines: tuple[Engine, Engine], sampling: dict[str, Any]) -> None:
    cpu, device = engines
    expected = answers(cpu, new_requests(**sampling))
    assert answers(device, new_requests(**sampling)) == expected
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_steps_launched_before_the_one_before_is_read_say_the_same(
    engines: tuple[Engine, Engine], temperature: float
) -> None:
    cpu, device = engines
    expected = answers(cpu, new_requests(temperature=temperature), num_steps=12)
    requests = new_requests(temperature=temperature)
    advance(device, requests, most=11)
    advance(device, requests)  # all of the last prompt but a few tokens
    advance(device, requests)
    advance(device, requests)
    launched: deque[LaunchedStep] = deque()
    for number in range(9):
        plan = StepPlan(
            rows=tuple(
                ScheduledRequest(
                    request=request, num_computed_tokens=request.num_tokens - 1 + len(launched), num_new_tokens=1,
                    page_ids=tuple(PageId(31 - 8 * place - page) for page in range(8)), samples=True,
                )
                for place, request in reversed(list(enumerate(requests)))
            )
        )  # fmt: skip
        assert device.can_launch_after(plan)
        launched.append(device.launch(plan))
        while launched and (len(launched) == 2 or number == 8):
            sampled = launched.popleft().result().sampled
            for request in requests:
                request.output_token_ids.append(sampled[request.request_id].token_id)
    assert [request.output_token_ids for request in requests] == expected


@pytest.mark.parametrize("quantize", ["w8a16", "w4a16", "fp8"])
def test_quantised_weights_answer_as_another_model(quantize: str, wide_checkpoint: Path) -> None:
    whole, quantised = (
        load_engine(model_path=wide_checkpoint, num_pages=32, compute=REFERENCE, quantize=kind)
        for kind in ("none", quantize)
    )
    assert quantised.model.fingerprint != whole.model.fingerprint
    logits = []
    for engine in (whole, quantised):
        requests = new_requests(temperature=0.0, num_logprobs=5)
        logits.append([token.logprobs for token in advance(engine, requests).values()])
    ours, theirs = (torch.tensor([one.logprob for one in found if one]) for found in logits)
    assert 0.0 < (ours - theirs).abs().max() < 0.3


@pytest.mark.parametrize(
    "sampling",
    [{"num_logprobs": 1}, {"presence_penalty": 0.5}, {"min_tokens": 3}, {"logit_bias": ((7, 1.0),)},
     {"stop_strings": ("a",)}],
    ids=str,
)  # fmt: skip
def test_what_needs_the_last_token_here_is_not_launched_ahead(
    engines: tuple[Engine, Engine], sampling: dict[str, Any]
) -> None:
    cpu, device = engines
    for given, expected in (({}, True), (sampling, False)):
        row = ScheduledRequest(
            request=new_requests(**given)[0], num_computed_tokens=0, num_new_tokens=5, page_ids=(PageId(0),),
            samples=True,
        )  # fmt: skip
        assert device.can_launch_after(StepPlan(rows=(row,))) == expected
        assert not cpu.can_launch_after(StepPlan(rows=(row,)))


def test_rows_that_ask_for_more_than_a_draw_leave_the_others_alone(engines: tuple[Engine, Engine]) -> None:
    mixed = [new_requests(temperature=0.8), new_requests(temperature=0.8)]
    for requests in mixed:
        requests[1].sampling = SamplingParams(temperature=0.0, num_logprobs=3, max_tokens=64)
    found = []
    for engine, requests in zip(engines, mixed, strict=True):
        advance(engine, requests)
        found.append(advance(engine, requests))
    cpu, device = found
    assert [device[name].token_id for name in "012"] == [cpu[name].token_id for name in "012"]
    ours, theirs = device["1"].logprobs, cpu["1"].logprobs
    assert ours is not None
    assert theirs is not None
    assert device["0"].logprobs is device["2"].logprobs is None
    assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]
    assert [log for _, log in ours.top] == pytest.approx([log for _, log in theirs.top], abs=1e-4)


def device_model(checkpoint: Path) -> DeviceModel:
    files, config, device = Checkpoint(checkpoint), load_config(checkpoint), torch.device("cpu")
    info = load_model_info(checkpoint, files, dtype="float32", max_model_len=128)
    opened = OpenedModel(
        config=config, info=info,
        sampler=Sampler(eos_token_ids=info.eos_token_ids, vocab_size=info.vocab_size),
        stop_strings=StopStrings(checkpoint / "tokenizer.json"),
    )  # fmt: skip
    weights = load_device_weights(
        files, config, dtype=torch.float32, quantize="none", device=device, on_progress=lambda share: None
    )
    return DeviceModel(opened=opened, weights=weights, device=device, attention="reference")


def test_steps_filled_up_to_the_size_that_was_captured_say_the_same_and_write_no_page_of_others(
    checkpoint: Path,
) -> None:
    model = device_model(checkpoint)
    captured: list[Run] = []
    sizes = CapturedSizes(max_num_seqs=5, capture=lambda run: captured.append(run) or run)  # type: ignore[func-returns-value]
    found = []
    for given in (None, sizes):
        engine = Engine(model.opened, device_parts(model, num_pages=32, captured=given))
        assert isinstance(engine.kv_pool, DeviceKvPool)
        engine.kv_pool.pages.pages_LP2GBC[:, 32:] = torch.nan  # what padding reads must not show
        requests = new_requests(temperature=0.8)
        answers(engine, requests, num_steps=6)
        # Fewer and fewer rows: those that have gone must write nothing any more.
        pages = [answers(engine, requests[:number], num_steps=3) and engine.kv_pool.pages.pages_LP2GBC[:, :32].clone()
                 for number in (2, 1)]  # fmt: skip
        found.append(([request.output_token_ids for request in requests], pages))
    (expected, expected_pages), (got, got_pages) = found
    assert got == expected
    for ours, theirs in zip(got_pages, expected_pages, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(captured) == 4  # of sizes 1, 2, 4, 5


def test_more_rows_than_ever_before_fit(checkpoint: Path) -> None:
    answers = []
    for compute in (ComputeDevice(), REFERENCE):
        engine = load_engine(model_path=checkpoint, num_pages=32, compute=compute)
        requests = [
            Request(
                request_id=RequestId(str(number)), session_id=SessionId(0), prompt_token_ids=[3 + number, 5],
                sampling=SamplingParams(temperature=0.0), arrival_s=0.0,
            )
            for number in range(20)
        ]  # fmt: skip
        rows = [
            ScheduledRequest(
                request=request,
                num_computed_tokens=0,
                num_new_tokens=2,
                page_ids=(PageId(number),),
                samples=True,
            )
            for number, request in enumerate(requests)
        ]
        advance(engine, requests[:1])
        answers.append(engine.execute(StepPlan(rows=tuple(rows))).sampled)
    assert answers[0] == answers[1]


def test_the_pages_of_rows_whose_step_could_not_be_built_are_sent_with_the_next() -> None:
    batches = DeviceBatchBuilder(
        torch.device("cpu"), LatestTokens(), block_size_tokens=16, max_pages_per_request=2
    )
    fits, too_long = (
        ScheduledRequest(
            request=request, num_computed_tokens=0, num_new_tokens=1, page_ids=page_ids, samples=False
        )
        for request, page_ids in zip(
            new_requests(), ((PageId(7), PageId(8)), (PageId(1), PageId(2), PageId(3))), strict=False
        )
    )
    with pytest.raises(RuntimeError):
        batches.build([fits, too_long])
    batch, _ = batches.build([fits])
    assert batch.table_RL.tolist() == [[7, 8]]


def test_blocks_move_between_the_cpu_and_a_device(engines: tuple[Engine, Engine]) -> None:
    cpu, device = engines
    for source, target in (engines, engines[::-1]):
        here, there = new_requests(temperature=0.0), new_requests(temperature=0.0)
        advance(source, here)
        blocks = bytearray(32 * source.model.layout.layer_block_bytes)
        for layer in range(source.model.layout.num_layers):
            source.kv_pool.read(layer=layer, page_ids=range(32), into=memoryview(blocks))
            target.kv_pool.write(layer=layer, page_ids=range(32), data=memoryview(blocks))
        for ours, theirs in zip(there, here, strict=True):
            ours.num_computed_tokens = theirs.num_computed_tokens
            ours.output_token_ids = list(theirs.output_token_ids)
        for _ in range(8):
            advance(target, there)
            advance(source, here)
        assert [r.output_token_ids for r in there] == [r.output_token_ids for r in here]
    assert cpu.model == device.model


def test_a_layers_kv_can_be_read_when_it_is_announced(engines: tuple[Engine, Engine]) -> None:
    found: list[list[bytes]] = []
    for engine in engines:
        seen: list[bytes] = []

        def copies(layer: int, engine: Engine = engine, seen: list[bytes] = seen) -> None:
            block = bytearray(engine.model.layout.layer_block_bytes)
            engine.kv_pool.read(layer=layer, page_ids=[31], into=memoryview(block))
            seen.append(bytes(block))

        advance(engine, new_requests(temperature=0.0), on_layer=copies)
        after = [bytearray(engine.model.layout.layer_block_bytes) for _ in seen]
        for layer, block in enumerate(after):
            engine.kv_pool.read(layer=layer, page_ids=[31], into=memoryview(block))
        assert seen == after
        found.append(seen)
    assert [len(seen) for seen in found] == [2, 2]
    assert all(any(block) for block in found[1])


def test_a_device_has_as_many_pages_as_its_memory_setting_says(checkpoint: Path) -> None:
    block_bytes = load_engine(model_path=checkpoint, num_pages=1).model.layout.block_bytes
    engine = load_engine(model_path=checkpoint, kv_cache_bytes=5 * block_bytes + 1, compute=REFERENCE)
    assert engine.kv_pool.num_pages == 5


def test_the_largest_step_is_as_large_as_any_that_can_be_planned() -> None:
    largest = LargestStep(max_num_seqs=5, max_num_batched_tokens=100)
    rows = largest.plan(max_model_len=64, block_size_tokens=16).rows
    assert [row.num_new_tokens for row in rows] == [64, 33, 1, 1, 1]
    assert all(row.samples for row in rows)
    assert {page_id for row in rows for page_id in row.page_ids} == {0}


def test_the_largest_step_runs_on_a_pool_of_one_page(checkpoint: Path) -> None:
    engine = load_engine(model_path=checkpoint, num_pages=1, max_model_len=64, compute=REFERENCE)
    largest = LargestStep(max_num_seqs=5, max_num_batched_tokens=100)
    sampled = engine.execute(largest.plan(max_model_len=64, block_size_tokens=16)).sampled
    assert len(sampled) == 5
    assert {name for name, token in sampled.items() if token.logprobs} == {"profile-1", "profile-3"}


def test_every_kind_of_attention_has_a_backend() -> None:
    assert set(ATTENTIONS) == {"numba", *BACKENDS}


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device cuda:99 is not there: torch finds"):
        load_engine(model_path=tmp_path / "nowhere", compute=ComputeDevice(device="cuda:99"))
