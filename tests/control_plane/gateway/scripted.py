"""A `Dispatcher` that generates what a test tells it to, when the test tells it to."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from control_plane.errors import RequestError
from control_plane.gateway.backend import ServedModel
from control_plane.gateway.detokenize import detokenizer_for
from control_plane.gateway.tokenizer import TextTokenizer
from control_plane.generation import FinishReason, Generation, TokenChunk, TokenLogprobs

# A chunk is yielded, an error raised, an event waited for.
Step = TokenChunk | RequestError | asyncio.Event
Script = Callable[[Generation], Iterable[Step]]

MODEL = "demo"
WINDOW = 256
BOS, EOS, SYSTEM, USER, ASSISTANT, END = "<bos>", "<eos>", "<system>", "<user>", "<assistant>", "<end>"


class ScriptedDispatcher:
    """Plays `script` for every generation, and remembers which began and which were closed before their end."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.served: Sequence[ServedModel] = (ServedModel(name=MODEL, max_model_len=WINDOW),)
        self.is_ready = True
        self.generations: list[Generation] = []
        self.aborted: list[str] = []
        self.num_open = 0
        self.closed = asyncio.Event()  # set whenever the last open generation ends

    async def generate(self, generation: Generation) -> AsyncGenerator[TokenChunk, None]:
        self.generations.append(generation)
        self.num_open += 1
        self.closed.clear()
        finished = False
        try:
            for step in self.script(generation):
                match step:
                    case asyncio.Event():
                        await step.wait()
                    case RequestError():
                        finished = True
                        raise step
                    case _:
                        finished = step.finish_reason is not None
                        yield step
                        # As with a real network in between, others get their turn.
                        await asyncio.sleep(0)
        finally:
            if not finished:
                self.aborted.append(generation.request_id)
            self.num_open -= 1
            if not self.num_open:
                self.closed.set()

    def models(self) -> Sequence[ServedModel]:
        return self.served

    def ready(self) -> bool:
        return self.is_ready


def worker_like(
    tokenizer: TextTokenizer, text: str, *, num_cached_tokens: int = 0, tokens_per_chunk: int = 1
) -> Script:
    """Generates `text` and the end-of-sequence token, or less where a worker would end: stops and max_tokens."""
    token_ids = tokenizer.encode(text, add_special_tokens=False) + tokenizer.encode(
        EOS, add_special_tokens=False
    )

    def script(generation: Generation) -> Iterable[TokenChunk]:
        ended = _until_end(tokenizer, token_ids, generation)
        for start in range(0, len(ended.token_ids), tokens_per_chunk):
            stop = start + tokens_per_chunk
            is_last = stop >= len(ended.token_ids)
            yield TokenChunk(
                token_ids=ended.token_ids[start:stop],
                logprobs=ended.logprobs[start:stop],
                num_cached_tokens=num_cached_tokens if start == 0 else 0,
                finish_reason=ended.finish_reason if is_last else None,
                stop_string=ended.stop_string if is_last else None,
            )

    return script


def _until_end(tokenizer: TextTokenizer, token_ids: list[int], generation: Generation) -> TokenChunk:
    sampling = generation.sampling
    eos_id = token_ids[-1]
    detokenizer, seen, num_tokens = detokenizer_for(tokenizer), "", 0
    reason, stop_string = FinishReason.LENGTH, None
    for token_id in token_ids[: sampling.max_tokens]:
        num_tokens += 1
        seen += detokenizer.push([token_id])
        stop_string = next((stop for stop in sampling.stop_strings if stop in seen), None)
        if stop_string is not None or token_id == eos_id or token_id in sampling.stop_token_ids:
            reason = FinishReason.STOP
            break
    chosen = tuple(token_ids[:num_tokens])
    return TokenChunk(
        token_ids=chosen,
        logprobs=_logprobs(chosen, generation),
        finish_reason=reason,
        stop_string=stop_string,
    )


def _logprobs(token_ids: tuple[int, ...], generation: Generation) -> tuple[TokenLogprobs, ...]:
    num_top = generation.sampling.num_logprobs
    if num_top is None:
        return ()
    return tuple(
        TokenLogprobs(-0.25, tuple((token_id + rank, -0.25 - rank) for rank in range(num_top)))
        for token_id in token_ids
    )


def endless(token_id: int, *, pause: asyncio.Event | None = None) -> Script:
    """Never ends. With `pause`, waits for it after the first token."""

    def script(generation: Generation) -> Iterable[Step]:
        yield TokenChunk(token_ids=(token_id,))
        if pause is not None:
            yield pause
        while True:
            yield TokenChunk(token_ids=(token_id,) * 1024)

    return script
