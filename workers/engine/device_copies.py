"""Small copies between this machine's memory and a device that computes, for which nobody waits."""

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copied without waiting; torch keeps pinned memory until its copies are done."""
    if device.type != "cuda" or not len(x):
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Launched:
    """Tokens that the device may still be computing."""

    def __init__(self, token_N: torch.Tensor) -> None:
        self._token_N = token_N
        self._done: torch.Event | None = None
        if token_N.is_cuda:
            self._token_N = torch.empty(token_N.shape, dtype=token_N.dtype, pin_memory=True)
            self._token_N.copy_(token_N, non_blocking=True)
            self._done = torch.Event("cuda")
            self._done.record()

    def token_ids(self) -> list[int]:
        """Waits for them."""
        if self._done is not None:
            self._done.synchronize()
        token_ids: list[int] = self._token_N.tolist()
        return token_ids
