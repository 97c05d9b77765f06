"""When a failed disk is tried again. Pure: the time is an argument."""

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0


class Backoff:
    """Pauses after each failure, twice as long as the time before, until something succeeds."""

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._failed_at_s = 0.0

    def failed(self, *, now_s: float) -> None:
        self._failed_at_s = now_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S) or FIRST_PAUSE_S

    def succeeded(self) -> None:
        self._pause_s = 0.0

    def pause_left_s(self, *, now_s: float) -> float:
        """0.0: it may be tried."""
        elapsed_s = now_s - self._failed_at_s
        # A wall clock that was set back ends the pause instead of stretching it.
        return max(0.0, self._pause_s - elapsed_s) if elapsed_s >= 0.0 else 0.0
