"""One process per directory: a lock file, held as long as the tier is open."""

import fcntl
import os
from pathlib import Path

from kvstore.errors import TierUnusable

LOCK_NAME = "lock"
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600


class DirectoryLock:
    def __init__(self, directory: Path) -> None:
        """Creates the directory if need be. Raises TierUnusable."""
        self._directory = directory
        try:
            directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            self._fd = self._locked()
        except OSError as error:
            raise TierUnusable(f"cannot keep blocks in {directory}: {error}") from error

    def renew(self) -> None:
        """Takes the lock again where the directory was removed, or replaced. Raises OSError, or TierUnusable."""
        try:
            if os.path.samestat(os.stat(self._directory / LOCK_NAME), os.fstat(self._fd)):
                return
        except FileNotFoundError:
            # Not its parents: where a disk is gone, the one below must not fill up.
            self._directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        fd = self._locked()
        os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _locked(self) -> int:
        path = self._directory / LOCK_NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise TierUnusable(f"{self._directory} is in use by another process: {path} is locked") from error
        except OSError:
            os.close(fd)
            raise
        return fd
