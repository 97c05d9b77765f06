"""The memory of the CPU tier, page-locked where there is a GPU to copy from and to."""

import numpy as np
import torch
from numpy.typing import NDArray


def allocate_arena(num_bytes: int) -> NDArray[np.uint8]:
    """What is never used costs nothing, unless it is page-locked. Raises OSError if there is not so much memory."""
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]  # torch goes on with where in its sources
        raise OSError(f"no memory for memory_tier_bytes {num_bytes}: {reason}") from error
