"""Steps and their results without a device: a token is a function of the tokens before it, computed late or at once."""

import random
from collections.abc import Iterator

import pytest

from workers.engine.generations import Generation, OfflineLimits, OfflineState, OfflineStep, next_step
from workers.request import FinishReason, SamplingParams

VOCAB, EOS, BLOCK = 17, 2, 4
LIMITS = OfflineLimits(
    num_slots=3, num_pages=20, block_size_tokens=BLOCK, max_step_tokens=7, max_model_len=40, vocab_size=VOCAB
)


class FakeDevice:
    """Keeps of each slot what a device keeps: all tokens so far. Says what the next is."""

    def __init__(self) -> None:
        self.slots: dict[int, list[int]] = {}

    def launch(self, step: OfflineStep) -> list[int]:
        for chunk in step.chunks:
            if chunk.start == 0:
                self.slots[chunk.slot] = []
            tokens = chunk.generation.prompt_token_ids[chunk.start : chunk.stop]
            assert len(self.slots[chunk.slot]) == chunk.start
            self.slots[chunk.slot] += tokens
        sampling = [(generation.slot, generation) for generation in step.decoding]
        sampling += [(chunk.slot, chunk.generation) for chunk in step.chunks if chunk.samples]
        return [self._sample(slot) for slot, _ in sampling]

    def _sample(self, slot: int) -> int:
        self.slots[slot].append(following(self.slots[slot]))
        return self.slots[slot][-1]


def following(tokens: list[int]) -> int:
    return (sum((place + 1) * token for place, token in enumerate(tokens)) * 31 + 7) % VOCAB


def answer(prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + sampling.max_tokens:
        tokens.append(following(tokens))
        if tokens[-1] in sampling.stop_token_ids or (tokens[-1] == EOS and not sampling.ignore_eos):
            break
    return tokens[len(prompt) :]


def steps(state: OfflineState, *, is_late: bool) -> Iterator[None]:
    device, pending = FakeDevice(), None
    while True:
        step = next_step(state)
        launched = None
        if step is not None:
            launched = step, device.launch(step)
            state.launched(step)
        known, pending = (pending, launched) if is_late else (launched, None)
        if known is not None:
            state.apply(*known)
        state.check()
        if step is None and known is None:
            return
        yield


def random_requests(seed: int, num: int) -> list[tuple[tuple[int, ...], SamplingParams]]:
    choice = random.Random(seed)
    return [
        (
            tuple(choice.choices(range(VOCAB), k=choice.choice((1, 3, 7, 8, 20)))),
            SamplingParams(
                temperature=0.0,
                max_tokens=choice.randint(1, 18),
                ignore_eos=choice.random() < 0.3,
                stop_token_ids=(5,) if choice.random() < 0.3 else (),
            ),
        )
        for _ in range(num)
    ]


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_answers_are_the_same_whether_results_are_read_at_once_or_one_step_late(
    seed: int, is_late: bool
) -> None:
    state = OfflineState(LIMITS, eos_token_ids=[EOS])
    requests = random_requests(seed, 12)
    generations = [state.add(*request) for request in requests]
    for _ in steps(state, is_late=is_late):
        pass
    assert [generation.output_token_ids for generation in generations] == [
        answer(*request) for request in requests
    ]
    for generation in generations:
        is_full = len(generation.output_token_ids) == generation.sampling.max_tokens
        assert generation.finish_reason in (
            (FinishReason.LENGTH, FinishReason.STOP) if is_full else (FinishReason.STOP,)
        )
    assert len(state.free_pages) == LIMITS.num_pages


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_aborts_at_any_time_leave_no_wrong_token_and_nobody_elses_answer_changed(
    seed: int, is_late: bool
) -> None:
    choice = random.Random(seed)
    state = OfflineState(LIMITS, eos_token_ids=[EOS])
    requests = random_requests(seed, 12)
    generations = [state.add(*request) for request in requests]
    ended: dict[Generation, list[int]] = {}
    for _ in steps(state, is_late=is_late):
        if choice.random() < 0.2:
            victim = choice.choice(generations)
            state.abort(victim)
            ended.setdefault(victim, list(victim.output_token_ids))
    for generation, request in zip(generations, requests, strict=True):
        expected = answer(*request)
        if generation.finish_reason is FinishReason.ABORT:
            assert generation.output_token_ids == ended[generation]
            assert generation.output_token_ids == expected[: len(generation.output_token_ids)]
        else:
            assert generation.output_token_ids == expected
    assert any(generation.finish_reason is FinishReason.ABORT for generation in generations)


def test_an_end_that_only_its_token_tells_is_noticed_one_step_late_and_its_extra_token_dropped() -> None:
    state = OfflineState(LIMITS, eos_token_ids=[EOS])
    generation = state.add((1, 1), SamplingParams(temperature=0.0, max_tokens=9))
    prompt = next_step(state)
    assert prompt is not None
    state.launched(prompt)
    decode = next_step(state)  # before anybody knows token 0
    assert decode is not None
    state.launched(decode)
    state.apply(prompt, [EOS])
    assert generation.finish_reason is FinishReason.STOP
    assert next_step(state) is None
    state.apply(decode, [9])
    assert generation.output_token_ids == [EOS]
    state.check()


def test_no_step_is_launched_beyond_the_last_token() -> None:
    state = OfflineState(LIMITS, eos_token_ids=[])
    state.add((1, 1), SamplingParams(temperature=0.0, max_tokens=3))
    num_steps = 0
    while (step := next_step(state)) is not None:
        state.launched(step)
        num_steps += 1
    assert num_steps == 3


def test_steps_of_prompts_keep_to_their_budget_and_fill_it() -> None:
    state = OfflineState(LIMITS, eos_token_ids=[])
    for length in (9, 2, 8):
        state.add((1,) * length, SamplingParams(temperature=0.0, max_tokens=1))
    sizes = []
    while (step := next_step(state)) is not None and step.chunks:
        state.launched(step)
        sizes.append(sum(chunk.stop - chunk.start for chunk in step.chunks))
    assert sizes == [7, 7, 5]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((), {}, "at least one token"),
        ((3, VOCAB), {}, rf"in 0\.\.{VOCAB - 1}, got {VOCAB}"),
        ((1,) * 30, {"max_tokens": 11}, "30 prompt tokens and 11 more exceed max_model_len 40"),
        ((1,), {"presence_penalty": 0.5}, "need the server's engine"),
        ((1,), {"num_logprobs": 2}, "got num_logprobs 2"),
    ],
)
def test_what_can_never_run_is_refused_by_its_value(
    prompt: tuple[int, ...], sampling: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OfflineState(LIMITS, eos_token_ids=[]).add(prompt, SamplingParams(**sampling))


def test_an_answer_longer_than_all_pages_is_refused() -> None:
    limits = OfflineLimits(
        num_slots=1,
        num_pages=2,
        block_size_tokens=BLOCK,
        max_step_tokens=7,
        max_model_len=40,
        vocab_size=VOCAB,
    )
    with pytest.raises(ValueError, match="9 tokens do not fit 2 pages"):
        OfflineState(limits, eos_token_ids=[]).add((1,), SamplingParams(max_tokens=8))
