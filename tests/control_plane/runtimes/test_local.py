import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from control_plane.config import PROJECT_ROOT, ClusterConfig
from control_plane.runtimes import service
from control_plane.runtimes.commands import Commands
from control_plane.runtimes.errors import AlreadyRunning, PortBusy, StartFailed
from control_plane.runtimes.local import LocalRuntime
from control_plane.runtimes.process_id import ProcessId, identify
from control_plane.runtimes.stale import wait_gone
from control_plane.runtimes.state import RunState, Status, read_state
from control_plane.strict_yaml import dump

MakeCommands = Callable[[dict[str, str]], Commands]


class Watcher:
    """Records every state and lets a test wait for one."""

    def __init__(self) -> None:
        self.states: list[RunState] = []
        self._changed = asyncio.Event()

    def __call__(self, state: RunState) -> None:
        self.states.append(state)
        self._changed.set()

    async def until(self, condition: Callable[[RunState], bool]) -> RunState:
        async with asyncio.timeout(20):
            while not (self.states and condition(self.states[-1])):
                self._changed.clear()
                await self._changed.wait()
        return self.states[-1]

    def process_ids(self) -> set[ProcessId]:
        return {p.process_id for state in self.states for p in state.processes if p.process_id}


def assert_nothing_left(run_dir: Path, watcher: Watcher) -> None:
    assert watcher.process_ids()
    assert not [process for process in watcher.process_ids() if process.is_alive()]
    assert [path.name for path in run_dir.iterdir()] == ["logs"]


@contextmanager
def a_taken_port_after_a_free_one() -> Iterator[int]:
    """Below the ports that the system gives to connections, or one of those could take the free one."""
    for port in range(20_000, 30_000, 2):
        with ExitStack() as both:
            try:
                free = both.enter_context(socket.create_server(("127.0.0.1", port)))
                both.enter_context(socket.create_server(("127.0.0.1", port + 1)))
            except OSError:
                continue
            free.close()
            yield port + 1
            return
    raise OSError("no two neighbouring ports are free")


def ready_event(config: ClusterConfig, name: str) -> dict[str, Any]:
    lines = (config.run_dir / "logs" / f"{name}.log").read_text().splitlines()
    (entry,) = [entry for line in lines if (entry := json.loads(line))["event"] == "ready"]
    return dict(entry)


async def test_starts_every_process_and_leaves_only_logs(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    async with LocalRuntime(config, commands=make_commands({}), on_change=watcher) as runtime:
        await runtime.start()
        state = read_state(config.run_dir)
        assert state is not None
        assert state == runtime.state()
        assert state.ready
        assert [process.name for process in state.processes] == [
            "control",
            "prefill-0",
            "decode-0",
            "decode-1",
        ]
        assert {process.status for process in state.processes} == {Status.READY}
        assert all(process.process_id and process.process_id.is_alive() for process in state.processes)
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{state.http_url}/ready")).status_code == 200
        # The URL of a Redis in it may hold a password.
        assert (config.run_dir / "effective.yaml").stat().st_mode & 0o777 == 0o600
    assert_nothing_left(config.run_dir, watcher)


async def test_loading_progress_is_seen_before_a_worker_is_ready(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    async with LocalRuntime(config, commands=make_commands({}), on_change=watcher) as runtime:
        await runtime.start()
    seen = [process for state in watcher.states for process in state.processes if process.name == "prefill-0"]
    assert any(
        p.detail == "loading weights" and p.progress == 0.5 and p.status is Status.STARTING for p in seen
    )


async def test_each_worker_stays_on_its_own_cores_with_as_many_threads(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    pools = replace(config.pools, decode=replace(config.pools.decode, replicas=1))
    config = replace(config, pools=pools)
    async with LocalRuntime(config, commands=make_commands({})) as runtime:
        await runtime.start()
        workers = [process for process in runtime.state().processes if process.pool]
        for process in workers:
            entry = ready_event(config, process.name)
            assert entry["cores"] == ",".join(map(str, process.cores))
            assert entry["omp_num_threads"] == str(len(process.cores))
    if len(os.sched_getaffinity(0)) >= 2:
        assert not set(workers[0].cores) & set(workers[1].cores)


async def test_stores_are_started_on_any_core(config: ClusterConfig, make_commands: MakeCommands) -> None:
    config = replace(config, pools=replace(config.pools, store=replace(config.pools.store, replicas=2)))
    async with LocalRuntime(config, commands=make_commands({})) as runtime:
        await runtime.start()
        stores = [process for process in runtime.state().processes if process.pool == "store"]
        assert [(store.name, store.cores) for store in stores] == [("store-0", ()), ("store-1", ())]
        assert ready_event(config, "store-1")["omp_num_threads"] == "1"
        await runtime.scale("store", 3)
        assert runtime.state().processes[-1].name == "store-2"


async def test_each_disk_tier_has_a_directory_of_its_own_that_a_stop_leaves_alone(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    decode = replace(config.pools.decode, disk_tier_bytes=None)
    config = replace(
        config, kv=replace(config.kv, disk_tier_bytes=1000), pools=replace(config.pools, decode=decode)
    )
    for _ in range(2):
        async with LocalRuntime(config, commands=make_commands({})) as runtime:
            await runtime.start()
            disk = config.run_dir / "kv" / "decode-0"
            assert disk.stat().st_mode & 0o777 == 0o700
            (disk / "segment").touch()
        assert {path.name for path in (config.run_dir / "kv").iterdir()} == {
            "prefill-0",
            "decode-0",
            "decode-1",
        }
        assert (disk / "segment").exists()


async def test_each_gateway_has_ports_and_a_directory_of_its_own(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    directory = replace(config.directory, redis_url="redis://nowhere")
    config = replace(config, gateway=replace(config.gateway, replicas=3), directory=directory)
    watcher = Watcher()
    async with LocalRuntime(config, commands=make_commands({}), on_change=watcher) as runtime:
        await runtime.start()
        state = read_state(config.run_dir)
        assert state is not None
        assert [gateway.name for gateway in state.gateways] == ["control", "control-1", "control-2"]
        assert [process.name for process in state.processes[:3]] == ["control", "control-1", "control-2"]
        assert len({gateway.directory_address for gateway in state.gateways}) == 3
        async with httpx.AsyncClient(trust_env=False) as client:
            for gateway in state.gateways:
                assert (await client.get(f"{gateway.http_url}/ready")).status_code == 200
    assert_nothing_left(config.run_dir, watcher)


async def test_a_busy_port_of_a_further_gateway_fails_the_start(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    with a_taken_port_after_a_free_one() as port:
        gateway = replace(config.gateway, replicas=2, port=port - 1)
        directory = replace(config.directory, redis_url="redis://nowhere")
        config = replace(config, gateway=gateway, directory=directory)
        with pytest.raises(PortBusy, match=rf"gateway\.port: cannot listen on 127\.0\.0\.1:{port}: "):
            async with LocalRuntime(config, commands=make_commands({})):
                pass


async def test_a_worker_that_ends_while_it_starts_fails_the_start_and_shows_its_log(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    with pytest.raises(StartFailed, match="decode-1 ended with exit code 2 before it was ready") as failure:
        async with LocalRuntime(
            config, commands=make_commands({"decode-1": "fails"}), on_change=watcher
        ) as runtime:
            await runtime.start()
    assert failure.value.log_tail[-1] == "error: load_failed reason=no such checkpoint"
    assert_nothing_left(config.run_dir, watcher)


async def test_a_program_that_does_not_exist_fails_the_start(config: ClusterConfig) -> None:
    commands = Commands(
        control=lambda path, replica: ["/nonexistent/python"], worker=lambda config, place: ["/nonexistent"]
    )
    with pytest.raises(StartFailed) as failure:
        async with LocalRuntime(config, commands=commands) as runtime:
            await runtime.start()
    assert "No such file" in failure.value.log_tail[-1]


async def test_a_worker_that_is_never_ready_fails_the_start_at_the_deadline(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    config = replace(config, start_timeout_s=1.5)
    with pytest.raises(StartFailed, match=r"prefill-0 was not ready within 1\.5 s"):
        async with LocalRuntime(
            config, commands=make_commands({"prefill-0": "never ready"}), on_change=watcher
        ) as runtime:
            await runtime.start()
    assert_nothing_left(config.run_dir, watcher)


async def test_whoever_ignores_sigterm_is_killed_with_all_it_started(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    config = replace(config, stop_timeout_s=0.3)
    commands = make_commands({"decode-0": "ignores SIGTERM", "decode-1": "has a child"})
    async with LocalRuntime(config, commands=commands, on_change=watcher) as runtime:
        await runtime.start()
        log = (config.run_dir / "logs" / "decode-1.log").read_text().splitlines()
        (pid,) = [entry["pid"] for line in log if (entry := json.loads(line))["event"] == "child_started"]
        grandchild = identify(pid)
        assert grandchild is not None
    assert await asyncio.to_thread(wait_gone, [grandchild], timeout_s=5)
    assert_nothing_left(config.run_dir, watcher)


async def test_a_forced_stop_does_not_wait_for_the_deadline(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    config = replace(config, stop_timeout_s=600.0)
    async with asyncio.timeout(30):
        async with LocalRuntime(
            config, commands=make_commands({"decode-0": "ignores SIGTERM"}), on_change=watcher
        ) as runtime:
            await runtime.start()
            runtime.force_stop()
    assert_nothing_left(config.run_dir, watcher)


async def test_a_worker_that_dies_is_started_again_after_a_pause_that_grows(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    async with LocalRuntime(config, commands=make_commands({}), on_change=watcher) as runtime:
        await runtime.start()
        for num_deaths, pause in ((1, "0.5 s"), (2, "1 s")):
            victim = runtime.state().processes[1]
            assert victim.process_id is not None
            os.kill(victim.process_id.pid, signal.SIGKILL)
            died = await watcher.until(lambda state: state.processes[1].status is Status.RESTARTING)
            assert died.processes[1].detail == f"was ended by SIGKILL; starts again in {pause}"
            back = await watcher.until(lambda state: state.processes[1].status is Status.READY)
            assert back.processes[1].num_restarts == num_deaths
            assert back.processes[1].process_id not in (None, victim.process_id)
    assert_nothing_left(config.run_dir, watcher)


async def test_a_drained_worker_stays_away_until_it_is_wanted_again(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    async with LocalRuntime(config, commands=make_commands({}), on_change=watcher) as runtime:
        await runtime.start()
        worker = runtime.state().processes[1]
        assert worker.process_id is not None
        service.take_out(config.run_dir, worker.name)
        os.kill(worker.process_id.pid, signal.SIGTERM)
        away = await watcher.until(lambda state: state.processes[1].status is Status.DRAINED)
        assert away.processes[1].detail == "penstock resume prefill-0 starts it again"
        service.put_back(config.run_dir, worker.name)
        back = await watcher.until(lambda state: state.processes[1].status is Status.READY)
        assert back.processes[1].num_restarts == 0
        service.take_out(config.run_dir, worker.name)
    assert_nothing_left(config.run_dir, watcher)


async def test_a_worker_that_ends_in_order_starts_again_and_has_not_died(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    async with LocalRuntime(config, commands=make_commands({}), on_change=watcher) as runtime:
        await runtime.start()
        for _ in range(2):  # the pause does not grow either
            worker = runtime.state().processes[1]
            assert worker.process_id is not None
            os.kill(worker.process_id.pid, signal.SIGTERM)
            away = await watcher.until(lambda state: state.processes[1].status is Status.STARTING)
            assert away.processes[1].detail == "was drained; starts again in 0.5 s"
            back = await watcher.until(lambda state: state.processes[1].status is Status.READY)
            assert back.processes[1].num_restarts == 0
    assert_nothing_left(config.run_dir, watcher)


async def test_a_worker_that_ends_in_order_before_it_is_ready_has_died(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    watcher = Watcher()
    commands = make_commands({"prefill-0": "ends at once when started again"})
    async with LocalRuntime(config, commands=commands, on_change=watcher) as runtime:
        await runtime.start()
        worker = runtime.state().processes[1]
        assert worker.process_id is not None
        os.kill(worker.process_id.pid, signal.SIGTERM)
        died = await watcher.until(lambda state: state.processes[1].status is Status.RESTARTING)
        assert died.processes[1].detail == "ended with exit code 0; starts again in 1 s"
        assert died.processes[1].num_restarts == 1
    assert_nothing_left(config.run_dir, watcher)


async def test_scale_adds_and_removes_workers(config: ClusterConfig, make_commands: MakeCommands) -> None:
    watcher = Watcher()
    async with LocalRuntime(config, commands=make_commands({}), on_change=watcher) as runtime:
        await runtime.start()
        await runtime.scale("mixed", 1)
        added = runtime.state().processes[-1]
        assert (added.name, added.status) == ("mixed-0", Status.READY)
        await runtime.scale("decode", 0)
        names = [process.name for process in runtime.state().processes]
        assert names == ["control", "prefill-0", "mixed-0"]
        await runtime.scale("decode", 1)
        assert runtime.state().processes[-1].name == "decode-2"
        with pytest.raises(ValueError, match="one of: prefill, decode, mixed"):
            await runtime.scale("decoder", 1)
        with pytest.raises(ValueError, match="negative"):
            await runtime.scale("decode", -1)
    assert_nothing_left(config.run_dir, watcher)


async def test_a_second_cluster_in_one_run_directory_is_refused(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    async with LocalRuntime(config, commands=make_commands({})) as runtime:
        await runtime.start()
        with pytest.raises(AlreadyRunning, match=str(os.getpid())):
            async with LocalRuntime(config, commands=make_commands({})):
                pass
        assert {process.status for process in runtime.state().processes} == {Status.READY}


async def test_a_busy_port_is_named_before_anything_starts(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = replace(config, gateway=replace(config.gateway, port=port))
        with pytest.raises(
            PortBusy, match=rf"gateway\.port: cannot listen on 127\.0\.0\.1:{port}: .*in use.*--port"
        ):
            async with LocalRuntime(config, commands=make_commands({})):
                pass
    assert list(config.run_dir.iterdir()) == []


LAUNCHER = """
import asyncio, os, sys
from pathlib import Path
from control_plane.config import load_config
from control_plane.runtimes.commands import Commands
from control_plane.runtimes.local import LocalRuntime

async def main():
    fake, config = sys.argv[1], load_config(Path(sys.argv[2]))
    commands = Commands(
        control=lambda path, replica: [sys.executable, fake, "control", str(path), str(replica)],
        worker=lambda config, place: [
            sys.executable, fake, "worker", f"{config.socket_dir / place.name}.control.sock", ""
        ],
    )
    async with LocalRuntime(config, commands=commands) as runtime:
        await runtime.start()
        print("started", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_when_the_launcher_is_killed_its_processes_die_and_the_next_start_clears_up(
    config: ClusterConfig, make_commands: MakeCommands
) -> None:
    config_path = config.run_dir / "cluster.yaml"
    config_path.write_text(dump(config))
    fake = str(Path(__file__).with_name("fake_process.py"))
    launcher = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        LAUNCHER,
        fake,
        str(config_path),
        stdout=asyncio.subprocess.PIPE,
        cwd=PROJECT_ROOT,
    )
    assert launcher.stdout is not None
    async with asyncio.timeout(30):
        assert await launcher.stdout.readline() == b"started\n"
    state = read_state(config.run_dir)
    assert state is not None
    process_ids = [process.process_id for process in state.processes if process.process_id]
    assert len(process_ids) == 4
    launcher.kill()
    await launcher.wait()
    assert await asyncio.to_thread(wait_gone, process_ids, timeout_s=5)
    assert read_state(config.run_dir) is not None
    config_path.unlink()

    watcher = Watcher()
    async with LocalRuntime(config, commands=make_commands({}), on_change=watcher) as runtime:
        await runtime.start()
    assert_nothing_left(config.run_dir, watcher)
