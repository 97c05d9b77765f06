"""What the last step drew, where it lies: the next step reads it there, launched before anybody here knows it."""

from collections.abc import Sequence

import torch

from workers.engine.device_copies import to_device
from workers.request import RequestId


class LatestTokens:
    """Shared by who draws and who builds the next batch, both on the thread that launches steps."""

    def __init__(self) -> None:
        self._places: dict[RequestId, int] = {}
        self._token_N = torch.empty(0, dtype=torch.int64)

    def put(self, request_ids: Sequence[RequestId], token_N: torch.Tensor) -> None:
        """The tokens of these requests, on the device."""
        self._places = {request_id: place for place, request_id in enumerate(request_ids)}
        self._token_N = token_N

    def of(self, request_ids: Sequence[RequestId]) -> torch.Tensor:
        """KeyError: the last step drew none for one of them."""
        places = torch.tensor([self._places[request_id] for request_id in request_ids])
        return self._token_N[to_device(places, self._token_N.device)]
