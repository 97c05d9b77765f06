"""The offline engine against the server's, with the CPU's kernels and with the formulas of the GPU's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from workers.compute_device import ComputeDevice
from workers.engine.engine import LaunchedStep, load_engine
from workers.engine.offline_engine import OfflineEngine, build_engine, load_model
from workers.engine.offline_settings import OfflineSettings
from workers.errors import InvalidRequest
from workers.request import FinishReason, PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import ScheduledRequest, StepPlan

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.4, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_bias_tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral_window": ("Mistral", {"sliding_window": 20}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 40,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
}
LENGTHS = (1, 21, 5, 40, 16)


def write_checkpoint(path: Path, family: str, changes: dict[str, Any]) -> Path:
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(params=sorted(FAMILIES))
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, *FAMILIES[request.param])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, "Llama", {})


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in LENGTHS]


def sampling(number: int, *, temperature: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_k=20, top_p=0.95, seed=number, max_tokens=10 + number)


def answers(engine: OfflineEngine, *, temperature: float = 0.0) -> list[list[int]]:
    generations = engine.generate(
        (prompt, sampling(number, temperature=temperature)) for number, prompt in enumerate(prompts())
    )
    engine.state.check()
    return [generation.output_token_ids for generation in generations]


def offline(path: Path, *, attention: str = "numba", **settings: Any) -> OfflineEngine:
    given = OfflineSettings(
        **{
            "compute": ComputeDevice(attention=attention), "max_num_seqs": 3, "max_num_batched_tokens": 23,
            "num_pages": 24, "max_model_len": 64, **settings,
        }
    )  # fmt: skip
    return build_engine(load_model(path, given, on_progress=lambda share: None), given)


def served(path: Path, *, temperature: float = 0.0) -> list[list[int]]:
    """Each prompt by itself, by the engine of the workers."""
    engine = load_engine(model_path=path, num_pages=8)
    outputs = []
    for number, prompt in enumerate(prompts()):
        request = Request(
            request_id=RequestId(str(number)), session_id=SessionId(0), prompt_token_ids=prompt,
            sampling=sampling(number, temperature=temperature), arrival_s=0.0,
        )  # fmt: skip
        while (
            len(request.output_token_ids) < request.sampling.max_tokens and 2 not in request.output_token_ids
        ):
            new = request.num_tokens - request.num_computed_tokens
            row = ScheduledRequest(
                request=request, num_computed_tokens=request.num_computed_tokens, num_new_tokens=new,
                page_ids=tuple(PageId(page) for page in range(5)), samples=True,
            )  # fmt: skip
            token = engine.execute(StepPlan(rows=(row,))).sampled[request.request_id]
            request.num_computed_tokens += new
            request.output_token_ids.append(token.token_id)
        outputs.append(request.output_token_ids)
    return outputs


def test_greedy_tokens_are_those_of_the_served_engine_with_either_kernels(path: Path) -> None:
    expected = served(path)
    assert answers(offline(path)) == expected
    assert answers(offline(path, attention="reference")) == expected


def test_drawn_tokens_are_those_of_the_served_engine(llama: Path) -> None:
    expected = served(llama, temperature=0.8)
    assert expected != served(llama)
    assert answers(offline(llama), temperature=0.8) == expected
    assert answers(offline(llama, attention="reference"), temperature=0.8) == expected


def test_steps_are_launched_before_the_one_before_is_read_although_others_wait(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = offline(llama, attention="reference")
    launch, ahead = engine.engine.launch, []

    def watched(plan: StepPlan) -> LaunchedStep:
        if any(row.num_computed_tokens == row.request.num_tokens for row in plan.rows):
            ahead.append(any(True for _ in engine.state.view().waiting))
        return launch(plan)

    monkeypatch.setattr(engine.engine, "launch", watched)
    assert answers(engine) == answers(offline(llama))
    assert ahead.count(True) > 4
    assert ahead.count(False) > 4


def test_prompts_that_do_not_fit_beside_each_other_take_turns_and_say_the_same(llama: Path) -> None:
    expected = answers(offline(llama))
    for attention in ("numba", "reference"):
        assert answers(offline(llama, attention=attention, num_pages=5)) == expected


def test_an_answer_ends_at_the_longest_the_model_can_have(llama: Path) -> None:
    (generation,) = offline(llama).generate(
        [([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=99, ignore_eos=True))]
    )
    assert generation.finish_reason is FinishReason.LENGTH
    assert len(generation.output_token_ids) == 61


@pytest.mark.parametrize(
    "asked", [{"logit_bias": ((5, 1.0),)}, {"num_logprobs": 1}, {"stop_strings": ("a",)}, {"min_tokens": 1}]
)
def test_what_takes_the_servers_engine_is_refused(llama: Path, asked: dict[str, Any]) -> None:
    engine = offline(llama)
    with pytest.raises(ValueError, match="need the server's engine"):
        engine.add([5], SamplingParams(**asked))
    with pytest.raises(InvalidRequest, match="token id 97 is not in the vocabulary of 97"):
        engine.add([97], SamplingParams())
    assert not engine.step()


def test_a_prompt_that_cannot_run_takes_those_before_it_along(llama: Path) -> None:
    engine = offline(llama)
    with pytest.raises(InvalidRequest, match="the prompt has no tokens"):
        engine.generate([([5], SamplingParams()), ([], SamplingParams())])
    assert not engine.step()
    assert engine.state.num_requests == 0
    assert answers(engine) == answers(offline(llama))


@pytest.mark.parametrize("attention", ["numba", "reference"])
def test_equal_prompts_beyond_seats_and_pages_all_say_what_one_says_alone(
    llama: Path, attention: str
) -> None:
    asked = (prompts()[3], SamplingParams(temperature=0.0, max_tokens=20))
    (alone,) = offline(llama, attention=attention).generate([asked])
    engine = offline(llama, attention=attention, num_pages=4)
    generations = engine.generate([asked] * 7)
    engine.state.check()
    assert [generation.output_token_ids for generation in generations] == [alone.output_token_ids] * 7
    assert engine.generate([]) == []


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_with_pages_of_8_bits_answers_begin_as_with_whole_ones(llama: Path, kv_dtype: str) -> None:
    exact = answers(offline(llama))
    engine = offline(llama, attention="reference", kv_dtype=kv_dtype)
    got = answers(engine)
    assert engine.engine.model.layout.dtype == kv_dtype
    assert sum(ours[0] == theirs[0] for ours, theirs in zip(got, exact, strict=True)) >= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, got 'float64'"),
        ({"kv_dtype": "int8"}, "kv_dtype int8 is served with attention triton or reference, got numba"),
        ({"quantize": "w4a16"}, "quantize w4a16 is served with attention triton or reference, got numba"),
        ({"max_num_seqs": 0}, "max_num_seqs and max_num_pulls must be at least 1, got 0"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_their_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OfflineSettings(**settings)
