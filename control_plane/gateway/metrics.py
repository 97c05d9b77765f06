"""What Prometheus sees of the public face: vLLM's names where it has one, for dashboards; else `penstock_*`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

METRICS_MEDIA_TYPE = CONTENT_TYPE_LATEST

_TTFT_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_ITL_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
)
_E2E_BUCKETS_S = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_TOKENIZE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)


class GatewayMetrics:
    """Registers itself in `registry`, where the other parts of the process add theirs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        model = ("model_name",)
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From the arrival of a request to its first token, at the gateway",
            model,
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between two arrivals of tokens of one choice, at the gateway",
            model,
            buckets=_ITL_BUCKETS_S,
            registry=registry,
        )
        self.e2e_request_latency = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From the arrival of a request to its last byte",
            model,
            buckets=_E2E_BUCKETS_S,
            registry=registry,
        )
        self.request_stage = Histogram(
            "penstock_request_stage_seconds",
            "Of a choice on the workers: queue, prefill, pull and decode, each by one worker's clock",
            (*model, "stage"),
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self.request_success = Counter(
            "vllm:request_success",
            "Choices by how they ended: stop, length, abort or error",
            (*model, "finished_reason"),
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens of all requests", model, registry=registry
        )
        self.generation_tokens = Counter(
            "vllm:generation_tokens", "Generated tokens", model, registry=registry
        )
        self.requests = Counter(
            "penstock_gateway_requests", "Requests by status code", ("protocol", "code"), registry=registry
        )
        self.open_streams = Gauge(
            "penstock_gateway_open_streams", "Streamed answers in progress", registry=registry
        )
        self.migrations = Counter(
            "penstock_migrations",
            "Tries to move a running request to another worker, by how they ended and why they were made",
            ("outcome", "reason"),
            registry=registry,
        )
        self.migration_duration = Histogram(
            "penstock_migration_seconds",
            "Of moves that succeeded: from asking the new worker to its first token",
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self.tokenize = Histogram(
            "penstock_gateway_intake_seconds",
            "From the arrival of a request to its being checked, rendered and tokenized",
            buckets=_TOKENIZE_BUCKETS_S,
            registry=registry,
        )

    def render(self) -> bytes:
        """The whole registry in Prometheus' text format."""
        return generate_latest(self.registry)
