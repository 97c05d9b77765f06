"""`penstock up`: starts a cluster on this machine and stays until Ctrl-C."""

import asyncio
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from control_plane.cli import options
from control_plane.cli.failures import clean_errors
from control_plane.config import ClusterConfig
from control_plane.runtimes.commands import Commands

INTERRUPTED = 130


def up(
    config: options.ConfigOption = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Checkpoint in Hugging Face's layout. (default: the demo model)"),
    ] = None,
    model_name: Annotated[str | None, typer.Option(metavar="NAME", help="The name clients use.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="int8 on a CPU; w8a16, w4a16 or fp8 on a GPU. (default: none)"),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option("--kv-dtype", metavar="KIND", help="KV in int8 or fp8, on a GPU. (default: auto)"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N, of all pools. (default: cpu)")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve on. (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one. (default: 8000)")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="gRPC port; 0 takes a free one. (default: 8001)")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Number of prefill workers. (default: 1)")] = None,
    decode: Annotated[int | None, typer.Option(help="Number of decode workers. (default: 1)")] = None,
    mixed: Annotated[int | None, typer.Option(help="Number of workers for both. (default: 0)")] = None,
    store: Annotated[
        int | None, typer.Option(help="Number of workers that only keep KV for the others. (default: 0)")
    ] = None,
    run_dir: options.RunDirOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any setting, as pools.decode.num_pages=4096. Repeatable."
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it serves; see penstock down.")
    ] = False,
) -> None:
    """Serve a model: a gateway, prefill workers and decode workers, as processes on this machine."""
    overrides = [
        *(settings or []),
        *options.assignments(
            model__path=model,
            model__name=model_name,
            model__quantize=quantize,
            model__kv_dtype=kv_dtype,
            pools__prefill__device=device,
            pools__decode__device=device,
            pools__mixed__device=device,
            gateway__host=host,
            gateway__port=port,
            gateway__grpc_port=grpc_port,
            pools__prefill__replicas=prefill,
            pools__decode__replicas=decode,
            pools__mixed__replicas=mixed,
            pools__store__replicas=store,
        ),
    ]
    with clean_errors():
        cluster = options.load(config, run_dir, overrides)
        if detach:
            from control_plane.cli.detach import start_detached

            start_detached(cluster)
            return
        if not asyncio.run(serve(cluster)):
            raise typer.Exit(INTERRUPTED)


async def serve(config: ClusterConfig, *, commands: Commands | None = None) -> bool:
    """Runs the cluster until SIGINT, SIGTERM or SIGHUP; a second one kills. False if it never served."""
    from control_plane.cli.console import Console
    from control_plane.cli.gateways import warn_without_redis
    from control_plane.runtimes.local import LocalRuntime

    check_model(config.model.path)
    check_disk_key(config)
    console = Console(config)
    runtime = LocalRuntime(config, commands=commands, on_change=console.show)
    asked_to_stop = asyncio.Event()

    def stop_now_or_harder() -> None:
        if asked_to_stop.is_set():
            runtime.force_stop()
        asked_to_stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop_now_or_harder)
    with console:
        async with runtime:
            served = await _start_unless(asked_to_stop, runtime.start())
            if served:
                console.announce(runtime.state())
                await asyncio.to_thread(warn_without_redis, runtime.state().gateways)
                await asked_to_stop.wait()
            console.stopping()
        console.stopped()
    return served


async def _start_unless(asked_to_stop: asyncio.Event, start: Coroutine[Any, Any, None]) -> bool:
    starting = asyncio.create_task(start)
    waiting = asyncio.create_task(asked_to_stop.wait())
    try:
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            return True
        return False
    finally:
        for task in (starting, waiting):
            task.cancel()
        await asyncio.wait({starting, waiting})


def check_model(path: Path) -> None:
    """Raises ConfigError before anything starts; whether the checkpoint is sound, the workers find out."""
    from control_plane.strict_yaml import ConfigError

    if not path.is_dir():
        raise ConfigError(f"model.path is {path}, but there is no such directory: name one with --model DIR")
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"model.path is {path}, but it has no config.json: it must be a checkpoint's directory"
        )


def check_disk_key(config: ClusterConfig) -> None:
    """Raises ConfigError before anything starts, without what the key is, if some worker needs it."""
    from control_plane.strict_yaml import ConfigError
    from kvstore.tiers.seal import resolve_key

    on_disk = (pool.replicas and config.kv.disk_bytes(pool) for pool in config.pools.by_name().values())
    if not config.kv.disk_key or not any(on_disk):
        return
    try:
        resolve_key(config.kv.disk_key)
    except ValueError as e:
        raise ConfigError(f"kv.disk_key: {e}") from e
