"""The servers of one control process, in one event loop: HTTP, public gRPC and the directory."""

import asyncio
import contextlib
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import grpc
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from control_plane.config import ClusterConfig, replica_port
from control_plane.directory.memory import MemoryDirectory
from control_plane.directory.redis_directory import RedisDirectory
from control_plane.directory.redis_link import RedisLink, RedisSettings
from control_plane.directory.server import (
    SERVER_OPTIONS,
    Directory,
    DirectoryServicer,
    expire_silent,
    warn_of_other_formats,
)
from control_plane.gateway.admin import add_admin_api
from control_plane.gateway.app import create_app
from control_plane.gateway.dispatch import DispatchSettings, PoolDispatcher
from control_plane.gateway.grpc_server import add_services
from control_plane.gateway.http_protocol import GatewayProtocol
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.moves import Moves
from control_plane.gateway.pool_metrics import DirectoryMetrics, add_pool_metrics
from control_plane.gateway.rebalance import Rebalancer, RebalanceSettings
from control_plane.gateway.sessions import SessionPool, SessionSettings
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.tenancy import Tenancy, parse_weights
from control_plane.gateway.tokenizer import load_tokenizer
from control_plane.migration import MigrationLimits
from control_plane.routing.policy import RoutingPolicy
from protos import directory_pb2_grpc

HTTP_BACKLOG = 2048
LAST_WORD_S = 2.0  # for requests that are cut short at a stop, to tell their clients


class StartRefused(Exception):
    """The configuration cannot be served: the message names an address that is taken or what the model lacks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where the process listens, with the ports that the system chose."""

    http: str
    grpc: str
    directory: str


class _HttpServer(uvicorn.Server):
    """One of several servers in a process that has its own idea of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    config: ClusterConfig, *, replica: int, stop: asyncio.Event, on_ready: Callable[[Addresses], None]
) -> None:
    """Until `stop` is set; then lets running requests finish for `drain_timeout_s`. `replica` counts from 0.

    Raises StartRefused.
    """
    gateway = config.gateway
    http_port = replica_port(gateway.port, replica)
    memory = MemoryDirectory(ttl_s=config.directory.ttl_s)
    sessions = SessionPool(SessionSettings(gateway_id=f"{socket.gethostname()}:{http_port}"))
    directory, link = _directory(config, memory, sessions)
    memory.subscribe(sessions.on_change)
    memory.subscribe(warn_of_other_formats)
    dispatcher = PoolDispatcher(memory, sessions, policy=_policy(config), settings=_dispatch_settings(config))
    metrics = GatewayMetrics(CollectorRegistry())
    add_pool_metrics(metrics.registry, dispatcher=dispatcher, sessions=sessions)
    metrics.registry.register(DirectoryMetrics(memory, link))
    moves = Moves(dispatcher.running, sessions, timeout_s=config.migration.timeout_s, metrics=metrics)
    settings = GatewaySettings(
        model_path=config.model.path,
        max_body_bytes=gateway.max_body_bytes,
        stream_write_timeout_s=gateway.stream_write_timeout_s,
        tenancy=Tenancy(header=gateway.tenant_header, weights=parse_weights(gateway.tenant_weights)),
    )
    try:
        tokenizer = load_tokenizer(config.model.path)
        app = create_app(dispatcher=dispatcher, tokenizer=tokenizer, settings=settings, metrics=metrics)
        add_admin_api(app, moves, settings=settings)
    except ValueError as error:
        raise StartRefused(f"model.path: {error}") from error

    if config.transport == "unix":
        config.socket_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(_listen(gateway.host, http_port, setting="gateway.port"))
        directory_server = grpc.aio.server(options=SERVER_OPTIONS)
        stack.push_async_callback(directory_server.stop, None)
        stack.push_async_callback(sessions.close)
        public_server = grpc.aio.server(options=SERVER_OPTIONS)
        stack.push_async_callback(public_server.stop, None)
        directory_pb2_grpc.add_DirectoryServicer_to_server(
            DirectoryServicer(directory, heartbeat_s=config.directory.heartbeat_s), directory_server
        )
        health = add_services(
            public_server, dispatcher=dispatcher, tokenizer=tokenizer, settings=settings, metrics=metrics
        )
        addresses = Addresses(
            http=_url(listener),
            grpc=_listen_grpc(
                public_server,
                host=gateway.host,
                port=replica_port(gateway.grpc_port, replica),
                setting="gateway.grpc_port",
            ),
            directory=_listen_for_workers(directory_server, config, replica=replica),
        )
        await directory_server.start()
        await public_server.start()
        http_server = _HttpServer(_http_config(app, drain_timeout_s=gateway.drain_timeout_s))
        http = asyncio.create_task(http_server.serve(sockets=[listener]))
        watches = [
            asyncio.create_task(expire_silent(directory)),
            asyncio.create_task(health.follow(interval_s=settings.health_interval_s)),
        ]
        if config.migration.enabled:
            rebalancer = Rebalancer(moves, sessions, settings=_rebalance_settings(config))
            watches.append(asyncio.create_task(rebalancer.run()))
        if link is not None:
            watches.append(asyncio.create_task(link.run()))
        for task in (*watches, http):
            stack.push_async_callback(_cancel, task)
        on_ready(addresses)
        await _until_stopped(stop, (*watches, http))
        http_server.should_exit = True
        stops = (http, asyncio.ensure_future(public_server.stop(gateway.drain_timeout_s + LAST_WORD_S)))
        await asyncio.wait(stops, timeout=gateway.drain_timeout_s)
        # What still runs fails now, and its clients are told so.
        await sessions.close()
        await asyncio.gather(*stops)


def _directory(
    config: ClusterConfig, memory: MemoryDirectory, sessions: SessionPool
) -> tuple[Directory, RedisLink | None]:
    """What workers speak to. Without Redis, that is what this gateway knows."""
    if not config.directory.redis_url:
        return memory, None
    try:
        settings = RedisSettings(
            url=config.directory.redis_url,
            prefix=config.directory.redis_prefix,
            heartbeat_s=config.directory.heartbeat_s,
        )
    except ValueError as error:
        raise StartRefused(f"directory.redis_{error}") from error
    # A new id at every start, as entries are numbered from 1.
    directory = RedisDirectory(memory, gateway_id=secrets.token_hex(8), is_reached=sessions.is_ready)
    return directory, RedisLink(directory, settings)


def _policy(config: ClusterConfig) -> RoutingPolicy:
    return RoutingPolicy(
        prefill_threshold_tokens=config.routing.prefill_threshold_tokens,
        weights=asdict(config.routing.weights),
    )


def _dispatch_settings(config: ClusterConfig) -> DispatchSettings:
    return DispatchSettings(
        max_concurrent_requests=config.gateway.max_concurrent_requests,
        max_queued_requests=config.gateway.max_queued_requests,
        max_queued_per_tenant=config.gateway.max_queued_per_tenant,
        request_timeout_s=config.gateway.request_timeout_s,
        worker_wait_s=config.gateway.worker_wait_s,
    )


def _rebalance_settings(config: ClusterConfig) -> RebalanceSettings:
    migration = config.migration
    limits = MigrationLimits(
        low_freeness=migration.low_freeness, high_freeness=migration.high_freeness, rest_s=migration.rest_s
    )
    return RebalanceSettings(limits=limits, interval_s=migration.interval_s)


def _http_config(app: FastAPI, *, drain_timeout_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=GatewayProtocol,
        ws="none",
        loop="none",  # it runs in ours
        lifespan="off",
        log_config=None,
        access_log=False,  # gateway.timeline writes a line per request
        server_header=False,
        backlog=HTTP_BACKLOG,
        timeout_graceful_shutdown=math.ceil(drain_timeout_s + LAST_WORD_S),
    )


def _listen(host: str, port: int, *, setting: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=HTTP_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise StartRefused(f"{setting}: cannot listen on {host}:{port}: {reason}") from error


def _listen_for_workers(server: grpc.aio.Server, config: ClusterConfig, *, replica: int) -> str:
    if config.transport == "tcp":
        port = replica_port(config.directory.port, replica)
        return _listen_grpc(server, host=config.directory.host, port=port, setting="directory.port")
    address = config.directory_addresses[replica]
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartRefused(f"run_dir: cannot listen on {address}") from error
    return address


def _listen_grpc(server: grpc.aio.Server, *, host: str, port: int, setting: str) -> str:
    # gRPC does not say why it cannot have a port, and says so in lines of its own; a socket tells.
    _listen(host, port, setting=setting).close()
    try:
        port = server.add_insecure_port(f"{_bracketed(host)}:{port}")
    except RuntimeError as error:
        raise StartRefused(f"{setting}: cannot listen on {host}:{port}") from error
    return f"{_bracketed(host)}:{port}"


def _url(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    return f"http://{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _until_stopped(stop: asyncio.Event, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raises what ended one of `tasks`, if one ends before: without any of them we would serve, but wrongly."""
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait((stopped, *tasks), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await _cancel(stopped)


async def _cancel(task: asyncio.Task[object]) -> None:
    task.cancel()
    await asyncio.wait((task,))
