import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from workers.engine.sampler import Sampler
from workers.request import Request, RequestId, SamplingParams, SessionId
from workers.step import SampledToken

VOCAB_SIZE = 60
EOS = 59


def new_sampler() -> Sampler:
    return Sampler(eos_token_ids={EOS}, vocab_size=VOCAB_SIZE)


def new_request(
    name: str = "r", *, prompt: Sequence[int] = (1, 2, 3), output: Sequence[int] = (), **sampling: Any
) -> Request:
    return Request(
        request_id=RequestId(name),
        session_id=SessionId(0),
        prompt_token_ids=list(prompt),
        output_token_ids=list(output),
        sampling=SamplingParams(max_tokens=1000, **sampling),
        arrival_s=0.0,
    )


def logits_after(request: Request) -> torch.Tensor:
    """A model that is a pure function of the tokens, with a liking for repetition."""
    token_ids = request.token_range(0, request.num_tokens)
    generator = torch.Generator().manual_seed(hash(tuple(token_ids[-2:])))
    logits: torch.Tensor = torch.randn(VOCAB_SIZE, generator=generator) * 2
    logits[token_ids[-8:]] += 2
    return logits


def generate(sampler: Sampler, requests: Sequence[Request], num_tokens: int) -> None:
    for _ in range(num_tokens):
        logits = torch.stack([logits_after(request) for request in requests])
        for request, token in zip(requests, sampler.sample(requests, logits), strict=True):
            request.output_token_ids.append(token.token_id)


def sample_one(request: Request, logits: torch.Tensor) -> SampledToken:
    return new_sampler().sample([request], logits[None])[0]


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"seed": 5},
    "filtered": {"seed": 6, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalized": {"seed": 7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "greedy-penalized": {"temperature": 0.0, "frequency_penalty": 1.0},
    "biased": {"seed": 8, "logit_bias": ((4, 5.0), (9, -100.0))},
    "long": {"seed": 9, "min_tokens": 12, "logit_bias": ((EOS, 20.0),)},
    "explained": {"seed": 10, "num_logprobs": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_gets_the_same_tokens_alone_and_in_any_company(kind: str) -> None:
    alone = new_request("alone", **KINDS[kind])
    generate(new_sampler(), [alone], 30)
    in_company = [new_request(name, **sampling) for name, sampling in KINDS.items()]
    generate(new_sampler(), in_company, 30)
    assert in_company[list(KINDS).index(kind)].output_token_ids == alone.output_token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_goes_on_as_before_on_another_worker(kind: str) -> None:
    request = new_request(**KINDS[kind])
    generate(new_sampler(), [request], 10)
    moved = copy.deepcopy(request)
    generate(new_sampler(), [moved], 20)
    stayed = new_request(**KINDS[kind])
    generate(new_sampler(), [stayed], 30)
    assert moved.output_token_ids == stayed.output_token_ids


def test_a_forgotten_request_is_counted_anew_and_one_with_the_same_id_is_not_mistaken_for_it() -> None:
    sampler = new_sampler()
    first = new_request(**KINDS["penalized"])
    generate(sampler, [first], 10)
    sampler.forget(first.request_id)
    generate(sampler, [first], 10)
    other = new_request(prompt=[7, 8], **KINDS["penalized"])
    generate(sampler, [other], 20)
    expected = [new_request(**KINDS["penalized"]), new_request(prompt=[7, 8], **KINDS["penalized"])]
    for request in expected:
        generate(new_sampler(), [request], 20)
    assert [first.output_token_ids, other.output_token_ids] == [r.output_token_ids for r in expected]


def test_other_seeds_draw_other_tokens() -> None:
    outputs = set()
    for seed in range(10):
        request = new_request(seed=seed)
        generate(new_sampler(), [request], 10)
        outputs.add(tuple(request.output_token_ids))
    assert len(outputs) == 10


def test_penalties_are_on_prompt_and_output_as_documented() -> None:
    request = new_request(
        prompt=[1, 1, 2],
        output=[2, 3, 3, 3],
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    penalized = {1: 10 / 2, 2: 10 / 2 - 0.5 - 0.25, 3: 10 / 2 - 0.5 - 0.75, 4: 10.0}
    for token_id, value in penalized.items():
        for margin, expected in ((0.01, 0), (-0.01, token_id)):
            logits = torch.full((VOCAB_SIZE,), -50.0)
            logits[token_id], logits[0] = 10.0, value + margin
            assert sample_one(request, logits).token_id == expected


def test_greedy_repetition_penalty_generates_what_transformers_does() -> None:
    request = new_request(temperature=0.0, repetition_penalty=1.5)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.5)
    expected = copy.deepcopy(request)
    generate(new_sampler(), [request], 25)
    for _ in range(25):
        seen = torch.tensor([expected.token_range(0, expected.num_tokens)])
        expected.output_token_ids.append(int(processor(seen, logits_after(expected)[None]).argmax()))
    assert request.output_token_ids == expected.output_token_ids


def test_biases_are_added_before_the_draw() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    assert sample_one(new_request(temperature=0.0, logit_bias=((7, 0.1),)), logits).token_id == 7
    logits[7] = 50.0
    banned = new_request(temperature=0.0, logit_bias=((7, -100.0), (8, 1.0)))
    assert sample_one(banned, logits).token_id == 8


@pytest.mark.parametrize(
    ("output", "ignore_eos", "expected"),
    [((), False, 5), ((1,), False, 5), ((1, 1), False, EOS), ((), True, EOS)],
)
def test_ending_tokens_are_impossible_until_the_fewest_tokens_are_there(
    output: tuple[int, ...], ignore_eos: bool, expected: int
) -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[[EOS, 4, 5]] = torch.tensor([30.0, 20.0, 10.0])
    request = new_request(
        output=output,
        temperature=0.0,
        min_tokens=2,
        stop_token_ids=(4, VOCAB_SIZE + 1),
        ignore_eos=ignore_eos,
    )
    assert sample_one(request, logits).token_id == expected


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    expected = logits.double().log_softmax(dim=0)
    request = new_request(
        output=[3], temperature=0.5, top_k=1, num_logprobs=4, logit_bias=((11, 100.0),), presence_penalty=1.0
    )
    token = sample_one(request, logits)
    assert token.token_id == 11
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(expected[11].item(), abs=1e-5)
    top, top_ids = expected.topk(4)
    assert [token_id for token_id, _ in token.logprobs.top] == top_ids.tolist()
    assert [value for _, value in token.logprobs.top] == pytest.approx(top.tolist(), abs=1e-5)


def test_only_who_asks_gets_logprobs_and_as_many_as_asked() -> None:
    requests = [
        new_request(f"r{number}", temperature=0.0, num_logprobs=number) for number in (None, 0, 2, 20)
    ]
    logits = torch.randn((4, VOCAB_SIZE), generator=torch.Generator().manual_seed(0))
    none, *tokens = new_sampler().sample(requests, logits)
    assert none.logprobs is None
    for token, num in zip(tokens, (0, 2, 20), strict=True):
        assert token.logprobs is not None
        assert len(token.logprobs.top) == num
        # The most likely token is the greedy one.
        assert token.logprobs.top[:1] in ((), ((token.token_id, token.logprobs.logprob),))
        assert token.logprobs.logprob < 0
        assert math.isfinite(token.logprobs.logprob)


def test_the_models_logits_are_left_as_they_were() -> None:
    requests = [new_request(name, **sampling) for name, sampling in KINDS.items()]
    logits = torch.randn((len(requests), VOCAB_SIZE), generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    new_sampler().sample(requests, logits)
    assert torch.equal(logits, before)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="logits"):
        new_sampler().sample([new_request()], torch.zeros(1, VOCAB_SIZE + 1))
