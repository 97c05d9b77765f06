"""What the public face needs from whatever generates tokens."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from control_plane.generation import Generation, TokenChunk


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """`max_model_len` counts prompt and output tokens together."""

    name: str
    max_model_len: int


class Dispatcher(Protocol):
    """The worker pools. Used from one event loop."""

    def generate(self, generation: Generation) -> AsyncGenerator[TokenChunk, None]:
        """Tokens of one generation, the last chunk with a finish reason. Closing the generator aborts the request in
        every pool.

        Raises the errors of `control_plane.errors` from the first or any later step.
        """
        ...

    def models(self) -> Sequence[ServedModel]:
        """Empty while no worker serves anything, nor did lately."""
        ...

    def ready(self) -> bool:
        """Whether a request that arrives now could be served."""
        ...
