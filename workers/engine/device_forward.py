"""A model's layers on a device: launched at once, and announced one by one when the device has reached them."""

from collections.abc import Callable

import torch

from workers.engine.engine_parts import Forward
from workers.model.token_batch import TokenBatch


def announcing(forward: Forward, *, device: torch.device) -> Forward:
    """`forward` on `device`, whose `on_layer(l)` is called when the keys and values of layer l lie in their pages.

    A GPU is given a step's work long before it has done it. So an event is recorded where `on_layer` stands in that
    work, and waited for, without the interpreter lock, when all is launched. Whoever hears of a layer may copy it at
    once, and nobody waits in the event loop for a GPU that computes.
    """
    if device.type != "cuda":
        return forward

    def forward_and_announce(
        batch: TokenBatch, *, on_layer: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        if on_layer is None:
            return forward(batch)
        written: list[torch.cuda.Event] = []

        def record(layer: int) -> None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            written.append(event)

        logits_SV = forward(batch, on_layer=record)
        for layer, event in enumerate(written):
            event.synchronize()
            on_layer(layer)
        return logits_SV

    return forward_and_announce
