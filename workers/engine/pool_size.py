"""How many pages fit into a device's memory, from what was measured after a step of the largest size."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredMemory:
    """Bytes, read after the weights were loaded and a profiling step had run."""

    total: int  # of the device
    free: int  # that nobody has reserved, on the device
    reserved: int  # by torch for this process
    allocated: int  # of these, by tensors that stay: the weights
    step: int  # by what the largest step needed beyond them
    captured: int  # that captured decode steps keep for themselves, graphs and what they read


def num_pages_that_fit(memory: MeasuredMemory, *, share: float, page_bytes: int) -> int:
    """Pages that leave room for the largest step; `share` of the device's memory is all that we may have taken then.

    What others hold (other processes, the driver, libraries) is what is neither free nor reserved by torch. What torch
    has reserved without tensors in it serves the next step or is given back.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    others = memory.total - memory.free - memory.reserved
    steps = memory.step + memory.captured
    room = int(memory.total * share) - others - memory.allocated - steps
    num_pages = room // page_bytes
    if num_pages < 2:
        raise ValueError(
            f"{share:.0%} of {memory.total} bytes leave {room} for pages of {page_bytes}, after {memory.allocated} of"
            f" weights, {steps} of steps and {others} that others hold; at least 2 pages are needed"
        )
    return num_pages
