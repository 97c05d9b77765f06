"""A cluster as processes on this machine: control processes, workers each on its own cores, and stores on any."""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from control_plane.config import ClusterConfig, directory_socket, replica_port
from control_plane.runtimes import service
from control_plane.runtimes.commands import (
    Commands,
    WorkerPlace,
    disk_dir,
    environment,
    num_threads,
    pool_config,
)
from control_plane.runtimes.cores import assign_cores, least_used_cores
from control_plane.runtimes.errors import StartFailed
from control_plane.runtimes.ports import reachable_host, with_free_ports
from control_plane.runtimes.process import ManagedProcess, ProcessSpec
from control_plane.runtimes.stale import clear_stale
from control_plane.runtimes.state import (
    EFFECTIVE_CONFIG_FILE,
    GatewayState,
    RunState,
    Status,
    lock,
    own_process_id,
    remove_leftovers,
)
from control_plane.strict_yaml import dump

POOLS = ("prefill", "decode", "mixed", "store")
_WITHOUT_CORES = ("store",)  # their work is to wait for memory, disk and network
CONTROL = "control"
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_HEALTHY_AFTER_S = 30.0  # a process that served so long starts again without the pauses of earlier deaths
_READY_POLL_S = 0.05
_RESUME_POLL_S = 0.2


@dataclass(slots=True)
class _Watched:
    process: ManagedProcess
    watch: asyncio.Task[None] | None = None


class LocalRuntime:
    """`async with LocalRuntime(...) as runtime: await runtime.start()`. On leaving, logs and disk tiers remain.

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
            effective = run_dir / EFFECTIVE_CONFIG_FILE
            effective.touch(mode=0o600)  # directory.redis_url may hold a password
            effective.write_text(dump(self.config))
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
    def gateways(self) -> tuple[GatewayState, ...]:
        gateway = self.config.gateway
        host = reachable_host(gateway.host)
        return tuple(
            GatewayState(
                name=_control_name(replica),
                http_url=f"http://{host}:{replica_port(gateway.port, replica)}",
                grpc_address=f"{host}:{replica_port(gateway.grpc_port, replica)}",
                directory_address=directory_address,
            )
            for replica, directory_address in enumerate(self.config.directory_addresses)
        )

    def state(self) -> RunState:
        return RunState(
            launcher=own_process_id(),
            ready=self._ready,
            gateways=self.gateways,
            model=self.config.model.name,
            processes=tuple(member.process.state for member in self._members.values()),
        )

    async def start(self) -> None:
        """Returns once every gateway can serve. Raises StartFailed if a process ends before or time is up."""
        wanted = [pool for pool in POOLS for _ in range(pool_config(self.config, pool).replicas)]
        cores = iter(assign_cores(sum(pool not in _WITHOUT_CORES for pool in wanted), self._cores))
        starting = [self._add_control(replica) for replica in range(self.config.gateway.replicas)]
        starting += [self._add_worker(pool, () if pool in _WITHOUT_CORES else next(cores)) for pool in wanted]
        deadline = time.monotonic() + self.config.start_timeout_s
        await self._bring_up(starting)
        await asyncio.gather(*(self._wait_gateway(gateway.http_url, deadline) for gateway in self.gateways))
        self._ready = True
        self._changed()

    async def scale(self, pool: str, num_replicas: int) -> None:
        """Starts workers until the pool has `num_replicas` that are ready, or drains the youngest."""
        drain_timeout_s = pool_config(
            self.config, pool
        ).drain_timeout_s  # ValueError for a name that is no pool
        if num_replicas < 0:
            raise ValueError(f"num_replicas is {num_replicas}, but it must not be negative")
        members = [member for member in self._members.values() if member.process.spec.pool == pool]
        starting = []
        for _ in range(num_replicas - len(members)):
            starting.append(self._add_worker(pool, self._cores_beside_others(pool)))
        await self._bring_up(starting)
        surplus = members[num_replicas:]
        timeout_s = drain_timeout_s + self.config.stop_timeout_s
        await asyncio.gather(*(self._stop(member, timeout_s=timeout_s) for member in surplus))
        for member in surplus:
            del self._members[member.process.spec.name]
        self._changed()

    def _cores_beside_others(self, pool: str) -> tuple[int, ...]:
        if pool in _WITHOUT_CORES:
            return ()
        specs = [member.process.spec for member in self._members.values()]
        return least_used_cores([spec.cores for spec in specs if spec.cores], self._cores)

    def _add_control(self, replica: int) -> _Watched:
        return self._add(
            name=_control_name(replica),
            pool="",
            command=self._commands.control(self.config.run_dir / EFFECTIVE_CONFIG_FILE, replica),
            cores=(),
            sockets=(directory_socket(replica),),
        )

    def _add_worker(self, pool: str, cores: tuple[int, ...]) -> _Watched:
        # The youngest leave first, so this is the lowest number that nobody has.
        replica = sum(member.process.spec.pool == pool for member in self._members.values())
        name = f"{pool}-{self._next_number[pool]}"
        place = WorkerPlace(pool=pool, replica=replica, name=name, cores=cores)
        self._next_number[pool] += 1
        if self.config.kv.disk_bytes(pool_config(self.config, pool)) > 0:
            disk_dir(self.config, name).mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._add(
            name=place.name,
            pool=pool,
            command=self._commands.worker(self.config, place),
            cores=cores,
            sockets=(f"{name}.control.sock", f"{name}.data.sock"),
        )

    def _add(
        self, *, name: str, pool: str, command: list[str], cores: tuple[int, ...], sockets: tuple[str, ...]
    ) -> _Watched:
        log_path = self.config.run_dir / "logs" / f"{name}.log"
        log_path.write_bytes(b"")
        num_compute_threads = num_threads(pool_config(self.config, pool), cores) if pool else 1
        spec = ProcessSpec(
            name=name,
            pool=pool,
            command=command,
            environment=environment(num_compute_threads),
            cores=cores,
            log_path=log_path,
            sockets=[self.config.socket_dir / socket for socket in sockets],
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

    async def _wait_gateway(self, url: str, deadline: float) -> None:
        """Until /ready answers 200: the gateway knows the workers, and its sessions with them stand."""
        import httpx  # a quarter of a second, while the children load

        answer = "no answer"
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as client:
            while time.monotonic() < deadline:
                try:
                    response = await client.get(f"{url}/ready")
                    if response.status_code == 200:
                        return
                    answer = f"{response.status_code} {response.text.strip()[:200]}"
                except httpx.TransportError as e:
                    answer = str(e) or type(e).__name__
                self._raise_if_gone()
                await asyncio.sleep(_READY_POLL_S)
        raise StartFailed(
            f"the gateway at {url} was not ready within {self.config.start_timeout_s:g} s: {answer}"
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
            if service.is_out(self.config.run_dir, process.spec.name):
                await self._out_of_service(process)
                pause_s = _FIRST_PAUSE_S
            else:
                if process.ended_in_order or time.monotonic() - began > _HEALTHY_AFTER_S:
                    pause_s = _FIRST_PAUSE_S
                await self._pause(process, pause_s=pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            await process.spawn()
            try:
                await process.wait_ready(timeout_s=self.config.start_timeout_s)
            except StartFailed:
                await process.kill()  # not ready in time; of one that has ended this does nothing

    async def _pause(self, process: ManagedProcess, *, pause_s: float) -> None:
        """Between the end of a process and its next start. One that was told to end has not died."""
        is_death = not process.ended_in_order
        process.update(
            status=Status.RESTARTING if is_death else Status.STARTING,
            detail=f"{process.describe_exit()}; starts again in {pause_s:g} s",
            progress=None,
            process_id=None,
            num_restarts=process.state.num_restarts + is_death,
        )
        await asyncio.sleep(pause_s)

    async def _out_of_service(self, process: ManagedProcess) -> None:
        """Of a worker that was drained, until it is wanted again."""
        detail = f"penstock resume {process.spec.name} starts it again"
        process.update(status=Status.DRAINED, detail=detail, progress=None, process_id=None)
        while service.is_out(self.config.run_dir, process.spec.name):  # noqa: ASYNC110  a file tells nobody
            await asyncio.sleep(_RESUME_POLL_S)

    async def _stop_all(self) -> None:
        """The gateways first, while the workers can still finish what they drain; then all workers at once."""
        members = self._members.values()
        for member in members:
            await _end(member.watch)
        timeout_s = self.config.stop_timeout_s
        for is_worker in (False, True):
            stopping = [member for member in members if bool(member.process.spec.pool) is is_worker]
            await asyncio.gather(*(self._stop(member, timeout_s=timeout_s) for member in stopping))

    async def _stop(self, member: _Watched, *, timeout_s: float) -> None:
        await _end(member.watch)
        await member.process.stop(timeout_s=timeout_s, force=self._force)

    def _changed(self) -> None:
        state = self.state()
        state.write(self.config.run_dir)
        self._on_change(state)


def _control_name(replica: int) -> str:
    return f"{CONTROL}-{replica}" if replica else CONTROL


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
