"""When what happened to a request on this worker: named stamps, from which every latency is derived.

What the source of a hand-over noted comes with it and is named `prefill.*`, so that names tell whose clock it was. The
stamps of a request that moved while it ran stay what they were: up to `moved` they are of the worker before.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

RECEIVED: Final = "received"  # the gateway accepted it
QUEUED: Final = "queued"  # this worker accepted it
SCHEDULED: Final = "scheduled"  # the first step that has it in its plan began
FIRST_CHUNK: Final = "first_chunk"  # the first step that computed some of its prompt ended
PREFILL_DONE: Final = "prefill_done"  # all of its prompt is computed
PULL_STARTED: Final = "pull_started"
PULL_DONE: Final = "pull_done"
PULL_FAILED: Final = "pull_failed"
LOAD_STARTED: Final = "load_started"  # blocks of the prompt were found elsewhere; again after a preemption
LOAD_DONE: Final = "load_done"  # all that was to be loaded is in the request's pages
LOAD_FAILED: Final = "load_failed"  # some of it did not come, or too late, and is computed
PREEMPTED: Final = "preempted"  # may happen more than once
FROZEN: Final = (
    "frozen"  # stands still while its last blocks move to another worker; may happen more than once
)
RESUMED: Final = "resumed"  # the move failed, and it goes on where it was
MOVED: Final = "moved"  # it goes on here and not where it was before; what came before is of other workers
FIRST_TOKEN: Final = "first_token"
FINISHED: Final = "finished"

_OF_SOURCE: Final = "prefill."


@dataclass(frozen=True, slots=True)
class Stamp:
    name: str
    unix_s: float


@dataclass(slots=True)
class Timeline:
    """Stamps in the order in which they were made. Times are seconds since the Unix epoch."""

    stamps: list[Stamp] = field(default_factory=list)

    def stamp(self, name: str, unix_s: float) -> None:
        self.stamps.append(Stamp(name, unix_s))

    def stamp_once(self, name: str, unix_s: float) -> bool:
        """Stamps what is not there yet and says whether it did."""
        if self.first_s(name) is not None:
            return False
        self.stamp(name, unix_s)
        return True

    def take_over(self, stamps: Iterable[Stamp]) -> None:
        """Adds what the source of a hand-over noted, by its own clock."""
        self.stamps += (
            Stamp(_OF_SOURCE + stamp.name, stamp.unix_s)
            for stamp in stamps
            if stamp.name != RECEIVED  # the gateway told us both
        )

    def go_on(self, stamps: Iterable[Stamp]) -> None:
        """Puts what the worker noted that had the request before in front: its latencies are of all its workers."""
        self.stamps[:0] = stamps

    def first_s(self, name: str) -> float | None:
        """When `name` happened for the first time; None if it has not."""
        for stamp in self.stamps:
            if stamp.name == name:
                return stamp.unix_s
        return None

    @property
    def queue_s(self) -> float | None:
        """How long the request waited for its first pages."""
        return self._between(RECEIVED, SCHEDULED)

    @property
    def ttft_s(self) -> float | None:
        """Time to this worker's first token of the request."""
        return self._between(RECEIVED, FIRST_TOKEN)

    @property
    def e2e_s(self) -> float | None:
        return self._between(RECEIVED, FINISHED)

    def _between(self, start: str, end: str) -> float | None:
        start_s, end_s = self.first_s(start), self.first_s(end)
        # Two machines' clocks may disagree by a little; a negative duration would spoil a histogram.
        return None if start_s is None or end_s is None else max(0.0, end_s - start_s)
