"""From a validated request body to the generations that answer it. HTTP and gRPC share this path."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from control_plane.errors import InvalidRequest, ModelNotFound, NoWorkers
from control_plane.gateway.backend import Dispatcher, ServedModel
from control_plane.gateway.body import unsupported
from control_plane.gateway.chat_template import ChatTemplate
from control_plane.gateway.sampling import logit_bias_of, sampling_of
from control_plane.gateway.schema import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.tenancy import Tenant
from control_plane.gateway.tokenizer import TextTokenizer
from control_plane.generation import Generation

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_NO_WORKERS_RETRY_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request: a generation per choice, prompt by prompt, and the text to put before each choice."""

    id: str
    model: str
    generations: tuple[Generation, ...]
    echoes: tuple[str, ...]
    num_choices_per_prompt: int
    num_prompt_tokens: int  # every prompt counted once
    stream: bool
    include_usage: bool

    def of(self, tenant: Tenant) -> "Job":
        """The same, as a request of `tenant`."""
        generations = (
            replace(generation, tenant=tenant.name, tenant_weight=tenant.weight)
            for generation in self.generations
        )
        return replace(self, generations=tuple(generations))


class Intake:
    """Renders, tokenizes and checks requests against the served model's window."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        tokenizer: TextTokenizer,
        chat_template: ChatTemplate | None,
        settings: GatewaySettings,
    ) -> None:
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._settings = settings

    def served_model(self, name: str | None) -> ServedModel:
        """The model of that name, or the only one there is.

        `NoWorkers` while nothing is served, else `ModelNotFound`.
        """
        models = self._dispatcher.models()
        if not models:
            raise NoWorkers("No worker serves a model yet.", retry_after_s=_NO_WORKERS_RETRY_S)
        for model in models:
            if name in (None, model.name):
                return model
        known = ", ".join(sorted(model.name for model in models))
        raise ModelNotFound(f"The model '{_short(name)}' does not exist; served here: {known}.")

    async def chat(self, body: ChatCompletionRequest, *, job_id: str) -> Job:
        model = self.served_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        add_generation_prompt = body.add_generation_prompt is not False
        prompt = await self.chat_token_ids(
            body.messages, add_generation_prompt=add_generation_prompt, window=model.max_model_len
        )
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        return self._job(
            body,
            job_id=job_id,
            model=model,
            prompts=[prompt],
            echoes=[""],
            default_max_tokens=None,
            max_tokens=wanted,
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )

    async def completion(self, body: CompletionRequest, *, job_id: str) -> Job:
        model = self.served_model(body.model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise unsupported("best_of")
        if body.echo and body.logprobs is not None:
            raise InvalidRequest("'echo' cannot be combined with 'logprobs' on this server.", param="echo")
        given = _prompts(body.prompt)
        self._check_num_choices(len(given), num_per_prompt=body.n or 1)
        prompts, texts = [], []
        for prompt in given:
            if isinstance(prompt, str):
                self._check_fits(prompt, window=model.max_model_len, param="prompt")
                prompts.append(await self.text_token_ids(prompt, add_special_tokens=True))
                texts.append(prompt)
            else:
                self._check_vocabulary(prompt, param="prompt")
                prompts.append(prompt)
                texts.append(await self._decode(prompt) if body.echo else "")
        return self._job(
            body,
            job_id=job_id,
            model=model,
            prompts=prompts,
            echoes=texts if body.echo else [""] * len(prompts),
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
            max_tokens=body.max_tokens,
            num_logprobs=body.logprobs,
        )

    async def chat_token_ids(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        add_special_tokens: bool = False,
        window: int | None = None,
    ) -> list[int]:
        """The rendered conversation's tokens. The template writes the special tokens itself, so none are added by
        default.

        Special tokens that a user writes into a message are parsed as such, as in transformers and vLLM: the model
        cannot tell them from
        the template's own.
        """
        template = self._chat_template
        if template is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
        plain = [_plain_message(message) for message in messages]

        def render_and_encode() -> list[int]:
            text = template.render(plain, add_generation_prompt=add_generation_prompt)
            if window is not None:
                self._check_fits(text, window=window, param="messages")
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

        if sum(len(message["content"]) for message in plain) > self._settings.thread_tokenize_chars:
            return await asyncio.to_thread(render_and_encode)
        return render_and_encode()

    async def text_token_ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) > self._settings.thread_tokenize_chars:
            return await asyncio.to_thread(
                self._tokenizer.encode, text, add_special_tokens=add_special_tokens
            )
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def tokenize(self, body: TokenizeRequest) -> tuple[list[int], int]:
        """The token ids, and the model's window in tokens."""
        model = self.served_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
        if body.messages is not None:
            token_ids = await self.chat_token_ids(
                body.messages,
                add_generation_prompt=body.add_generation_prompt is not False,
                add_special_tokens=bool(body.add_special_tokens),
            )
        else:
            add_special_tokens = body.add_special_tokens is not False
            token_ids = await self.text_token_ids(body.prompt or "", add_special_tokens=add_special_tokens)
        return token_ids, model.max_model_len

    async def detokenize(self, body: DetokenizeRequest) -> str:
        """All tokens as text, special ones too."""
        self.served_model(body.model)
        self._check_vocabulary(body.tokens, param="tokens")
        return await self._decode(body.tokens)

    async def _decode(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) > self._settings.thread_tokenize_chars:
            return await asyncio.to_thread(self._tokenizer.decode, token_ids, skip_special_tokens=False)
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _check_num_choices(self, num_prompts: int, *, num_per_prompt: int) -> None:
        limit = self._settings.max_choices
        if num_prompts * num_per_prompt > limit:
            raise InvalidRequest(
                f"{num_prompts} prompts with n={num_per_prompt} make {num_prompts * num_per_prompt} choices; "
                f"at most {limit} are accepted.",
                param="prompt",
            )

    def _check_fits(self, text: str, *, window: int, param: str) -> None:
        """Refuses what is too long however it is tokenized: some tokenizers need minutes for a few megabytes."""
        fewest = self._tokenizer.fewest_tokens(text)
        if fewest >= window:
            raise _too_long(f"at least {fewest}", window=window, param=param)

    def _check_vocabulary(self, token_ids: Sequence[int], *, param: str) -> None:
        largest, vocab_size = max(token_ids, default=0), self._tokenizer.vocab_size
        if largest >= vocab_size:
            raise InvalidRequest(
                f"Invalid value for '{param}': token id {largest} is outside the vocabulary of {vocab_size}.",
                param=param,
                code="invalid_value",
            )

    def _job(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        *,
        job_id: str,
        model: ServedModel,
        prompts: Sequence[list[int]],
        echoes: Sequence[str],
        default_max_tokens: int | None,
        max_tokens: int | None,
        num_logprobs: int | None,
    ) -> Job:
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
            )
        self._check_vocabulary([token_id for token_id, _ in logit_bias_of(body)], param="logit_bias")
        self._check_vocabulary(body.stop_token_ids or (), param="stop_token_ids")
        num_per_prompt = body.n or 1
        deadline_unix_s = None if body.deadline_s is None else time.time() + body.deadline_s
        generations: list[Generation] = []
        for prompt in prompts:
            budget = _output_budget(
                model,
                num_prompt_tokens=len(prompt),
                max_tokens=max_tokens,
                default_max_tokens=default_max_tokens,
            )
            for index in range(num_per_prompt):
                sampling = sampling_of(body, choice=index, max_tokens=budget, num_logprobs=num_logprobs)
                generations.append(
                    Generation(
                        request_id=f"{job_id}-{len(generations)}",
                        prompt_token_ids=prompt,
                        sampling=sampling,
                        priority=body.priority or 0,
                        cache_salt=body.cache_salt or "",
                        deadline_unix_s=deadline_unix_s,
                    )
                )
        return Job(
            id=job_id,
            model=model.name,
            generations=tuple(generations),
            echoes=tuple(echo for echo in echoes for _ in range(num_per_prompt)),
            num_choices_per_prompt=num_per_prompt,
            num_prompt_tokens=sum(len(prompt) for prompt in prompts),
            stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )


def _output_budget(
    model: ServedModel, *, num_prompt_tokens: int, max_tokens: int | None, default_max_tokens: int | None
) -> int:
    """How many tokens may be generated. An explicit wish must fit into the window; the default shrinks."""
    window = model.max_model_len
    if num_prompt_tokens == 0:
        raise InvalidRequest(
            "The prompt is empty; at least one token is needed.", param="prompt", code="invalid_value"
        )
    if num_prompt_tokens >= window:
        param = "messages" if default_max_tokens is None else "prompt"
        raise _too_long(str(num_prompt_tokens), window=window, param=param)
    room = window - num_prompt_tokens
    if max_tokens is None:
        return room if default_max_tokens is None else min(default_max_tokens, room)
    if max_tokens > room:
        raise InvalidRequest(
            f"This model's maximum context length is {window} tokens. You requested "
            f"{num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} of the prompt and {max_tokens} of the "
            "completion). Please reduce one or the other.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return max_tokens


def _too_long(num_prompt_tokens: str, *, window: int, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"This model's maximum context length is {window} tokens, and your prompt has {num_prompt_tokens} tokens, "
        "which leaves no room for output. Please shorten the prompt.",
        param=param,
        code="context_length_exceeded",
    )


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if _is_token_ids(prompt):
        return [prompt]
    return prompt  # type: ignore[return-value]  # neither of the two above: a list of prompts


def _is_token_ids(prompt: list[int] | list[str] | list[list[int]]) -> TypeGuard[list[int]]:
    return isinstance(prompt[0], int)


def _plain_message(message: ChatMessage) -> dict[str, Any]:
    """What templates expect: text content, and the roles they know. OpenAI renamed system to developer."""
    content = (
        message.content
        if isinstance(message.content, str)
        else "".join(part.text for part in message.content)
    )
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return plain if message.name is None else plain | {"name": message.name}


def _short(name: str | None) -> str:
    return (name or "")[:64]
