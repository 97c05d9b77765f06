"""Talks to a worker directly, past the gateway: what remains is what the gateway adds."""

import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc

from protos import directory_pb2, directory_pb2_grpc, worker_pb2, worker_pb2_grpc

DEADLINE_S = 30.0


async def watch_workers(run_dir: Path) -> AsyncIterator[list[worker_pb2.WorkerDescription]]:
    """The workers that the cluster's directory knows, now and after every change."""
    workers: dict[str, worker_pb2.WorkerDescription] = {}
    async with grpc.aio.insecure_channel(f"unix:{run_dir / 'sockets' / 'directory.sock'}") as channel:
        stub = directory_pb2_grpc.DirectoryStub(channel)
        async for event in stub.Watch(directory_pb2.WatchRequest(), timeout=DEADLINE_S):
            if event.kind == directory_pb2.WatchEvent.LEFT:
                workers.pop(event.worker.worker_id, None)
            elif event.worker.worker_id:
                workers[event.worker.worker_id] = event.worker
            yield list(workers.values())


async def find_worker(run_dir: Path, role: "worker_pb2.Role.ValueType") -> worker_pb2.WorkerDescription:
    """The first worker of `role` that the cluster's directory knows."""
    async for workers in watch_workers(run_dir):
        for worker in workers:
            if worker.role == role:
                return worker
    raise RuntimeError(f"no worker of role {role} in the directory")


class DirectSession:
    """One Session stream; requests one after the other."""

    def __init__(self, worker: worker_pb2.WorkerDescription) -> None:
        self._channel = grpc.aio.insecure_channel(worker.control_address)
        self._stream = worker_pb2_grpc.WorkerStub(self._channel).Session()  # type: ignore[call-arg]  # as in sessions.py
        self._worker = worker

    async def open(self) -> None:
        hello = worker_pb2.Hello(
            gateway_id="bench",
            worker_epoch=self._worker.epoch,
            model_fingerprint=self._worker.model.fingerprint,
        )
        await self._stream.write(worker_pb2.SessionRequest(hello=hello))
        await self._stream.read()

    async def time_to_first_token(
        self, prompt: list[int], *, request_id: str, kv_holders: Sequence[worker_pb2.KvHolder] = ()
    ) -> float:
        """Seconds from the submission of a one-token request to its token."""
        sampling = worker_pb2.SamplingParams(
            max_tokens=1, ignore_eos=True, top_p=1.0, repetition_penalty=1.0, temperature=0.0
        )
        submit = worker_pb2.Submit(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=sampling,
            arrival_unix_s=time.time(),
            kv_holders=kv_holders,
        )
        started_s = time.perf_counter()
        await self._stream.write(worker_pb2.SessionRequest(submit=submit))
        while True:
            event = await self._stream.read()
            if not isinstance(event, worker_pb2.SessionEvent):
                raise RuntimeError("the worker ended the session")
            for output in event.step.outputs:
                if output.failure.message:
                    raise RuntimeError(output.failure.message)
                if output.token_ids:
                    return time.perf_counter() - started_s

    async def close(self) -> None:
        self._stream.cancel()
        await self._channel.close(None)
