import httpx
import openai
import pytest

from control_plane.gateway.tokenizer import TextTokenizer
from tests.control_plane.gateway.conftest import ANSWER
from tests.control_plane.gateway.scripted import MODEL, WINDOW, ScriptedDispatcher

PROMPT = "What turns the wheel?"


async def test_a_completion_generates_16_tokens_unless_told_otherwise(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, tokenizer: TextTokenizer
) -> None:
    reply = await client.completions.create(model=MODEL, prompt=PROMPT)
    assert dispatcher.generations[0].sampling.max_tokens == 16
    assert dispatcher.generations[0].prompt_token_ids == tokenizer.encode(PROMPT, add_special_tokens=True)
    assert ANSWER.startswith(reply.choices[0].text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16


async def test_the_default_shrinks_to_what_the_window_leaves(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    await client.completions.create(model=MODEL, prompt=[7] * (WINDOW - 3))
    assert dispatcher.generations[0].sampling.max_tokens == 3


@pytest.mark.parametrize("prompt", [["one", "two"], [[7, 8], [9]]])
async def test_several_prompts_give_several_choices_in_order(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, tokenizer: TextTokenizer, prompt: list[str]
) -> None:
    reply = await client.completions.create(model=MODEL, prompt=prompt, n=2, max_tokens=200)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == [ANSWER] * 4
    expected = [tokenizer.encode(p, add_special_tokens=True) if isinstance(p, str) else p for p in prompt]
    prompts = [generation.prompt_token_ids for generation in dispatcher.generations]
    assert prompts == [expected[0], expected[0], expected[1], expected[1]]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(len(token_ids) for token_ids in expected)


async def test_token_ids_are_the_prompt_as_they_stand(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    await client.completions.create(model=MODEL, prompt=[3, 1, 4])
    assert dispatcher.generations[0].prompt_token_ids == [3, 1, 4]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_first(
    client: openai.AsyncOpenAI, tokenizer: TextTokenizer, stream: bool
) -> None:
    for prompt in (PROMPT, tokenizer.encode(PROMPT, add_special_tokens=False)):
        if stream:
            events = await client.completions.create(
                model=MODEL, prompt=prompt, echo=True, max_tokens=200, stream=True
            )
            text = "".join([chunk.choices[0].text async for chunk in events])
        else:
            reply = await client.completions.create(model=MODEL, prompt=prompt, echo=True, max_tokens=200)
            text = reply.choices[0].text
        assert text == PROMPT + ANSWER


async def test_a_streamed_completion_joins_to_the_whole_one(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=200, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


async def test_logprobs_have_offsets_into_the_text(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert ANSWER[offset : offset + len(token)] == token
    assert any(token.startswith("bytes:\\x") for token in logprobs.tokens), (
        "the answer has characters of several tokens"
    )
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)
    assert set(logprobs.token_logprobs or ()) == {-0.25}


async def test_a_whole_number_is_a_count_however_it_is_written(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    body = b'{"model": "demo", "prompt": [7.0, 80e-1], "max_tokens": 1e1, "temperature": 1}'
    response = await http.post("/v1/completions", content=body)
    assert response.status_code == 200
    assert dispatcher.generations[0].prompt_token_ids == [7, 8]
    assert dispatcher.generations[0].sampling.max_tokens == 10


async def test_the_seed_of_the_first_choice_is_the_requests_own(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, seed=5)
    seeds = [generation.sampling.seed for generation in dispatcher.generations]
    assert seeds[0] == seeds[2] == 5
    assert seeds[1] == seeds[3] != 5


async def test_without_a_seed_equal_prompts_get_different_seeds(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    await client.completions.create(model=MODEL, prompt=["a", "a"])
    assert len({generation.sampling.seed for generation in dispatcher.generations}) == 2


async def test_tokenize_and_detokenize_are_inverse(http: httpx.AsyncClient, tokenizer: TextTokenizer) -> None:
    reply = (await http.post("/tokenize", json={"model": MODEL, "prompt": ANSWER})).json()
    assert reply["tokens"] == tokenizer.encode(ANSWER, add_special_tokens=True)
    assert reply["count"] == len(reply["tokens"])
    assert reply["max_model_len"] == WINDOW
    back = await http.post("/detokenize", json={"model": MODEL, "tokens": reply["tokens"]})
    assert back.json() == {"prompt": ANSWER}


async def test_tokenize_renders_messages(http: httpx.AsyncClient, tokenizer: TextTokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    tokens = (await http.post("/tokenize", json=body)).json()["tokens"]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "<bos><user>hi<end>"


async def test_models_are_listed_and_found_by_name(client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.models.retrieve("other/model")
