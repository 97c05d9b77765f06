import time

import openai
import pytest

from control_plane.gateway.tokenizer import TextTokenizer
from tests.control_plane.gateway.conftest import ANSWER
from tests.control_plane.gateway.scripted import MODEL, WINDOW, ScriptedDispatcher, worker_like

ASK = [{"role": "user", "content": "What turns the wheel?"}]


async def test_a_chat_answers_with_text_usage_and_the_reason_it_ended(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, tokenizer: TextTokenizer
) -> None:
    dispatcher.script = worker_like(tokenizer, ANSWER, num_cached_tokens=16)
    reply = await client.chat.completions.create(model=MODEL, messages=ASK)
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    assert reply.usage.prompt_tokens == len(dispatcher.generations[0].prompt_token_ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 16


async def test_a_streamed_chat_has_a_role_first_the_same_text_and_usage_last(
    client: openai.AsyncOpenAI, tokenizer: TextTokenizer
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_ends_with_done_and_tells_usage_only_if_asked(client: openai.AsyncOpenAI) -> None:
    body = {"model": MODEL, "messages": ASK, "stream": True}
    response = await client._client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert "usage" not in response.text


async def test_max_tokens_defaults_to_the_rest_of_the_window(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    await client.chat.completions.create(model=MODEL, messages=ASK)
    generation = dispatcher.generations[0]
    assert generation.sampling.max_tokens == WINDOW - len(generation.prompt_token_ids)


async def test_max_completion_tokens_cuts_the_answer_at_a_whole_character(client: openai.AsyncOpenAI) -> None:
    for max_tokens in range(1, 40):
        reply = await client.chat.completions.create(
            model=MODEL, messages=ASK, max_completion_tokens=max_tokens
        )
        text = reply.choices[0].message.content
        assert text is not None
        assert ANSWER.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))


async def test_the_prompt_is_the_rendered_template(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, tokenizer: TextTokenizer
) -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages = [{"role": "developer", "content": parts}, *ASK]
    await client.chat.completions.create(model=MODEL, messages=messages)
    prompt = tokenizer.decode(dispatcher.generations[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<bos><system>Be brief.<end><user>What turns the wheel?<end><assistant>"


async def test_n_choices_are_n_generations_with_their_own_ids_and_seeds(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    reply = await client.chat.completions.create(model=MODEL, messages=ASK, n=3, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {ANSWER}
    assert [generation.request_id for generation in dispatcher.generations] == [
        f"{reply.id}-{i}" for i in range(3)
    ]
    seeds = [generation.sampling.seed for generation in dispatcher.generations]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(dispatcher.generations[0].prompt_token_ids)


async def test_n_streamed_choices_share_one_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, n=3, stream=True)
    texts = ["", "", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [ANSWER] * 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_before_it(client: openai.AsyncOpenAI, stream: bool) -> None:
    body = {"model": MODEL, "messages": ASK, "stop": ["zzz", "el: na"]}
    if stream:
        events = await client.chat.completions.create(**body, stream=True)  # type: ignore[call-overload]
        chunks = [chunk.choices[0] async for chunk in events]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        reason = chunks[-1].finish_reason
    else:
        reply = await client.chat.completions.create(**body)  # type: ignore[call-overload]
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert text == "Water turns the whe"
    assert reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_spell_the_text_byte_by_byte(client: openai.AsyncOpenAI, stream: bool) -> None:
    body = {"model": MODEL, "messages": ASK, "logprobs": True, "top_logprobs": 3}
    if stream:
        events = await client.chat.completions.create(**body, stream=True)  # type: ignore[call-overload]
        tokens = [t async for c in events if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    else:
        reply = await client.chat.completions.create(**body)  # type: ignore[call-overload]
        tokens = reply.choices[0].logprobs.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == ANSWER
    assert all(len(token.top_logprobs) == 3 and token.logprob == -0.25 for token in tokens)


async def test_logprobs_do_not_tell_a_stop_string(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, stop=" the wheel:")
    choice = reply.choices[0]
    assert choice.message.content == "Water turns"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content) == b"Water turns"


async def test_sampling_parameters_reach_the_dispatcher(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    await client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"5": -100, "6": 1},
        seed=-1,
        stop="x",
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "priority": -3,
            "cache_salt": "tenant",
            "deadline_s": 30.0,
        },
    )
    generation = dispatcher.generations[0]
    sampling = generation.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
        -1.0,
        2.0,
        1.5,
    )
    assert sampling.logit_bias == ((5, -100.0), (6, 1.0))
    assert sampling.seed == 2**64 - 1
    assert sampling.stop_strings == ("x",)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.stop_token_ids) == (2, True, (9,))
    assert (generation.priority, generation.cache_salt) == (-3, "tenant")
    assert generation.deadline_unix_s == pytest.approx(time.time() + 30.0, abs=10.0)


async def test_fields_that_change_nothing_are_accepted(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "x", "name": "ada"}],
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        tools=[],
        tool_choice="none",
        temperature=None,
    )
    assert reply.choices[0].message.content == ANSWER
