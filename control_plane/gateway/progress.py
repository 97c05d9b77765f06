"""What is known about one generation on its way, over all attempts at it."""

from dataclasses import dataclass, field

from control_plane.directory.member import Incarnation
from control_plane.errors import GenerationFailed, GenerationTimeout
from control_plane.gateway.attempt import Attempt, Delivery, Flooded, TimedOut
from control_plane.gateway.sessions import SessionLost
from control_plane.gateway.suspicion import Suspicion
from control_plane.gateway.token_merge import BadSequence, TokenMerge, joined
from control_plane.gateway.wire import FINISH_REASONS, FailureCode, WorkerFailure, WorkerOutput
from control_plane.generation import Generation, TokenChunk
from kvstore.blocks import BlockKey, chain_keys, root_key


@dataclass(kw_only=True, eq=False)
class Progress:
    """What is known about one generation on its way."""

    generation: Generation
    merge: TokenMerge
    arrival_unix_s: float
    attempt: Attempt | None = None
    is_finished: bool = False
    num_retries: int = 0
    excluded: set[Incarnation] = field(default_factory=set)
    last_failure: WorkerFailure | None = None
    suspicion: Suspicion = field(default_factory=Suspicion)
    model_fingerprint: bytes | None = None
    keys_by_model: dict[bytes, list[BlockKey]] = field(default_factory=dict)
    last_move_s: float | None = None  # when the last try to move it ended, by the event loop's clock

    @property
    def num_tokens(self) -> int:
        return len(self.generation.prompt_token_ids) + len(self.merge.token_ids)

    def block_keys(self, model_fingerprint: bytes) -> list[BlockKey]:
        keys = self.keys_by_model.get(model_fingerprint)
        if keys is None:
            root = root_key(model_fingerprint=model_fingerprint, cache_salt=self.generation.cache_salt)
            # The last prompt token is always computed, so a block that ends with it is of no use.
            keys = list(chain_keys(root, self.generation.prompt_token_ids[:-1]))
            self.keys_by_model[model_fingerprint] = keys
        return keys

    def close_attempt(self) -> None:
        if self.attempt is not None:
            self.attempt.close()
            self.attempt = None

    def absorb(self, deliveries: list[Delivery]) -> tuple[TokenChunk | None, WorkerFailure | None]:
        """The new tokens, as one chunk, and what made the attempt fail after them.

        Raises GenerationTimeout, and GenerationFailed for a worker that does not keep to the protocol.
        """
        chunks: list[TokenChunk] = []
        failure = None
        for delivery in deliveries:
            if not isinstance(delivery, WorkerOutput) or (
                delivery.outcome is not None and delivery.outcome not in FINISH_REASONS
            ):
                failure = _failure_of(delivery)
                break
            try:
                chunk = self.merge.add(delivery)
            except BadSequence as error:
                raise GenerationFailed(f"a worker sent tokens out of order: {error}") from error
            if chunk is not None:
                chunks.append(chunk)
                self._got_on()
                if chunk.finish_reason is not None:
                    self.is_finished = True
                    break
        return joined(chunks) if chunks else None, failure

    def _got_on(self) -> None:
        """Somebody computes it: what failed before is no budget spent, and who was full then may not be now."""
        if self.num_retries or self.excluded:
            self.num_retries = 0
            self.excluded.clear()


def _failure_of(delivery: Delivery) -> WorkerFailure:
    match delivery:
        case TimedOut(timeout_s):
            raise GenerationTimeout(f"no token came for {timeout_s:g} s")
        case Flooded(num_deliveries):
            raise GenerationFailed(f"a worker sent more than {num_deliveries} messages nobody asked for")
        case SessionLost(reason, is_orderly):
            code = FailureCode.UNAVAILABLE if is_orderly else FailureCode.LOST
            return WorkerFailure(code, f"the worker was lost ({reason})")
        case WorkerOutput(failure=WorkerFailure() as failure):
            return failure
        case WorkerOutput(outcome=outcome):
            ending = outcome.value if outcome is not None else "unfinished"
            return WorkerFailure(FailureCode.UNAVAILABLE, f"the worker ended the request as {ending}")
