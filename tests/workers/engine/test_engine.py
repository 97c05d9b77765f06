"""The engine as the worker's loop sees it: plans in, sampled tokens out, and what it refuses to load."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from workers.engine.engine import Engine, load_engine
from workers.errors import CheckpointError
from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import SampledToken, ScheduledRequest, StepPlan

GREEDY = SamplingParams(temperature=0.0)
PROMPT = (5, 9, 33, 20, 7, 41, 12, 50, 3, 22, 8, 17, 30, 31, 32, 6, 19, 28, 44, 10)


@pytest.fixture
def engine(checkpoint: Path) -> Engine:
    return load_engine(model_path=checkpoint, num_pages=32, max_model_len=128)


def new_request(name: str, *, prompt: Sequence[int] = PROMPT, sampling: SamplingParams = GREEDY) -> Request:
    return Request(
        request_id=RequestId(name), session_id=SessionId(0), prompt_token_ids=list(prompt), sampling=sampling,
        arrival_s=0.0,
    )  # fmt: skip


def advance(
    engine: Engine, requests: Sequence[Request], *, num_tokens: int | None = None
) -> dict[str, SampledToken]:
    """One step for all requests; by default up to the last known token. Pages: eight for each, in a row."""
    rows = []
    for number, request in enumerate(requests):
        left = request.num_tokens - request.num_computed_tokens
        count = left if num_tokens is None else num_tokens
        rows.append(
            ScheduledRequest(
                request=request, num_computed_tokens=request.num_computed_tokens, num_new_tokens=count,
                page_ids=tuple(PageId(8 * number + page) for page in range(8)), samples=count == left,
            )
        )  # fmt: skip
    result = engine.execute(StepPlan(rows=tuple(rows)))
    for row in rows:
        row.request.num_computed_tokens += row.num_new_tokens
        if row.samples:
            row.request.output_token_ids.append(result.sampled[row.request.request_id].token_id)
    return {str(name): token for name, token in result.sampled.items()}


def test_greedy_tokens_are_the_oracles(engine: Engine, checkpoint: Path) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = oracle.generate(
        torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPT) :]
    request, other = new_request("a"), new_request("b", prompt=(4, 4, 8))
    for _ in range(40):
        advance(engine, [request, other])
    assert request.output_token_ids == expected.tolist()


def test_a_row_that_does_not_reach_its_last_token_samples_nothing(engine: Engine) -> None:
    assert advance(engine, [new_request("a")], num_tokens=4) == {}


def test_an_empty_plan_samples_nothing(engine: Engine) -> None:
    assert engine.execute(StepPlan()).sampled == {}


def test_chunks_and_a_recompute_lead_to_the_same_tokens(engine: Engine) -> None:
    whole, chunked = new_request("a"), new_request("b")
    for _ in range(5):
        advance(engine, [whole])
    advance(engine, [chunked], num_tokens=7)
    for _ in range(2):
        advance(engine, [chunked])
    chunked.num_computed_tokens = 0
    for _ in range(3):
        advance(engine, [chunked])
    assert chunked.output_token_ids == whole.output_token_ids


def test_layers_are_announced_in_order_once_their_kv_is_written(engine: Engine) -> None:
    request, layers = new_request("a"), []
    row = ScheduledRequest(
        request=request,
        num_computed_tokens=0,
        num_new_tokens=20,
        page_ids=(PageId(3), PageId(5)),
        samples=True,
    )

    def on_layer(layer: int) -> None:
        written = engine.kv_pool.pages_LP2GBC[layer, [3, 5]]
        layers.append((layer, int((written != 0).any(dim=-1).sum())))

    engine.execute(StepPlan(rows=(row,)), on_layer=on_layer)
    assert layers == [(0, 20 * 2 * 2), (1, 20 * 2 * 2)]


def test_a_completed_stop_string_is_reported(engine: Engine) -> None:
    first = new_request("a")
    for _ in range(3):
        advance(engine, [first])
    text = "".join(chr(48 + token) for token in first.output_token_ids)
    stopped = new_request("b", sampling=SamplingParams(temperature=0.0, stop_strings=(text,)))
    found = [advance(engine, [stopped])["b"].stop_string for _ in range(3)]
    assert found == [None, None, text]
    engine.forget(stopped.request_id)


def test_blocks_copied_to_another_engine_continue_there(engine: Engine, checkpoint: Path) -> None:
    other = load_engine(model_path=checkpoint, num_pages=32, max_model_len=128)
    assert other.model == engine.model
    here, there = new_request("a"), new_request("b")
    advance(engine, [here])
    for layer in range(engine.model.layout.num_layers):
        blocks = bytearray(2 * engine.model.layout.layer_block_bytes)
        engine.kv_pool.read(layer=layer, page_ids=[0, 1], into=memoryview(blocks))
        other.kv_pool.write(layer=layer, page_ids=[0, 1], data=memoryview(bytes(blocks)))
    there.num_computed_tokens, there.output_token_ids = here.num_computed_tokens, list(here.output_token_ids)
    for _ in range(4):
        advance(engine, [here])
        advance(other, [there])
    assert there.output_token_ids == here.output_token_ids


def test_model_facts_come_from_the_checkpoint(engine: Engine) -> None:
    model = engine.model
    assert (model.vocab_size, model.max_model_len, model.eos_token_ids) == (64, 128, {1, 2})
    assert (model.layout.num_layers, model.layout.num_kv_heads, model.layout.head_dim) == (2, 2, 16)
    assert len(model.fingerprint) == 32


def test_fingerprints_differ_with_weights_config_and_dtype(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    prints = {
        engine.model.fingerprint,
        load_engine(model_path=checkpoint, num_pages=4, dtype="bfloat16").model.fingerprint,
    }
    other_weights = shutil.copytree(checkpoint, tmp_path / "weights")
    content = bytearray((other_weights / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other_weights / "model.safetensors").write_bytes(content)
    prints.add(load_engine(model_path=other_weights, num_pages=4).model.fingerprint)
    other_config = shutil.copytree(checkpoint, tmp_path / "config")
    config = json.loads((other_config / "config.json").read_text())
    (other_config / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    prints.add(load_engine(model_path=other_config, num_pages=4).model.fingerprint)
    assert len(prints) == 4


def test_pages_follow_from_a_memory_budget(checkpoint: Path, engine: Engine) -> None:
    block_bytes = engine.model.layout.block_bytes
    assert load_engine(model_path=checkpoint, kv_cache_bytes=5 * block_bytes + 1).kv_pool.num_pages == 5
    with pytest.raises(ValueError, match="less than one page"):
        load_engine(model_path=checkpoint, kv_cache_bytes=block_bytes - 1)


def test_a_model_longer_than_its_positions_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="between 1 and the model's 256, got 257"):
        load_engine(model_path=checkpoint, num_pages=4, max_model_len=257)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_engine(model_path=tmp_path / "nowhere", num_pages=4)
