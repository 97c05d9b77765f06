"""A worker as a process of its own, started with the flags a test wants."""

import asyncio
import contextlib
import json
from typing import Any

import grpc

from kvstore.layout import KvLayout
from protos import worker_pb2, worker_pb2_grpc
from workers.config import Role
from workers.identity import Identity

TIMEOUT_S = 60.0


class WorkerProcess:
    """`python -m workers` with the flags given, its log read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[str] = []

    async def event(self, name: str) -> dict[str, Any]:
        """The next event of this name in the log."""
        assert self.process.stderr is not None
        async with asyncio.timeout(TIMEOUT_S):
            while line := (await self.process.stderr.readline()).decode():
                self.log.append(line)
                if line.startswith("{") and (event := json.loads(line))["event"] == name:
                    assert isinstance(event, dict)
                    return event
        raise AssertionError(f"no event {name!r} in the log:\n{''.join(self.log)}")

    async def ready(self) -> Identity:
        """What sessions need to know of it."""
        event = await self.event("ready")
        async with grpc.aio.insecure_channel(event["control_address"]) as channel:
            worker = await worker_pb2_grpc.WorkerStub(channel).Describe(
                worker_pb2.DescribeRequest(), timeout=10.0
            )
        return Identity(
            worker_id=worker.worker_id, epoch=worker.epoch, role=Role(event["role"]), pid=worker.pid,
            control_address=worker.control_address, data_address=worker.data_address,
            model_name=worker.model.name, fingerprint=worker.model.fingerprint,
            max_model_len=worker.model.max_model_len, vocab_size=worker.model.vocab_size,
            layout=KvLayout(
                num_layers=worker.model.layout.num_layers, num_kv_heads=worker.model.layout.num_kv_heads,
                head_dim=worker.model.layout.head_dim, dtype=worker.model.layout.dtype,
            ),
        )  # fmt: skip

    async def ended(self) -> int:
        """The exit code; the rest of the log is read."""
        assert self.process.stderr is not None
        async with asyncio.timeout(TIMEOUT_S):
            self.log.append((await self.process.stderr.read()).decode())
            return await self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
