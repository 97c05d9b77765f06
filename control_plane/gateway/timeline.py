"""When things happened to one request; the single source of its metrics and of its log line.

What the workers noted is part of it. Hosts have clocks of their own, so durations are only taken between events of one
process: `prefill.*` are of the prefill worker, `gateway.*` of this one, all others of the worker that generates. But
`received` is what our dispatcher told that worker.
"""

import json
import logging
import time
from operator import itemgetter
from typing import Any

from control_plane.gateway.choices import Delta
from control_plane.gateway.intake import Job
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.generation import WorkerEvent

logger = logging.getLogger("penstock.gateway.request")

_MAX_LOGGED_CHARS = 256
_MAX_LOGGED_EVENTS = 256
# Of each stage, between which two events it lies; the first pair that is there counts.
_STAGES = {
    "queue": (("prefill.queued", "prefill.scheduled"), ("queued", "scheduled")),
    "prefill": (
        ("prefill.scheduled", "prefill.prefill_done"),
        ("pull_failed", "prefill_done"),
        ("scheduled", "prefill_done"),
    ),
    "pull": (("pull_started", "pull_done"),),  # the wait for the prefill included
    "decode": (("first_token", "finished"),),
}


class RequestTimeline:
    """Events in order: received (construction), accepted, tokens..., closed.

    Each is reported once, `tokens` for every delta.
    """

    def __init__(self, metrics: GatewayMetrics, *, protocol: str, operation: str, request_id: str) -> None:
        self._metrics = metrics
        self._protocol = protocol
        self._operation = operation
        self.request_id = request_id
        self._received_s = time.monotonic()
        self._received_unix_s = time.time()
        self._intake_s: float | None = None
        self._first_token_s: float | None = None
        self._job: Job | None = None
        self._last_token_s: list[float] = []
        self._finish_reasons: list[str | None] = []
        self._num_tokens = 0
        self._cached_tokens: list[int] = []
        self._worker_events: list[tuple[WorkerEvent, ...]] = []
        self._error: str | None = None

    def accepted(self, job: Job) -> None:
        """The request is valid and goes to the dispatcher."""
        num_choices = len(job.generations)
        self._job = job
        self._intake_s = time.monotonic() - self._received_s
        self._last_token_s = [0.0] * num_choices
        self._finish_reasons = [None] * num_choices
        self._cached_tokens = [0] * num_choices
        self._worker_events = [()] * num_choices
        metrics = self._metrics
        metrics.tokenize.observe(self._intake_s)
        metrics.prompt_tokens.labels(job.model).inc(job.num_prompt_tokens)
        self._observe_gap = metrics.inter_token_latency.labels(job.model).observe
        self._count_tokens = metrics.generation_tokens.labels(job.model).inc

    def tokens(self, delta: Delta) -> None:
        now_s = time.monotonic()
        index, num_tokens = delta.index, len(delta.token_ids)
        if self._first_token_s is None:
            assert self._job is not None, "tokens before the request was accepted"
            self._first_token_s = now_s - self._received_s
            self._metrics.time_to_first_token.labels(self._job.model).observe(self._first_token_s)
        if self._last_token_s[index]:
            self._observe_gap(now_s - self._last_token_s[index])
        self._last_token_s[index] = now_s
        self._num_tokens += num_tokens
        self._count_tokens(num_tokens)
        if delta.num_cached_tokens:
            self._cached_tokens[index] = delta.num_cached_tokens
        if delta.events:
            self._worker_events[index] = delta.events
        if delta.finish_reason is not None:
            self._finish_reasons[index] = delta.finish_reason.value

    def failed(self, message: str) -> None:
        """Notes why; `closed` still has to follow."""
        self._error = message

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object. Each prompt counts once, however many choices it has."""
        assert self._job is not None, "usage of a request that was not accepted"
        num_prompt_tokens = self._job.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": num_prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens(self._job)},
        }

    def closed(self, code: str) -> None:
        """The last byte is out, or the client is gone. Feeds the remaining metrics and writes the log line."""
        duration_s = time.monotonic() - self._received_s
        self._metrics.requests.labels(self._protocol, code).inc()
        fields: dict[str, Any] = {
            "event": "request",
            "time_unix_s": round(self._received_unix_s, 3),
            "protocol": self._protocol,
            "operation": self._operation[:_MAX_LOGGED_CHARS],
            "request_id": self.request_id,
            "code": code,
            "duration_s": round(duration_s, 6),
        }
        if self._job is not None:
            fields |= self._close_job(self._job, duration_s)
        if self._error is not None:
            fields["error"] = self._error
        logger.info("%s", json.dumps(fields))

    def _close_job(self, job: Job, duration_s: float) -> dict[str, Any]:
        unfinished = "abort" if self._error is None else "error"
        reasons = [reason or unfinished for reason in self._finish_reasons]
        for reason in reasons:
            self._metrics.request_success.labels(job.model, reason).inc()
        self._metrics.e2e_request_latency.labels(job.model).observe(duration_s)
        for events in self._worker_events:
            for stage, stage_s in stage_durations(events).items():
                self._metrics.request_stage.labels(job.model, stage).observe(stage_s)
        return {
            "id": job.id,
            "model": job.model,
            "stream": job.stream,
            "intake_s": round(self._intake_s or 0.0, 6),
            "time_to_first_token_s": None if self._first_token_s is None else round(self._first_token_s, 6),
            "num_prompt_tokens": job.num_prompt_tokens,
            "num_cached_tokens": self._num_cached_tokens(job),
            "num_completion_tokens": self._num_tokens,
            "finish_reasons": reasons,
            "timeline": self._logged_events(duration_s),
        }

    def _num_cached_tokens(self, job: Job) -> int:
        return sum(self._cached_tokens[:: job.num_choices_per_prompt])

    def _logged_events(self, duration_s: float) -> list[dict[str, Any]]:
        """In order; `at_s` counts from the arrival here, by the clock of whoever noted the event."""
        ours = {
            "received": 0.0,
            "accepted": self._intake_s,
            "first_token": self._first_token_s,
            "closed": duration_s,
        }
        events = [
            {"event": f"gateway.{name}", "at_s": round(at_s, 6)}
            for name, at_s in ours.items()
            if at_s is not None
        ]
        events += [
            {"event": event.name, "at_s": round(event.unix_s - self._received_unix_s, 6), "choice": choice}
            for choice, noted in enumerate(self._worker_events)
            for event in noted
        ]
        return sorted(events[:_MAX_LOGGED_EVENTS], key=itemgetter("at_s"))


def stage_durations(events: tuple[WorkerEvent, ...]) -> dict[str, float]:
    """Seconds of each stage that has begun and ended; several events of one name count from the first."""
    at_s: dict[str, float] = {}
    for event in events:
        at_s.setdefault(event.name, event.unix_s)
    durations_s: dict[str, float] = {}
    for stage, pairs in _STAGES.items():
        pair = next((pair for pair in pairs if pair[0] in at_s and pair[1] in at_s), None)
        if pair is not None:
            # Not below zero, for a clock that was set back in between.
            durations_s[stage] = max(0.0, at_s[pair[1]] - at_s[pair[0]])
    return durations_s
