"""What is told of writes to a disk that fail: the first one, and when that has ended.

A disk that is full fails hundreds of writes a second, and one that is nearly full a write here and there.
"""

import logging

# As long nothing must have failed, or a disk that has room for every other write would be told of twice for each.
QUIET_S = 10.0
_logger = logging.getLogger(__name__)


class FailedWrites:
    def __init__(self) -> None:
        self._num_writes = 0  # since one was told of
        self._num_blocks = 0
        self._last_s = 0.0

    def failed(self, error: BaseException, *, num_blocks: int, now_s: float) -> None:
        if self._num_writes == 0:
            _logger.warning(
                "writing to the disk tier failed: %s; more is told once no write has failed for %g s",
                error, QUIET_S,
            )  # fmt: skip
        self._num_writes += 1
        self._num_blocks += num_blocks
        self._last_s = now_s

    def succeeded(self, *, now_s: float) -> None:
        if self._num_writes and now_s - self._last_s >= QUIET_S:
            _logger.warning(
                "the disk tier is written again: %d writes had failed, %d blocks are not there",
                self._num_writes, self._num_blocks,
            )  # fmt: skip
            self._num_writes = self._num_blocks = 0
