"""Shared memory that a process uses: what is still there when it is gone has leaked.

/dev/shm is everybody's, so a file there is ours only if one of our processes has mapped it.
"""

from collections.abc import Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def segments_of(pids: Iterable[int]) -> set[Path]:
    """Files that these processes have mapped; of those that have gone, none."""
    return {path for pid in pids for path in _mapped_files(pid) if path.is_relative_to(SHARED_MEMORY)}


def _mapped_files(pid: int) -> set[Path]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    # address, permissions, offset, device, inode, and the path, if there is one
    return {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
