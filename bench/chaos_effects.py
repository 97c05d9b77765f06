"""Does to a cluster what a storm says, waits until all is well again, and keeps the timeline."""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import httpx

from bench.chaos_site import Site, is_ready, until
from bench.chaos_storm import Disturbance, Kind, Lane, disturbances
from bench.cutting import cut_connections
from control_plane.runtimes.process_id import ProcessId
from protos import worker_pb2, worker_pb2_grpc

RPC_TIMEOUT_S = 5.0
MOVE_TIMEOUT_S = 30.0
CUT_PAUSE_S = 0.05
SLOW_S = 0.05  # stopped, and then as long not


@dataclass(slots=True)
class Timeline:
    began_s: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)

    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    def note(self, disturbance: Disturbance, *, at_s: float, remark: str) -> None:
        """It is over, and all is well again."""
        kind = disturbance.kind.value
        self.counts[kind] += 1
        if disturbance.kind is Kind.MOVE_REQUEST:
            self.counts[f"{kind}: {remark}"] += 1
        took_s = self.now_s() - at_s
        print(f"{at_s:7.1f} s  {kind:16} {disturbance.target:10} {took_s:5.1f} s  {remark}", flush=True)


class Storm:
    def __init__(self, site: Site, *, seed: int, lasts_s: float) -> None:
        self.timeline = Timeline()
        self._site = site
        self._seed = seed
        self._lasts_s = lasts_s

    async def blow(self, lane: Lane) -> None:
        """Nothing begins after the storm's time. Raises RuntimeError if something does not become well again."""
        for disturbance in disturbances(lane, seed=self._seed):
            await asyncio.sleep(disturbance.pause_s)
            at_s = self.timeline.now_s()
            if at_s >= self._lasts_s:
                return
            remark = await self._do(disturbance)
            if set(lane.targets) <= set(self._site.workers) and disturbance.kind is not Kind.MOVE_REQUEST:
                await until(
                    lambda: self._site.are_well(lane.targets),
                    what=f"{lane.name} well again after {disturbance}",
                )
            self.timeline.note(disturbance, at_s=at_s, remark=remark)

    async def _do(self, disturbance: Disturbance) -> str:
        """A remark, if there is one to make."""
        name, lasts_s = disturbance.target, disturbance.lasts_s
        match disturbance.kind:
            case Kind.KILL_WORKER:
                await self._kill(name)
            case Kind.DRAIN_WORKER:
                await self._drain(name)
            case Kind.KILL_GATEWAY:
                await self._kill_gateway(name)
            case Kind.STOP_WORKER | Kind.STOP_GATEWAY:
                await self._stop(name, seconds=lasts_s)
                return f"for {lasts_s:.1f} s"
            case Kind.SLOW_WORKER:
                for _ in range(int(lasts_s / (2 * SLOW_S))):
                    await self._stop(name, seconds=SLOW_S)
                    await asyncio.sleep(SLOW_S)
                return f"for {lasts_s:.1f} s"
            case Kind.CUT_WORKER:
                await self._cut_off(name, seconds=lasts_s)
                return f"for {lasts_s:.1f} s"
            case Kind.FILL_DISK:
                async with self._site.full_disk():
                    await asyncio.sleep(lasts_s)
                return f"for {lasts_s:.1f} s"
            case Kind.KILL_REDIS:
                self._site.redis.kill()
                await asyncio.sleep(lasts_s)
                await asyncio.to_thread(self._site.redis.start)
            case Kind.STOP_REDIS:
                self._site.redis.freeze()
                try:
                    await asyncio.sleep(lasts_s)
                finally:
                    self._site.redis.thaw()
            case Kind.MOVE_REQUEST:
                return await self._move(name, disturbance.choice)
        return ""

    async def _running(self, name: str) -> ProcessId:
        await until(lambda: self._site.process(name) is not None, what=f"{name} runs")
        found = self._site.process(name)
        if found is None:
            raise RuntimeError(f"{name} has gone by itself")
        return found

    async def _stop(self, name: str, *, seconds: float) -> None:
        with _stopped(await self._running(name)):
            await asyncio.sleep(seconds)

    async def _cut_off(self, name: str, *, seconds: float) -> None:
        victim = await self._running(name)
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and victim.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it ends meanwhile, and so does the cut
                await asyncio.to_thread(cut_connections, victim.pid)
            await asyncio.sleep(CUT_PAUSE_S)

    async def _kill(self, name: str) -> None:
        victim = await self._running(name)
        self._site.note_shared_memory()
        victim.send(signal.SIGKILL)
        await self._has_followed(victim, name)

    async def _drain(self, name: str) -> None:
        """As `penstock drain --restart` does it."""
        victim = await self._running(name)
        async with grpc.aio.insecure_channel(self._site.control_address(name)) as channel:
            await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(), timeout=RPC_TIMEOUT_S)
        await self._has_followed(victim, name)

    async def _kill_gateway(self, name: str) -> None:
        door = self._site.doors[name]
        door.is_open = False
        door.num_kills += 1
        try:
            await self._kill(name)
            await until(lambda: is_ready(door), what=f"{name} ready again")
        finally:
            door.is_open = True

    async def _has_followed(self, victim: ProcessId, name: str) -> None:
        await until(
            lambda: self._site.process(name) not in (victim, None), what=f"somebody follows {name}, {victim}"
        )

    async def _move(self, worker: str, choice: float) -> str:
        """Some request of some gateway goes to this worker: how that ends."""
        async with httpx.AsyncClient(trust_env=False, timeout=MOVE_TIMEOUT_S) as http:
            listed = []
            for door in self._site.doors.values():
                url = f"http://127.0.0.1:{door.port}/admin/requests"
                with contextlib.suppress(httpx.TransportError):  # it is being killed
                    requests = (await http.get(url)).json()["requests"]
                    listed += [
                        f"{url}/{request['request_id']}/move"
                        for request in requests
                        if request["worker"] not in (None, worker)
                    ]
            if not listed:
                return "nothing to move"
            try:
                reply = await http.post(listed[int(choice * len(listed))], json={"worker": worker})
            except httpx.TransportError:
                return "gateway gone"
        return str(reply.json()["outcome"]) if reply.is_success else f"refused ({reply.status_code})"


@contextlib.contextmanager
def _stopped(process: ProcessId) -> Iterator[None]:
    process.send(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send(signal.SIGCONT)
