"""A cluster as processes on this machine: a control process, and workers each on its own cores."""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from control_plane.config import ClusterConfig
from control_plane.runtimes.commands import Commands, WorkerPlace, environment, num_threads, pool_config
from control_plane.runtimes.cores import assign_cores, least_used_cores
from control_plane.runtimes.errors import StartFailed
from control_plane.runtimes.ports import reachable_host, with_free_ports
from control_plane.runtimes.process import ManagedProcess, ProcessSpec
from control_plane.runtimes.stale import clear_stale
from control_plane.runtimes.state import (
    EFFECTIVE_CONFIG_FILE,
    RunState,
    Status,
    lock,
    own_process_id,
    remove_leftovers,
)
from control_plane.strict_yaml import dump

POOLS = ("prefill", "decode", "mixed")
CONTROL = "control"
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_HEALTHY_AFTER_S = 30.0  # a process that served so long starts again without the pauses of earlier deaths
_READY_POLL_S = 0.05


@dataclass(slots=True)
class _Watched:
    process: ManagedProcess
    watch: asyncio.Task[None] | None = None


class LocalRuntime:
    """`async with LocalRuntime(...) as runtime: await runtime.start()`. On leaving, only the logs remain.

    `on_change` is called with the whole state after every change of a process. All methods belong to one
    event loop, that of the main thread: the kernel ends the children with the thread that started them.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        commands: Commands | None = None,
        on_change: Callable[[RunState], None] = lambda state: None,
    ) -> None:
        self.config = config
        self._commands = commands or Commands()
        self._on_change = on_change
        self._cores = sorted(os.sched_getaffinity(0))
        self._members: dict[str, _Watched] = {}
        self._next_number = dict.fromkeys(POOLS, 0)
        self._ready = False
        self._force = asyncio.Event()
        self._resources = ExitStack()

    async def __aenter__(self) -> Self:
        """Takes the run directory and the ports. Raises AlreadyRunning or PortBusy before anything starts."""
        run_dir = self.config.run_dir
        with ExitStack() as resources:
            resources.enter_context(lock(run_dir))
            await asyncio.to_thread(clear_stale, run_dir, timeout_s=self.config.stop_timeout_s)
            self.config = with_free_ports(self.config)
            resources.callback(remove_leftovers, run_dir)
            (run_dir / "logs").mkdir(exist_ok=True)
            self.config.socket_dir.mkdir(mode=0o700, exist_ok=True)
            (run_dir / EFFECTIVE_CONFIG_FILE).write_text(dump(self.config))
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._resources:
            await self._stop_all()

    def force_stop(self) -> None:
        """From now on whoever must stop is killed at once."""
        self._force.set()

    @property
    def http_url(self) -> str:
        return f"http://{reachable_host(self.config.gateway.host)}:{self.config.gateway.port}"

    def state(self) -> RunState:
        gateway = self.config.gateway
        return RunState(
            launcher=own_process_id(),
            ready=self._ready,
            http_url=self.http_url,
            grpc_address=f"{reachable_host(gateway.host)}:{gateway.grpc_port}",
            directory_address=self.config.directory_address,
            model=self.config.model.name,
            processes=tuple(member.process.state for member in self._members.values()),
        )

    async def start(self) -> None:
        """Returns once the gateway can serve. Raises StartFailed if a process ends before or time is up."""
        wanted = [(pool, pool_config(self.config, pool).replicas) for pool in POOLS]
        cores = iter(assign_cores(sum(count for _, count in wanted), self._cores))
        starting = [self._add_control()]
        starting += [self._add_worker(pool, next(cores)) for pool, count in wanted for _ in range(count)]
        deadline = time.monotonic() + self.config.start_timeout_s
        await self._bring_up(starting)
        await self._wait_gateway(deadline)
        self._ready = True
        self._changed()

    async def scale(self, pool: str, num_replicas: int) -> None:
        """Starts workers until the pool has `num_replicas` that are ready, or stops the youngest."""
        pool_config(self.config, pool)  # ValueError for a name that is no pool
        if num_replicas < 0:
            raise ValueError(f"num_replicas is {num_replicas}, but it must not be negative")
        members = [member for member in self._members.values() if member.process.spec.pool == pool]
        starting = []
        for _ in range(num_replicas - len(members)):
            taken = [
                member.process.spec.cores for member in self._members.values() if member.process.spec.pool
            ]
            starting.append(self._add_worker(pool, least_used_cores(taken, self._cores)))
        await self._bring_up(starting)
        surplus = members[num_replicas:]
        await asyncio.gather(*(self._stop(member) for member in surplus))
        for member in surplus:
            del self._members[member.process.spec.name]
        self._changed()

    def _add_control(self) -> _Watched:
        command = self._commands.control(self.config.run_dir / EFFECTIVE_CONFIG_FILE)
        return self._add(name=CONTROL, pool="", command=command, cores=(), num_compute_threads=1)

    def _add_worker(self, pool: str, cores: tuple[int, ...]) -> _Watched:
        # The youngest leave first, so this is the lowest number that nobody has.
        replica = sum(member.process.spec.pool == pool for member in self._members.values())
        name = f"{pool}-{self._next_number[pool]}"
        place = WorkerPlace(pool=pool, replica=replica, name=name, cores=cores)
        self._next_number[pool] += 1
        return self._add(
            name=place.name,
            pool=pool,
            command=self._commands.worker(self.config, place),
            cores=cores,
            num_compute_threads=num_threads(pool_config(self.config, pool), cores),
        )

    def _add(
        self, *, name: str, pool: str, command: list[str], cores: tuple[int, ...], num_compute_threads: int
    ) -> _Watched:
        log_path = self.config.run_dir / "logs" / f"{name}.log"
        log_path.write_bytes(b"")
        socket_names = (f"{name}.control.sock", f"{name}.data.sock") if pool else ("directory.sock",)
        spec = ProcessSpec(
            name=name,
            pool=pool,
            command=command,
            environment=environment(num_compute_threads),
            cores=cores,
            log_path=log_path,
            sockets=[self.config.socket_dir / socket_name for socket_name in socket_names],
        )
        member = self._members[name] = _Watched(ManagedProcess(spec, on_change=self._changed))
        return member

    async def _bring_up(self, members: list[_Watched]) -> None:
        """Starts all at once, waits for all, then watches them. The first that fails decides."""
        timeout_s = self.config.start_timeout_s
        for member in members:
            await member.process.spawn()
        try:
            async with asyncio.TaskGroup() as group:
                for member in members:
                    group.create_task(member.process.wait_ready(timeout_s=timeout_s))
        except ExceptionGroup as failures:
            failed = [failure for failure in failures.exceptions if isinstance(failure, StartFailed)]
            if len(failed) < len(failures.exceptions):
                raise  # one of our bugs
            raise failed[0] from None
        for member in members:
            member.watch = asyncio.create_task(self._watch(member.process))

    async def _wait_gateway(self, deadline: float) -> None:
        """Until /ready answers 200: the gateway knows the workers, and its sessions with them stand."""
        import httpx  # a quarter of a second, while the children load

        answer = "no answer"
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as client:
            while time.monotonic() < deadline:
                try:
                    response = await client.get(f"{self.http_url}/ready")
                    if response.status_code == 200:
                        return
                    answer = f"{response.status_code} {response.text.strip()[:200]}"
                except httpx.TransportError as e:
                    answer = str(e) or type(e).__name__
                self._raise_if_gone()
                await asyncio.sleep(_READY_POLL_S)
        raise StartFailed(
            f"the gateway at {self.http_url} was not ready within {self.config.start_timeout_s:g} s: {answer}"
        )

    def _raise_if_gone(self) -> None:
        for member in self._members.values():
            if member.process.state.status is Status.RESTARTING:
                raise member.process.failure(f"{member.process.spec.name} {member.process.describe_exit()}")

    async def _watch(self, process: ManagedProcess) -> None:
        """Starts the process again whenever it ends, after a pause that doubles while it dies young."""
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            await process.wait_exit()
            if time.monotonic() - began > _HEALTHY_AFTER_S:
                pause_s = _FIRST_PAUSE_S
            process.update(
                status=Status.RESTARTING,
                detail=f"{process.describe_exit()}; starts again in {pause_s:g} s",
                progress=None,
                process_id=None,
                num_restarts=process.state.num_restarts + 1,
            )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            await process.spawn()
            try:
                await process.wait_ready(timeout_s=self.config.start_timeout_s)
            except StartFailed:
                await process.kill()  # not ready in time; of one that has ended this does nothing

    async def _stop_all(self) -> None:
        """The gateway first, while the workers can still finish what it drains; then all workers at once."""
        workers = [member for member in self._members.values() if member.process.spec.pool]
        for member in self._members.values():
            await _end(member.watch)
        if CONTROL in self._members:
            await self._stop(self._members[CONTROL])
        await asyncio.gather(*(self._stop(member) for member in workers))

    async def _stop(self, member: _Watched) -> None:
        await _end(member.watch)
        await member.process.stop(timeout_s=self.config.stop_timeout_s, force=self._force)

    def _changed(self) -> None:
        state = self.state()
        state.write(self.config.run_dir)
        self._on_change(state)


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
