"""Where a worker is reached, whatever its role: the data plane, the gRPC server and its place in the directory."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from kvstore.addresses import Address, TcpAddress, parse_address
from kvstore.listener import Listener
from workers.agreement import SourceIdentity
from workers.config import WorkerConfig
from workers.errors import CannotListen
from workers.identity import Identity
from workers.model.info import ModelInfo
from workers.tickets import TicketDesk, TicketIssuer

DATA_IDLE_TIMEOUT_S = 5.0


@contextlib.asynccontextmanager
async def listening(
    config: WorkerConfig, issuers: Sequence[TicketIssuer], *, max_connections: int
) -> AsyncIterator[Address]:
    """Where peers connect to with their tickets. Raises CannotListen."""
    listener = Listener(
        TicketDesk(issuers).serve, max_connections=max_connections, idle_timeout_s=DATA_IDLE_TIMEOUT_S
    )
    try:
        await listener.start(parse_address(config.data_address))
    except OSError as error:
        raise CannotListen(f"cannot listen on {config.data_address}: {error}") from error
    try:
        yield listener.address
    finally:
        await listener.close()


def make_identity(
    config: WorkerConfig, model: ModelInfo, *, epoch: int, control_address: str, data_address: Address
) -> Identity:
    """With the addresses as others reach them."""
    if config.advertise_host:
        if not control_address.startswith("unix:"):
            control_address = f"{config.advertise_host}:{control_address.rpartition(':')[2]}"
        if isinstance(data_address, TcpAddress):
            data_address = TcpAddress(host=config.advertise_host, port=data_address.port)
    return Identity(
        worker_id=config.worker_id,
        epoch=epoch,
        role=config.role,
        pid=os.getpid(),
        control_address=control_address,
        data_address=str(data_address),
        model_name=config.model_name,
        fingerprint=model.fingerprint,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        layout=model.layout,
    )


def source_identity(identity: Identity) -> SourceIdentity:
    return SourceIdentity(
        epoch=identity.epoch,
        model_fingerprint=identity.fingerprint,
        layout=identity.layout,
        data_address=identity.data_address,
    )


@contextlib.asynccontextmanager
async def running(work: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that is cancelled, and awaited, at the end. What it raises is for who looks at it while it is there."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
