"""The stream of a device on which blocks are copied, beside the one on which steps run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CopyStream:
    """What is launched within `launching` runs beside the engine's stream; on a CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Event | None = None  # of all that was launched
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the pages are zeroed there
            self._mark()

    @contextmanager
    def launching(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):  # makes its device the current one, too
            try:
                yield
            finally:
                self._mark()

    @contextmanager
    def launching_and_waiting(self) -> Iterator[None]:
        """All is done when this is left, also after what could not be launched whole."""
        try:
            with self.launching():
                yield
        finally:
            self.wait()

    def wait(self) -> None:
        """Until all that was launched is done. Releases the interpreter lock."""
        if self._last is not None:
            self._last.synchronize()

    def precede(self, stream: torch.cuda.Stream) -> None:
        """What `stream` is given from now on begins when all that was launched is done."""
        assert self._last is not None
        stream.wait_event(self._last)

    def _mark(self) -> None:
        assert self._stream is not None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        self._last = event  # only now: another thread may make the engine wait for it at any time
