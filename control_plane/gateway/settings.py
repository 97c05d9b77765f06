"""Limits of the public face."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from control_plane.gateway.tenancy import Tenancy


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
    tenancy: Tenancy = field(default_factory=Tenancy)
    health_interval_s: float = 0.5  # how often watchers of the gRPC health service hear of changes

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{each.name} must be positive, got {value}")
