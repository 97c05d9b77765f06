"""What a worker counts and times, for Prometheus.

Names that other stacks route by are vLLM's; our own are `penstock_*`. Fed by the loop, between steps;
read by the HTTP server's thread.
"""

import contextlib
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from workers.errors import CannotListen
from workers.reports import Load
from workers.request import FinishReason, RequestId, RequestOutput
from workers.step import StepPlan
from workers.timeline import Timeline

_LATENCY_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class WorkerMetrics:
    """All with the label `model_name`."""

    def __init__(self, *, model_name: str, num_pages: int, block_size_tokens: int) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._last_token_s: dict[RequestId, float] = {}
        cache_config = Gauge(
            "vllm:cache_config_info",
            "Facts of the KV cache; always 1",
            ("model_name", "num_gpu_blocks", "block_size"),
            registry=self.registry,
        )
        cache_config.labels(model_name, str(num_pages), str(block_size_tokens)).set(1)
        self._num_running = self._gauge("vllm:num_requests_running", "Requests that compute or pull")
        self._num_waiting = self._gauge("vllm:num_requests_waiting", "Requests in the queue")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 1 is all")
        self._num_leases = self._gauge("penstock_leases", "Hand-overs kept for a puller")
        self._waiting_tokens = self._gauge(
            "penstock_waiting_tokens", "Tokens queued or begun and not computed"
        )
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token here"
        )
        self._itl = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a request", _TOKEN_BUCKETS_S
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end")
        self._queue = self._histogram("vllm:request_queue_time_seconds", "From arrival to the first pages")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began")
        self._generated_tokens = self._counter("vllm:generation_tokens", "Tokens sampled or taken over")
        self._finished = Counter(
            "vllm:request_success",
            "Requests ended, by reason",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._pulls_ok = self._counter("penstock_pulls_ok", "Hand-overs pulled")
        self._pulls_failed = self._counter(
            "penstock_pulls_failed", "Pulls that failed; the prompt is computed here"
        )
        self._pulled_bytes = self._counter("penstock_pulled_bytes", "KV bytes pulled")
        self._pull_s = self._histogram("penstock_pull_seconds", "Of a pull that succeeded, the wait included")
        self._preemptions = self._counter("penstock_preemptions", "Requests that lost their pages")
        self._steps = self._counter("penstock_steps", "Engine steps")
        self._failed_steps = self._counter("penstock_failed_steps", "Engine steps that raised")
        self._step_s = self._histogram("penstock_step_seconds", "Of one engine step", _TOKEN_BUCKETS_S)
        self._step_tokens = self._counter(
            "penstock_step_tokens", "Tokens computed in steps, prompts included"
        )

    def set_load(self, load: Load) -> None:
        self._num_running.set(load.num_running)
        self._num_waiting.set(load.num_waiting)
        self._kv_usage.set(1.0 - load.num_free_pages / load.num_pages)
        self._num_leases.set(load.num_leases)
        self._waiting_tokens.set(load.num_waiting_tokens)

    def step_done(self, plan: StepPlan, *, step_s: float) -> None:
        self._steps.inc()
        self._step_s.observe(step_s)
        self._step_tokens.inc(sum(row.num_new_tokens for row in plan.rows))
        self._preemptions.inc(len(plan.preempted))

    def step_failed(self) -> None:
        self._failed_steps.inc()

    def pull_done(self, *, num_bytes: int, pull_s: float) -> None:
        self._pulls_ok.inc()
        self._pulled_bytes.inc(num_bytes)
        self._pull_s.observe(pull_s)

    def pull_failed(self) -> None:
        self._pulls_failed.inc()

    def request_began(self, *, num_prompt_tokens: int) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)

    def output(self, output: RequestOutput, *, now_s: float) -> None:
        """Everything that a request says passes here once."""
        if output.token_ids:
            self._generated_tokens.inc(len(output.token_ids))
            last_s = self._last_token_s.get(output.request_id)
            if last_s is not None:
                self._itl.observe(max(0.0, now_s - last_s))
            self._last_token_s[output.request_id] = now_s
        if output.finish_reason is not None:
            self._last_token_s.pop(output.request_id, None)
            self._finished.labels(self._model_name, output.finish_reason.value).inc()
            self._observe_timeline(output, finish_reason=output.finish_reason)

    def _observe_timeline(self, output: RequestOutput, *, finish_reason: FinishReason) -> None:
        if finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            return  # a request cut short says nothing of our speed
        timeline = Timeline(stamps=list(output.timeline))
        for histogram, duration_s in (
            (self._ttft, timeline.ttft_s),
            (self._e2e, timeline.e2e_s),
            (self._queue, timeline.queue_s),
        ):
            if duration_s is not None:
                histogram.observe(duration_s)

    def _gauge(self, name: str, explanation: str) -> Gauge:
        return Gauge(name, explanation, ("model_name",), registry=self.registry).labels(self._model_name)

    def _counter(self, name: str, explanation: str) -> Counter:
        return Counter(name, explanation, ("model_name",), registry=self.registry).labels(self._model_name)

    def _histogram(
        self, name: str, explanation: str, buckets_s: tuple[float, ...] = _LATENCY_BUCKETS_S
    ) -> Histogram:
        histogram = Histogram(name, explanation, ("model_name",), buckets=buckets_s, registry=self.registry)
        return histogram.labels(self._model_name)


@contextlib.contextmanager
def serve_metrics(registry: CollectorRegistry, port: int) -> Iterator[None]:
    """On all addresses, in a thread of its own. Raises CannotListen."""
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise CannotListen(f"cannot serve metrics on port {port}: {error}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
