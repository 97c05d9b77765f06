"""Whether the device that was asked for is there."""

import torch

from workers.compute_device import ComputeDevice


def find_device(compute: ComputeDevice) -> torch.device:
    """With its number. Raises `ValueError` if torch does not find it."""
    if not compute.is_cuda:
        return torch.device("cpu")
    index, num_devices = torch.device(compute.device).index or 0, torch.cuda.device_count()
    if index >= num_devices:
        raise ValueError(f"device {compute.device} is not there: torch finds {num_devices} CUDA devices")
    return torch.device("cuda", index)
