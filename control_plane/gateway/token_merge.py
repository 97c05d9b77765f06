"""One numbered sequence of tokens out of several sources that may repeat each other."""

from control_plane.gateway.wire import FINISH_REASONS, WorkerOutput
from control_plane.generation import TokenChunk, TokenLogprobs, WorkerEvent


class BadSequence(Exception):
    """A worker's tokens do not fit what came before; the message has the numbers."""


class TokenMerge:
    """`token_ids` are all tokens so far; a source may send any of them again, and the next ones."""

    def __init__(self, *, max_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.num_cached_tokens = 0
        self._max_tokens = max_tokens
        self._events: tuple[WorkerEvent, ...] = ()  # that no chunk has said yet

    def add(self, output: WorkerOutput) -> TokenChunk | None:
        """What is new in `output`; None where nothing is. Raises BadSequence."""
        num_known = len(self.token_ids)
        num_repeated = num_known - output.first_token_number
        token_ids, logprobs = output.token_ids, output.logprobs
        finish_reason = FINISH_REASONS.get(output.outcome) if output.outcome is not None else None
        if logprobs and len(logprobs) != len(token_ids):
            raise BadSequence(f"{len(token_ids)} tokens came with {len(logprobs)} logprobs")
        if num_repeated > 0:
            token_ids, logprobs = token_ids[num_repeated:], logprobs[num_repeated:]
        elif num_repeated < 0 and (token_ids or finish_reason is not None):
            raise BadSequence(f"token {num_known} is missing before token {output.first_token_number}")
        if num_known + len(token_ids) > self._max_tokens:
            raise BadSequence(f"token {self._max_tokens} came, but {self._max_tokens} tokens were asked for")
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        if output.events:
            self._events = output.events
        if not token_ids and finish_reason is None:
            return None
        self.token_ids.extend(token_ids)
        events, self._events = self._events, ()
        return TokenChunk(
            token_ids=token_ids,
            logprobs=logprobs,
            num_cached_tokens=self.num_cached_tokens,
            finish_reason=finish_reason,
            stop_string=output.stop_string,
            events=events,
        )


def joined(chunks: list[TokenChunk]) -> TokenChunk:
    """One chunk that says what several say in a row."""
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    logprobs: list[TokenLogprobs] = []
    token_ids: list[int] = []
    for chunk in chunks:
        token_ids += chunk.token_ids
        logprobs += chunk.logprobs
    return TokenChunk(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        num_cached_tokens=last.num_cached_tokens,
        finish_reason=last.finish_reason,
        stop_string=last.stop_string,
        events=next((chunk.events for chunk in reversed(chunks) if chunk.events), ()),
    )
