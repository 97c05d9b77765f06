"""Prompts and their answers without a server: which step comes next, and what its results mean.

Pure: `next_step` decides and changes nothing, `OfflineState` records. A step may be launched before the results of the
one before it are known, because what it reads (tokens, lengths, pages) lies on the device. So an answer that ends with
a token of its own choice is noticed one step late, and what that step sampled for it is dropped.

An answer's pages and its slot are its own from its first chunk to its end, enough for its longest form: nothing is
preempted. They may be given to the next as soon as the end is noticed, although a step that writes to them may still
run, because whatever the next one does is launched after it.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workers.request import FinishReason, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineLimits:
    """Page 0 and the last slot are the runner's own and not counted here: padding goes there."""

    num_slots: int  # answers at the same time
    num_pages: int
    block_size_tokens: int
    max_step_tokens: int  # of prompts, in one step
    max_model_len: int
    vocab_size: int

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)


@dataclass(kw_only=True, slots=True, eq=False)
class Generation:
    """A prompt and its answer so far. Mutated only by `OfflineState`."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    slot: int = -1
    page_ids: tuple[int, ...] = ()
    num_launched_prompt: int = 0  # prompt tokens in steps that were launched
    num_launched_outputs: int = 0  # tokens that those steps sample
    output_token_ids: list[int] = field(default_factory=list)  # known here
    finish_reason: FinishReason | None = None

    @property
    def max_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    @property
    def is_decoding(self) -> bool:
        return (
            self.num_launched_prompt == len(self.prompt_token_ids)
            and self.num_launched_outputs < self.sampling.max_tokens
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptChunk:
    """Tokens start..stop-1 of a prompt. The first chunk of a prompt brings its slot and its pages."""

    generation: Generation
    slot: int
    page_ids: tuple[int, ...]
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == len(self.generation.prompt_token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineStep:
    """Either chunks of prompts or one token each of answers."""

    chunks: tuple[PromptChunk, ...] = ()
    decoding: tuple[Generation, ...] = ()

    @property
    def sampling(self) -> tuple[Generation, ...]:
        """In the order of the step's tokens."""
        return self.decoding + tuple(chunk.generation for chunk in self.chunks if chunk.samples)


class OfflineState:
    """Who waits, who runs, and whose is which page."""

    def __init__(self, limits: OfflineLimits, *, eos_token_ids: Iterable[int]) -> None:
        self.limits = limits
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.free_slots = list(range(limits.num_slots))
        self.free_pages = list(range(1, limits.num_pages + 1))
        self._eos_token_ids = frozenset(eos_token_ids)

    def add(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Raises `ValueError` for what can never run here."""
        generation = Generation(prompt_token_ids=tuple(prompt_token_ids), sampling=sampling)
        _check(generation, self.limits)
        self.waiting.append(generation)
        return generation

    def abort(self, generation: Generation) -> None:
        """Ends it now; without effect if it has ended."""
        if generation in self.waiting:
            self.waiting.remove(generation)
            generation.finish_reason = FinishReason.ABORT
        elif generation.finish_reason is None:
            self._finish(generation, FinishReason.ABORT)

    def launched(self, step: OfflineStep) -> None:
        for chunk in step.chunks:
            generation = chunk.generation
            if chunk.start == 0:
                self._admit(chunk)
            generation.num_launched_prompt = chunk.stop
        for generation in step.sampling:
            generation.num_launched_outputs += 1

    def apply(self, step: OfflineStep, token_ids: Sequence[int]) -> None:
        """What the step sampled, in the order of `step.sampling`; of answers that have ended it is dropped."""
        for generation, token_id in zip(step.sampling, token_ids, strict=True):
            if generation.finish_reason is not None:
                continue
            generation.output_token_ids.append(token_id)
            if self._ends(generation, token_id):
                self._finish(generation, FinishReason.STOP)
            elif len(generation.output_token_ids) == generation.sampling.max_tokens:
                self._finish(generation, FinishReason.LENGTH)

    def check(self) -> None:
        """Every slot and every page is free or belongs to one answer."""
        slots = self.free_slots + [generation.slot for generation in self.running]
        pages = self.free_pages + [page for generation in self.running for page in generation.page_ids]
        assert sorted(slots) == list(range(self.limits.num_slots)), slots
        assert sorted(pages) == list(range(1, self.limits.num_pages + 1)), pages

    def _admit(self, chunk: PromptChunk) -> None:
        generation = chunk.generation
        self.waiting.remove(generation)
        self.running.append(generation)
        self.free_slots.remove(chunk.slot)
        del self.free_pages[: len(chunk.page_ids)]
        generation.slot, generation.page_ids = chunk.slot, chunk.page_ids

    def _finish(self, generation: Generation, reason: FinishReason) -> None:
        generation.finish_reason = reason
        self.running.remove(generation)
        self.free_slots.append(generation.slot)
        self.free_pages += generation.page_ids

    def _ends(self, generation: Generation, token_id: int) -> bool:
        sampling = generation.sampling
        is_eos = token_id in self._eos_token_ids and not sampling.ignore_eos
        return is_eos or token_id in sampling.stop_token_ids


def next_step(state: OfflineState) -> OfflineStep | None:
    """Chunks of prompts while there are any to be had, then a token for every answer; none: nothing to launch."""
    chunks = _chunks(state)
    if chunks:
        return OfflineStep(chunks=chunks)
    decoding = tuple(generation for generation in state.running if generation.is_decoding)
    return OfflineStep(decoding=decoding) if decoding else None


def _chunks(state: OfflineState) -> tuple[PromptChunk, ...]:
    """First come, first served: begun prompts go on, then the next begin as long as slots and pages are free."""
    limits, chunks = state.limits, []
    budget, num_slots, num_pages = limits.max_step_tokens, 0, 0
    for generation in (*state.running, *state.waiting):
        start, slot, page_ids = generation.num_launched_prompt, generation.slot, generation.page_ids
        if start == len(generation.prompt_token_ids):
            continue
        if budget == 0:
            break
        if start == 0:
            end = num_pages + limits.pages_for(generation.max_tokens)
            if num_slots == len(state.free_slots) or end > len(state.free_pages):
                break
            slot, page_ids = state.free_slots[num_slots], tuple(state.free_pages[num_pages:end])
            num_slots, num_pages = num_slots + 1, end
        stop = min(len(generation.prompt_token_ids), start + budget)
        chunks.append(
            PromptChunk(generation=generation, slot=slot, page_ids=page_ids, start=start, stop=stop)
        )
        budget -= stop - start
    return tuple(chunks)


def _check(generation: Generation, limits: OfflineLimits) -> None:
    sampling, prompt = generation.sampling, generation.prompt_token_ids
    if not prompt:
        raise ValueError("a prompt needs at least one token")
    wrong = [token_id for token_id in prompt if not 0 <= token_id < limits.vocab_size]
    if wrong:
        raise ValueError(f"token ids must be in 0..{limits.vocab_size - 1}, got {wrong[0]}")
    if generation.max_tokens > limits.max_model_len:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {sampling.max_tokens} more exceed max_model_len {limits.max_model_len}"
        )
    if limits.pages_for(generation.max_tokens) > limits.num_pages:
        raise ValueError(f"{generation.max_tokens} tokens do not fit {limits.num_pages} pages")
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    if penalties != (1.0, 0.0, 0.0) or sampling.logit_bias or sampling.stop_strings or sampling.min_tokens:
        raise ValueError("penalties, logit_bias, min_tokens and stop strings need the server's engine")
    if sampling.num_logprobs is not None:
        raise ValueError(f"logprobs need the server's engine, got num_logprobs {sampling.num_logprobs}")
