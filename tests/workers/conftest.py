"""A tiny random checkpoint, real workers over it in this process, and a gateway's end of their sessions."""

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
import torch
import transformers

from protos import worker_pb2, worker_pb2_grpc
from tests.workers.loading_ends import PROMPT, End, running_end
from tests.workers.worker_process import WorkerProcess
from workers.config import Role, WorkerConfig
from workers.drain import Drain
from workers.engine.engine import Engine, load_engine
from workers.errors import EngineFailed
from workers.identity import Identity
from workers.worker import Worker

VOCAB_SIZE = 260
EOS_TOKEN_ID = 1
TIMEOUT_S = 30.0


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small layers whose greedy output is not one token again and again."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.5, eos_token_id=EOS_TOKEN_ID,
        bos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *sorted(alphabet)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@dataclass(kw_only=True)
class RunningWorker:
    worker: Worker
    engine: Engine
    identity: Identity
    stop: asyncio.Event
    drain: Drain
    task: "asyncio.Task[None]"

    async def end(self) -> None:
        """Idempotent. Raises what made the worker end before we asked it to."""
        self.stop.set()
        async with asyncio.timeout(TIMEOUT_S):
            await self.task

    async def settled(self) -> None:
        """Nothing is here any more, and the books are right."""
        settled = asyncio.create_task(self.worker.loop.settled())
        done, _ = await asyncio.wait(
            {settled, self.task}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        settled.cancel()
        if self.task in done:
            self.task.result()
        assert settled in done, "requests or pulls are left"
        self.worker.state.check()
        load = self.worker.state.load()
        assert (load.num_running, load.num_waiting, load.num_leases) == (0, 0, 0)
        assert load.num_free_pages == load.num_pages
        assert self.worker.exports.num_open == 0


StartWorker = Callable[..., Awaitable[RunningWorker]]


@pytest.fixture
async def start_worker(checkpoint: Path) -> AsyncIterator[StartWorker]:
    """start_worker(role, **settings): one more worker, stopped at the end of the test."""
    async with contextlib.AsyncExitStack() as stack:
        numbers = itertools.count()

        async def end_quietly(running: RunningWorker) -> None:
            with contextlib.suppress(EngineFailed):  # a test that provokes it looks at it
                await running.end()

        async def start(role: Role = Role.MIXED, **settings: Any) -> RunningWorker:
            defaults = {
                "role": role, "worker_id": f"{role.value}-{next(numbers)}", "model_path": checkpoint,
                "model_name": "tiny", "num_pages": 64, "max_num_seqs": 16, "max_num_batched_tokens": 64,
            }  # fmt: skip
            config = WorkerConfig(**(defaults | settings))
            engine = load_engine(model_path=checkpoint, num_pages=config.num_pages, compute=config.compute)
            worker, stop, drain = Worker(config, engine), asyncio.Event(), Drain(timeout_s=TIMEOUT_S)
            ready: asyncio.Future[Identity] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(worker.serve(stop=stop, drain=drain, on_ready=ready.set_result))
            await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            running = RunningWorker(
                worker=worker, engine=engine, identity=ready.result(), stop=stop, drain=drain, task=task
            )
            stack.push_async_callback(end_quietly, running)
            return running

        yield start


@pytest.fixture
async def start_process(checkpoint: Path) -> AsyncIterator[Callable[..., Awaitable[WorkerProcess]]]:
    """start_process(flag=value, ...): defaults make a small mixed worker; a flag that is None is left out."""
    started: list[WorkerProcess] = []

    async def start(*more: str, **flags: Any) -> WorkerProcess:
        defaults = {
            "role": "mixed", "worker_id": "w", "model_path": checkpoint, "model_name": "tiny", "num_pages": 64,
            "max_num_seqs": 16, "max_num_batched_tokens": 64,
        }  # fmt: skip
        settings = {name: value for name, value in (defaults | flags).items() if value is not None}
        words = [str(w) for name, value in settings.items() for w in (f"--{name.replace('_', '-')}", value)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "workers", *words, *more, stderr=asyncio.subprocess.PIPE
        )
        started.append(WorkerProcess(process))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
        await worker.ended()


@dataclass
class Answer:
    """All that came of one request. Token numbers must go on without gap or repeat."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[worker_pb2.TokenLogprobs] = field(default_factory=list)
    outputs: list[worker_pb2.Output] = field(default_factory=list)
    first_token_number: int | None = None
    began: asyncio.Event = field(default_factory=asyncio.Event)  # the first token is here
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def last(self) -> worker_pb2.Output:
        return self.outputs[-1]

    @property
    def finish_reason(self) -> str:
        return worker_pb2.FinishReason.Name(self.last.finish_reason).removeprefix("FINISH_").lower()

    def take(self, output: worker_pb2.Output) -> None:
        assert not self.ended.is_set(), f"{output.request_id} said something after its end"
        self.outputs.append(output)
        if output.token_ids:
            if self.first_token_number is None:
                self.first_token_number = output.first_token_number
            assert output.first_token_number == self.first_token_number + len(self.token_ids)
            self.token_ids.extend(output.token_ids)
            self.logprobs.extend(output.logprobs)
            self.began.set()
        if output.finish_reason != worker_pb2.FINISH_NONE:
            self.ended.set()

    async def wait(self) -> "Answer":
        async with asyncio.timeout(TIMEOUT_S):
            await self.ended.wait()
        return self


class Session:
    """A gateway's end of one session."""

    def __init__(self, identity: Identity, options: Sequence[tuple[str, int]] = ()) -> None:
        self._channel = grpc.aio.insecure_channel(identity.control_address, options=options)
        self.call = worker_pb2_grpc.WorkerStub(self._channel).Session(timeout=TIMEOUT_S)
        self._identity = identity
        self._reader: asyncio.Task[None] | None = None
        self.answers: dict[str, Answer] = {}
        self.num_steps = 0

    async def open(self, **hello: Any) -> worker_pb2.WorkerDescription:
        facts = {
            "gateway_id": "test", "worker_epoch": self._identity.epoch,
            "model_fingerprint": self._identity.fingerprint,
        }  # fmt: skip
        await self.call.write(worker_pb2.SessionRequest(hello=worker_pb2.Hello(**(facts | hello))))
        event = await self.call.read()
        assert event.WhichOneof("event") == "welcome"
        return event.welcome.worker

    def listen(self) -> None:
        self._reader = asyncio.create_task(self._read())

    async def submit(
        self,
        request_id: str,
        prompt: list[int],
        *,
        kv_source: Identity | None = None,
        is_live: bool = False,
        **fields: Any,
    ) -> Answer:
        """`fields` of Submit and of SamplingParams together."""
        names = worker_pb2.SamplingParams.DESCRIPTOR.fields_by_name
        neutral = {"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 8}
        sampling = neutral | {name: value for name, value in fields.items() if name in names}
        rest = {name: value for name, value in fields.items() if name not in names}
        if kv_source is not None:
            rest["kv_source"] = worker_pb2.KvSource(
                worker_id=kv_source.worker_id, epoch=kv_source.epoch,
                control_address=kv_source.control_address, request_id=request_id, is_live=is_live,
            )  # fmt: skip
        submit = worker_pb2.Submit(
            request_id=request_id, prompt_token_ids=prompt, arrival_unix_s=time.time(),
            sampling=worker_pb2.SamplingParams(**sampling), **rest,
        )  # fmt: skip
        answer = self.answers[request_id] = Answer()
        await self.call.write(worker_pb2.SessionRequest(submit=submit))
        return answer

    async def abort(self, request_id: str) -> None:
        await self.call.write(worker_pb2.SessionRequest(abort=worker_pb2.Abort(request_id=request_id)))

    async def close(self) -> None:
        self.call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader})
        await self._channel.close()

    async def status(self) -> grpc.StatusCode:
        """With which the worker ended the session."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.call.code()

    async def _read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (event := await self.call.read()) is not grpc.aio.EOF:
                self.num_steps += 1
                for output in event.step.outputs:
                    self.answers[output.request_id].take(output)


OpenSession = Callable[[RunningWorker], Awaitable[Session]]


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Session]]:
    """connect(identity, channel options): a session whose hello has not been sent, closed at the end of the test."""
    async with contextlib.AsyncExitStack() as stack:

        def make(identity: Identity, options: Sequence[tuple[str, int]] = ()) -> Session:
            session = Session(identity, options)
            stack.push_async_callback(session.close)
            return session

        yield make


@pytest.fixture
async def open_session(connect: Callable[..., Session]) -> OpenSession:
    """open_session(worker): an open session that reads."""

    async def make(running: RunningWorker) -> Session:
        session = connect(running.identity)
        await session.open()
        session.listen()
        return session

    return make


@pytest.fixture
async def end(checkpoint: Path) -> AsyncIterator[End]:
    async with running_end(checkpoint) as one:
        yield one


@pytest.fixture
async def truth(end: End) -> list[int]:
    """The answer to PROMPT, computed; its blocks are in memory, and with the peer, and in no page."""
    tokens, _ = await end.answer(PROMPT)
    await end.settled()
    end.give_to(end.peer)
    end.state.drop(None)
    return tokens


@pytest.fixture
async def fetching(end: End, truth: list[int]) -> list[int]:
    """The same, but only the peer has the blocks."""
    await end.store.drop(None)
    return truth
