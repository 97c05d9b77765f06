"""Limits of the public face."""

from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings:
    """`model_path` holds tokenizer.json and tokenizer_config.json. Without a default: what `ClusterConfig` decides.

    All limits are positive; `ValueError` names the one that is not.
    """

    model_path: Path
    max_body_bytes: int
    stream_write_timeout_s: float  # a client that reads nothing for so long is disconnected
    body_read_timeout_s: float = 30.0
    max_choices: int = 128  # prompts x n of one request
    thread_tokenize_chars: int = 4_000  # longer prompts are tokenized off the event loop
    health_interval_s: float = 0.5  # how often watchers of the gRPC health service hear of changes

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
