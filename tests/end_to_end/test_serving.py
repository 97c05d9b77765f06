"""What a user does with a whole cluster, through the official client."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai import OpenAI
from tokenizers import Tokenizer

from bench.cluster import RunningCluster, running_cluster
from control_plane.config import PROJECT_ROOT

MODEL = "penstock-demo"
TWO_OF_EACH = {
    "routing": {"prefill_threshold_tokens": 32},
    "pools": {"prefill": {"replicas": 2}, "decode": {"replicas": 2}},
}
Connect = Callable[[RunningCluster], OpenAI]


def long_prompt(seed: int, num_tokens: int = 300) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 1900) for _ in range(num_tokens)]


def test_chat_streams_the_same_text_that_it_returns_whole(
    disaggregated: RunningCluster, connect: Connect
) -> None:
    client = connect(disaggregated)
    messages = [{"role": "user", "content": "What is 17 plus 25? " * 12}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    assert events[-1].usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"temperature": 0}, id="greedy"),
        pytest.param({"temperature": 1.0, "seed": 7}, id="seeded"),
        pytest.param(
            {"temperature": 0.9, "top_p": 0.9, "seed": 11, "presence_penalty": 0.5, "frequency_penalty": 0.4},
            id="seeded with penalties",
        ),
    ],
)
def test_hand_over_changes_no_token(
    disaggregated: RunningCluster, mixed: RunningCluster, connect: Connect, sampling: dict[str, float]
) -> None:
    answers = []
    for cluster in (disaggregated, mixed):
        reply = connect(cluster).completions.create(
            model=MODEL,
            prompt=long_prompt(3),
            max_tokens=48,
            logprobs=1,
            extra_body={"ignore_eos": True},
            **sampling,
        )
        answers.append((reply.choices[0].text, reply.choices[0].logprobs.tokens))
    assert answers[0] == answers[1]
    assert len(answers[0][1]) == 48


@pytest.mark.parametrize("setting", ["stop", "stop_token_ids"])
def test_hand_over_changes_nothing_about_where_a_text_stops(
    disaggregated: RunningCluster, mixed: RunningCluster, connect: Connect, setting: str
) -> None:
    asked = {
        "model": MODEL,
        "prompt": long_prompt(4),
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 48,
        "logprobs": 1,
        "extra_body": {"ignore_eos": True},
    }
    # What is written in the middle is what stops the same text the next time.
    word = connect(mixed).completions.create(**asked).choices[0].logprobs.tokens[24]
    if setting == "stop":
        asked["stop"] = [word]
    else:
        vocabulary = Tokenizer.from_file(str(PROJECT_ROOT / "models" / "demo" / "tokenizer.json"))
        token_ids = [i for i in range(vocabulary.get_vocab_size()) if vocabulary.decode([i]) == word]
        asked["extra_body"] = {"ignore_eos": True, "stop_token_ids": token_ids}
    choices = [connect(cluster).completions.create(**asked).choices[0] for cluster in (disaggregated, mixed)]
    answers = [(choice.text, choice.logprobs.tokens, choice.finish_reason) for choice in choices]
    assert answers[0] == answers[1]
    assert answers[0][2] == "stop"
    assert 0 < len(answers[0][1]) <= 25


def test_two_workers_of_each_role_write_what_a_single_one_writes(
    mixed: RunningCluster, connect: Connect
) -> None:
    def answer(cluster: RunningCluster, seed: int) -> tuple[str, list[str]]:
        choice = (
            connect(cluster)
            .completions.create(
                model=MODEL,
                prompt=long_prompt(60 + seed),
                max_tokens=32,
                temperature=1.0,
                seed=seed,
                logprobs=1,
                extra_body={"ignore_eos": True},
            )
            .choices[0]
        )
        return choice.text, choice.logprobs.tokens

    with running_cluster(TWO_OF_EACH) as cluster, ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda seed: answer(cluster, seed), range(6)))
    assert answers == [answer(mixed, seed) for seed in range(6)]


def test_a_repeated_prompt_reports_its_cached_tokens(disaggregated: RunningCluster, connect: Connect) -> None:
    client = connect(disaggregated)
    prompt = long_prompt(30, 200)
    replies = [client.completions.create(model=MODEL, prompt=prompt, max_tokens=2) for _ in range(2)]
    assert replies[0].usage.prompt_tokens_details.cached_tokens == 0
    assert replies[1].usage.prompt_tokens_details.cached_tokens >= 192 - 16


def test_n_choices_differ_and_repeat_with_their_seed(disaggregated: RunningCluster, connect: Connect) -> None:
    client = connect(disaggregated)
    texts = [
        [
            choice.text
            for choice in client.completions.create(
                model=MODEL, prompt=long_prompt(40), n=3, seed=5, temperature=1.5, max_tokens=16
            ).choices
        ]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_an_unknown_model_and_an_over_long_prompt_are_named(
    disaggregated: RunningCluster, connect: Connect
) -> None:
    client = connect(disaggregated)
    with pytest.raises(openai.NotFoundError, match="gpt-17"):
        client.completions.create(model="gpt-17", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=MODEL, prompt=long_prompt(50, 5000), max_tokens=1)
