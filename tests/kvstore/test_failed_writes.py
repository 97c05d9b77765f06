import pytest

from kvstore.errors import DiskFailed
from kvstore.failed_writes import QUIET_S, FailedWrites

FULL = DiskFailed("no space left")


def test_what_failures_cost_is_told_when_none_came_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    writes = FailedWrites()
    for number in range(3):
        writes.failed(FULL, num_blocks=2, now_s=100.0 + number)
    writes.succeeded(now_s=101.9 + QUIET_S)
    (failed,) = caplog.messages
    assert "no space left" in failed
    writes.succeeded(now_s=102.0 + QUIET_S)
    writes.succeeded(now_s=103.0 + QUIET_S)
    assert len(caplog.messages) == 2
    assert "3 writes had failed, 6 blocks" in caplog.messages[1]


def test_a_disk_that_is_nearly_full_is_told_once_however_often_a_write_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    writes = FailedWrites()
    for second in range(100):
        writes.failed(FULL, num_blocks=1, now_s=float(second))
        writes.succeeded(now_s=second + 0.5)
    assert len(caplog.messages) == 1


def test_the_next_failure_after_that_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    writes = FailedWrites()
    for start_s in (0.0, 60.0):
        writes.failed(FULL, num_blocks=1, now_s=start_s)
        writes.succeeded(now_s=start_s + QUIET_S)
    assert len(caplog.messages) == 4
    assert "1 writes had failed, 1 blocks" in caplog.messages[3]
