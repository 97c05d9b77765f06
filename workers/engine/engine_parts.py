"""What an engine is composed of: the seams between a step and what computes it on a CPU or another device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from workers.model.config import ModelConfig
from workers.model.info import ModelInfo
from workers.model.token_batch import TokenBatch
from workers.request import Request, RequestId
from workers.step import SampledToken, ScheduledRequest

if TYPE_CHECKING:  # a bare GPU machine has no numpy
    from workers.engine.kv_memory import KvMemory


class Batches(Protocol):
    def build(self, rows: Sequence[ScheduledRequest], /) -> tuple[TokenBatch, list[ScheduledRequest]]:
        """The batch (valid until the next), and the rows that sample in the order of its logits."""
        ...


class Forward(Protocol):
    def __call__(
        self, batch: TokenBatch, /, *, on_layer: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Logits [S, V]; `on_layer(l)` is called when the keys and values of layer l lie in their pages."""
        ...


class TokenSampler(Protocol):
    """Called from one thread at a time."""

    def sample(self, requests: Sequence[Request], logits_SV: torch.Tensor, /) -> list[SampledToken]:
        """A token for every request; row i of the logits predicts the token after the last of `requests[i]`."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """Drops what is cached of a request; without effect if nothing is."""
        ...


class StopFinder(Protocol):
    """Called from one thread at a time."""

    def find(self, request: Request, new_token_id: int, /) -> str | None:
        """The stop string that `new_token_id`, not yet among the request's output, completes."""
        ...

    def forget(self, request_id: RequestId, /) -> None:
        """Drops what is cached of a request; without effect if nothing is."""
        ...


Drawn = Callable[[], list[SampledToken]]


class RowSampler(Protocol):
    """Called from one thread at a time."""

    def draw(self, rows: Sequence[ScheduledRequest], logits_SV: torch.Tensor, /) -> Drawn:
        """A token for every row; what is returned waits for them. Row i of the logits predicts the token that `rows[i]`
        samples."""
        ...

    def can_draw_ahead(self, rows: Sequence[ScheduledRequest], /) -> bool:
        """Whether the step after that of these rows can be launched before their tokens are known."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """Drops what is cached of a request; without effect if nothing is."""
        ...


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Draws what a CPU has computed: all is known when `draw` returns."""

    sampler: TokenSampler

    def draw(self, rows: Sequence[ScheduledRequest], logits_SV: torch.Tensor) -> Drawn:
        tokens = self.sampler.sample([row.request for row in rows], logits_SV)
        return lambda: tokens

    def can_draw_ahead(self, rows: Sequence[ScheduledRequest]) -> bool:
        return False

    def forget(self, request_id: RequestId) -> None:
        self.sampler.forget(request_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineParts:
    forward: Forward
    kv_pool: KvMemory
    batches: Batches
    sampler: RowSampler


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedModel:
    """What is known of a model without its weights, and the same on every device."""

    config: ModelConfig
    info: ModelInfo
    sampler: TokenSampler  # on this machine
    stop_strings: StopFinder

    @property
    def max_pages_per_request(self) -> int:
        return -(-self.info.max_model_len // self.info.layout.block_size_tokens)
