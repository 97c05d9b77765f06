"""One process of the cluster: start, readiness by its log, end."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from control_plane.runtimes import child
from control_plane.runtimes.errors import StartFailed
from control_plane.runtimes.log_tail import LogEvent, LogTail, last_lines
from control_plane.runtimes.process_id import identify
from control_plane.runtimes.state import ProcessState, Status

_POLL_S = 0.05
_EXIT_LEFT = 3  # of a worker (workers/__main__.py)
_CHILD_SCRIPT = str(Path(child.__file__))


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessSpec:
    """`command` must write the JSON line `{"event": "ready"}` once it serves; other events are progress."""

    name: str
    pool: str
    command: Sequence[str]
    environment: Mapping[str, str]
    cores: tuple[int, ...]
    log_path: Path
    sockets: Sequence[Path] = ()


class ManagedProcess:
    """`on_change` is called after every change of `state`."""

    def __init__(self, spec: ProcessSpec, *, on_change: Callable[[], None]) -> None:
        self.spec = spec
        self.state = ProcessState(
            name=spec.name,
            pool=spec.pool,
            status=Status.STARTING,
            cores=spec.cores,
            log_path=str(spec.log_path),
        )
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._log_offset = 0
        self._was_ready = False  # since its last start

    def update(self, **changes: object) -> None:
        changed = replace(self.state, **changes)  # type: ignore[arg-type]
        if changed != self.state:
            self.state = changed
            self._on_change()

    async def spawn(self) -> None:
        """Starts the process in a session of its own: a Ctrl-C at the terminal reaches the launcher alone."""
        self._was_ready = False
        for path in self.spec.sockets:
            path.unlink(missing_ok=True)  # of an incarnation that was killed
        cores = ",".join(map(str, self.spec.cores))
        wrapper = [sys.executable, "-I", "-S", _CHILD_SCRIPT, str(os.getpid()), cores]
        with self.spec.log_path.open("ab") as log:
            self._log_offset = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *wrapper, *self.spec.command, env=dict(self.spec.environment), start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
        self.update(status=Status.STARTING, detail="", progress=None, process_id=identify(self._process.pid))

    async def wait_ready(self, *, timeout_s: float) -> None:
        """Raises StartFailed with the end of the log if the process ends or `timeout_s` passes first."""
        tail = LogTail(self.spec.log_path, offset=self._log_offset)
        exit_task = asyncio.ensure_future(self._started.wait())
        try:
            async with asyncio.timeout(timeout_s):
                while not self._take_in(tail.read_events()):
                    if exit_task.done():
                        raise self.failure(f"{self.spec.name} {self.describe_exit()} before it was ready")
                    await asyncio.wait({exit_task}, timeout=_POLL_S)
        except TimeoutError as e:
            raise self.failure(f"{self.spec.name} was not ready within {timeout_s:g} s") from e
        finally:
            exit_task.cancel()

    def _take_in(self, events: Sequence[LogEvent]) -> bool:
        for event in events:
            if event.name == "ready":
                self._was_ready = True
                self.update(status=Status.READY, detail="", progress=None)
                return True
            if event.fields.get("level") in ("info", None):
                progress = event.fields.get("progress")
                known = float(progress) if isinstance(progress, int | float) else None
                self.update(detail=event.name.replace("_", " "), progress=known)
        return False

    def failure(self, message: str) -> StartFailed:
        return StartFailed(message, log_tail=last_lines(self.spec.log_path, offset=self._log_offset))

    async def wait_exit(self) -> None:
        await self._started.wait()

    @property
    def ended_in_order(self) -> bool:
        """A worker that was drained, whether or not it finished all it had, and did not die. Before it is ready there
        is nothing to drain: one that ends then would end each time."""
        is_worker = bool(self.spec.pool)
        return is_worker and self._was_ready and self._started.returncode in (0, _EXIT_LEFT)

    def describe_exit(self) -> str:
        code = self._started.returncode
        if code is None:
            return "is running"
        if self.ended_in_order:
            return "was drained" + (" and left something, which its log lists" if code == _EXIT_LEFT else "")
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    async def stop(self, *, timeout_s: float, force: asyncio.Event) -> None:
        """SIGTERM; after `timeout_s`, or once `force` is set, SIGKILL to it and all that it started."""
        if self._process is not None and self._process.returncode is None:
            self.update(status=Status.STOPPING, detail="", progress=None)
            self._signal(signal.SIGTERM)
            exit_task = asyncio.ensure_future(self._process.wait())
            force_task = asyncio.ensure_future(force.wait())
            await asyncio.wait(
                {exit_task, force_task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            force_task.cancel()
            if not exit_task.done():
                self._signal(signal.SIGKILL)
            await exit_task
        self.update(status=Status.STOPPED, process_id=None)

    async def kill(self) -> None:
        """SIGKILL to the process, if it still runs, and to all that it started."""
        if self._started.returncode is None:
            self._signal(signal.SIGKILL)
        await self._started.wait()

    def _signal(self, number: signal.Signals) -> None:
        # returncode is None: it is not reaped, so the pid, which names its group as well, is still its own.
        try:
            if number is signal.SIGKILL:
                os.killpg(self._started.pid, number)
            else:
                os.kill(self._started.pid, number)
        except ProcessLookupError:
            pass  # it has just ended

    @property
    def _started(self) -> asyncio.subprocess.Process:
        assert self._process is not None, f"{self.spec.name} was not spawned"
        return self._process
