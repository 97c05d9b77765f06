"""The two worker processes of bench.kv_load: a source that holds a context, and a puller at the other end of a link."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.cluster import free_port
from bench.kv_load_puller import ADAPTIVE
from bench.network import Link, shaped_link
from bench.worker_client import DirectSession
from kvstore.blocks import BLOCK_SIZE_TOKENS, DIGEST_BYTES, FORMAT_VERSION, chain_keys, root_key
from protos import kv_pb2, kv_pb2_grpc, worker_pb2, worker_pb2_grpc

RPC_TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0
HELD_TIMEOUT_S = 30.0
OBJECTIVE_S = 0.001  # nothing keeps it: the controller goes for the soonest
# A source keeps a sixteenth of its memory tier for coded chunks: all that the modes ask for, or each would push out the
# one before it and be coded anew in every round.
TIER_BYTES = 2 * 2**30
# Less than the modes write in the round that is warm-up, so that afterwards no page is touched for the first time.
KV_CACHE_BYTES = 2**29


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the two, with a session that stays open."""

    worker: worker_pb2.WorkerDescription
    session: DirectSession
    transfer: "kv_pb2_grpc.KvTransferAsyncStub"

    def keys(self, prompt: Sequence[int]) -> bytes:
        root = root_key(model_fingerprint=self.worker.model.fingerprint)
        return b"".join(chain_keys(root, prompt))


@dataclass(slots=True)
class Pair:
    link: Link
    source: Peer
    puller: Peer
    mode_file: Path
    prompt: list[int]
    num_requests: int = 0

    async def hold(self) -> float:
        """The source computes the prompt and keeps all of it in memory; how long the computing took."""
        computed_s = await self.source.session.time_to_first_token(self.prompt, request_id="context")
        keys = self.source.keys(self.prompt)
        request = kv_pb2.LookupRequest(
            source_epoch=self.source.worker.epoch, block_format=FORMAT_VERSION, block_keys=keys
        )
        async with asyncio.timeout(HELD_TIMEOUT_S):
            # Copied beside the engine's steps; nobody says when it is done.
            while (await self.source.transfer.Lookup(request)).num_blocks * DIGEST_BYTES < len(keys):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return computed_s

    async def hold_anew(self) -> None:
        """As `hold`, with nothing that was coded before."""
        await self.source.transfer.Drop(kv_pb2.DropRequest(source_epoch=self.source.worker.epoch))
        await self.hold()

    async def time_to_first_token(self, mode: str | None) -> float:
        """With the context held by the source alone; None: nobody says so, and all of it is computed."""
        await self.puller.transfer.Drop(kv_pb2.DropRequest(source_epoch=self.puller.worker.epoch))
        self.mode_file.write_text(mode or ADAPTIVE)
        holder = worker_pb2.KvHolder(
            worker_id=self.source.worker.worker_id,
            epoch=self.source.worker.epoch,
            control_address=self.source.worker.control_address,
            num_blocks=len(self.prompt) // BLOCK_SIZE_TOKENS,
        )
        self.num_requests += 1
        return await self.puller.session.time_to_first_token(
            self.prompt, request_id=f"load-{self.num_requests}", kv_holders=[holder] if mode else []
        )


@contextlib.asynccontextmanager
async def running_pair(
    directory: Path, *, model: Path, prompt: list[int], max_level: int
) -> AsyncIterator[Pair]:
    """Both processes, in a fresh `directory`. They and the link are gone afterwards."""
    cores = sorted(os.sched_getaffinity(0))
    mode_file, data_port = directory / "mode", free_port()
    mode_file.write_text(ADAPTIVE)
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(shaped_link(data_port=data_port))
        common = [
            "--role",
            "mixed",
            "--model-path",
            str(model),
            "--model-name",
            "bench",
            "--log-level",
            "info",
        ]
        common += ["--memory-tier-bytes", str(TIER_BYTES), "--kv-cache-bytes", str(KV_CACHE_BYTES)]
        common += ["--max-level", str(max_level), "--ttft-objective-s", str(OBJECTIVE_S)]
        source_address, puller_address = (f"unix:{directory / name}.sock" for name in ("source", "puller"))
        source = [
            *link.source_prefix, sys.executable, "-m", "workers", *common, *link.source_flags,
            "--worker-id", "source", "--control-address", source_address,
            "--data-address", f"tcp://{link.source_host}:{data_port}", "--cores", str(cores[0]),
        ]  # fmt: skip
        puller = [
            *link.puller_prefix, sys.executable, "-m", "bench.kv_load_puller", str(mode_file), *common,
            "--worker-id", "puller", "--control-address", puller_address, "--cores", str(cores[-1]),
        ]  # fmt: skip
        stack.enter_context(_process(source, directory / "source.log"))
        stack.enter_context(_process(puller, directory / "puller.log"))
        async with _peer(source_address) as source_peer, _peer(puller_address) as puller_peer:
            yield Pair(link, source_peer, puller_peer, mode_file, prompt)


@contextlib.contextmanager
def _process(command: Sequence[str], log_path: Path) -> Iterator[None]:
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, log_path)
        yield
    finally:
        process.terminate()
        process.wait(RPC_TIMEOUT_S)


def _wait_until_ready(process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        for _ in range(int(START_TIMEOUT_S / 0.1)):
            if any(json.loads(line)["event"] == "ready" for line in _json_lines(log_path)):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
                break
    raise RuntimeError(f"{process.args!r} did not become ready:\n{log_path.read_text()[-3000:]}")


def _json_lines(path: Path) -> Iterator[str]:
    return (line for line in path.read_text().splitlines() if line.startswith("{"))


@contextlib.asynccontextmanager
async def _peer(control_address: str) -> AsyncIterator[Peer]:
    async with grpc.aio.insecure_channel(control_address) as channel:
        worker = await worker_pb2_grpc.WorkerStub(channel).Describe(
            worker_pb2.DescribeRequest(), timeout=RPC_TIMEOUT_S
        )
        session = DirectSession(worker)
        await session.open()
        try:
            yield Peer(worker, session, kv_pb2_grpc.KvTransferStub(channel))
        finally:
            await session.close()
