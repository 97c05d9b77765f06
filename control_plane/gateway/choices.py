"""What clients see of a generation: whole characters, no stop strings, and log-probabilities aligned to the text."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from control_plane.errors import GenerationFailed
from control_plane.gateway.backend import Dispatcher
from control_plane.gateway.detokenize import detokenizer_for
from control_plane.gateway.intake import Job
from control_plane.gateway.stop_text import StopText
from control_plane.gateway.tokenizer import TextTokenizer
from control_plane.generation import FinishReason, Generation, TokenChunk, TokenLogprobs, WorkerEvent

_MERGE_QUEUE_SIZE = 64


@dataclass(frozen=True, slots=True)
class TokenText:
    """A generated token, where its text begins within the choice's text, and its log-probabilities."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice. `num_tokens` counts all generated tokens, also those that give no text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenText, ...]
    finish_reason: FinishReason | None
    num_cached_tokens: int
    events: tuple[WorkerEvent, ...] = ()  # as in TokenChunk


class Choice:
    """Turns the token chunks of one generation into deltas."""

    def __init__(self, generation: Generation, *, index: int, tokenizer: TextTokenizer) -> None:
        self._index = index
        self._detokenizer = detokenizer_for(tokenizer)
        self._stop_text = StopText(generation.sampling.stop_strings)
        self._with_logprobs = generation.sampling.num_logprobs is not None
        self._num_detokenized = 0  # characters
        self._num_released = 0  # characters
        self._unreleased: deque[TokenText] = deque()
        self.finished = False

    def push(self, chunk: TokenChunk) -> Delta:
        token_ids = chunk.token_ids
        finished = self.finished = chunk.finish_reason is not None
        # The token that ended the generation, end-of-sequence or a stop token, is no text.
        if chunk.finish_reason is FinishReason.STOP and chunk.stop_string is None:
            token_ids = token_ids[:-1]
        text = (
            self._detokenize(token_ids, chunk.logprobs)
            if self._with_logprobs
            else self._detokenizer.push(token_ids)
        )
        if finished:
            text = self._stop_text.finish(
                text + self._detokenizer.flush(), stopped=chunk.stop_string is not None
            )
        else:
            text = self._stop_text.push(text)
        return Delta(
            self._index,
            text,
            chunk.token_ids,
            self._release(text, chunk) if self._with_logprobs else (),
            chunk.finish_reason,
            chunk.num_cached_tokens,
            chunk.events,
        )

    def _detokenize(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> str:
        if len(logprobs) < len(token_ids):
            raise GenerationFailed(f"{len(token_ids)} tokens came with {len(logprobs)} log-probabilities.")
        parts = []
        for token_id, token_logprobs in zip(
            token_ids, logprobs, strict=False
        ):  # the ending token's is left over
            self._unreleased.append(TokenText(token_id, self._num_detokenized, token_logprobs))
            part = self._detokenizer.push((token_id,))
            self._num_detokenized += len(part)
            parts.append(part)
        return "".join(parts)

    def _release(self, text: str, chunk: TokenChunk) -> tuple[TokenText, ...]:
        """Tokens whose text has begun to go out; the others might belong to a stop string."""
        self._num_released += len(text)
        everything = chunk.finish_reason is not None and chunk.stop_string is None
        released = []
        while self._unreleased and (everything or self._unreleased[0].offset < self._num_released):
            released.append(self._unreleased.popleft())
        return tuple(released)


async def answer(
    job: Job, *, dispatcher: Dispatcher, tokenizer: TextTokenizer
) -> AsyncGenerator[Delta, None]:
    """The deltas of all choices as they come. Closing the generator aborts what is still running."""
    choices = [
        Choice(generation, index=index, tokenizer=tokenizer)
        for index, generation in enumerate(job.generations)
    ]
    if len(choices) == 1:
        async with aclosing(dispatcher.generate(job.generations[0])) as chunks:
            async for chunk in chunks:
                yield choices[0].push(chunk)
    else:
        async with aclosing(_merged(job, dispatcher=dispatcher)) as merged:
            async for index, chunk in merged:
                yield choices[index].push(chunk)
    if not all(choice.finished for choice in choices):
        raise GenerationFailed("The generation ended without a finish reason.")


async def _merged(job: Job, *, dispatcher: Dispatcher) -> AsyncGenerator[tuple[int, TokenChunk], None]:
    """All generations at once. The first failure of one ends them all."""
    queue: asyncio.Queue[tuple[int, TokenChunk | Exception | None]] = asyncio.Queue(_MERGE_QUEUE_SIZE)

    async def forward(index: int, generation: Generation) -> None:
        try:
            async with aclosing(dispatcher.generate(generation)) as chunks:
                async for chunk in chunks:
                    await queue.put((index, chunk))
        except Exception as error:  # noqa: BLE001  # the reader below raises it
            await queue.put((index, error))
        else:
            await queue.put((index, None))

    tasks = [
        asyncio.create_task(forward(index, generation)) for index, generation in enumerate(job.generations)
    ]
    try:
        num_running = len(tasks)
        while num_running:
            index, item = await queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
