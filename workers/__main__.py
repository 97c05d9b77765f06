"""`python -m workers`: one worker process.

    python -m workers --role mixed --worker-id w0 --model-path models/demo --model-name demo

Every flag is a field of `WorkerConfig`. Logs are JSON lines on stderr; the events `loading_kernels`, `loading`,
`ready` (with the addresses), `draining` and `stopped` are for whoever started the process. SIGTERM or SIGINT drains it,
as the RPC `Drain` does (workers/drain.py); a second signal stops it at once. It ends with 0 if it finished all it had,
with 3 if it did not (`stopped` says what it left), with 2 for a configuration, an address, a checkpoint or a disk tier
that cannot be used, with 1 after a crash.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from enum import Enum
from typing import Any, Protocol

import uvloop

from kvstore.errors import TierUnusable
from workers.config import Role, WorkerConfig, setting_help
from workers.drain import Drain, Left
from workers.errors import CannotListen, CheckpointError
from workers.identity import Identity
from workers.logs import log_event, start_logging

EXIT_CRASHED, EXIT_REFUSED, EXIT_LEFT = 1, 2, 3

_logger = logging.getLogger("workers")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. Does not return for flags that argparse refuses: it exits with 2 itself."""
    parser = _parser()
    try:
        config = WorkerConfig(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))
    start_logging(config.log_level)
    # Until there is an event loop to stop, there is nothing to clean up.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    # Modules are not garbage: to look for it among the objects of torch and numba, again and again while they come,
    # took 0.3 of 1.9 s (2 Xeon cores).
    gc.disable()
    try:
        serve = _load_store(config) if config.role is Role.STORE else _load_worker(config)
    except (CheckpointError, ValueError, OSError) as error:
        return _refuse(error)
    # What was imported stays: a full collection that goes through torch's objects too stops all threads for 150 ms,
    # without them for 15 (16,384 blocks found on disk).
    gc.freeze()
    gc.enable()
    try:
        # A step of few tokens takes a millisecond: uvloop saves a tenth of what the loop adds to it.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            left = runner.run(_until_stopped(serve, drain_timeout_s=config.drain_timeout_s))
    except (CannotListen, TierUnusable) as error:
        return _refuse(error)
    except Exception:
        _logger.exception("crashed")
        return EXIT_CRASHED
    if left.is_nothing:
        log_event(_logger, "stopped", num_extra_blocks=left.num_extra_blocks)
        return 0
    log_event(_logger, "stopped", level=logging.WARNING, **asdict(left))
    return EXIT_LEFT


def _refuse(error: Exception) -> int:
    log_event(_logger, "refused", level=logging.ERROR, detail=str(error))
    return EXIT_REFUSED


class _Serve(Protocol):
    """A worker's life, once its event loop runs."""

    async def __call__(
        self, *, stop: asyncio.Event, drain: Drain, on_ready: Callable[[Identity], None]
    ) -> None: ...


def _load_worker(config: WorkerConfig) -> _Serve:
    _use_cores(config)
    _check_model_path(config)
    log_event(_logger, "loading_kernels")  # compiles them where no compiled ones are at hand
    # Imported here: OpenMP and numba read their environment when they are loaded.
    from workers.engine.engine import load_engine
    from workers.engine.find_device import find_device
    from workers.engine.largest_step import LargestStep
    from workers.worker import Worker

    find_device(config.compute)
    if config.compute.backend == "numba":
        import workers.engine.cpu_engine  # noqa: F401

    log_event(_logger, "loading", model_path=config.model_path)
    engine = load_engine(
        model_path=config.model_path,
        dtype=config.dtype,
        quantize=config.quantize,
        kv_dtype=config.kv_dtype,
        num_pages=config.num_pages,
        kv_cache_bytes=config.kv_cache_bytes,
        max_model_len=config.max_model_len,
        num_threads=config.num_threads,
        compute=config.compute,
        largest_step=LargestStep(
            max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        ),
        on_progress=_progress_teller(),
    )

    async def serve(*, stop: asyncio.Event, drain: Drain, on_ready: Callable[[Identity], None]) -> None:
        await Worker(config, engine).serve(stop=stop, drain=drain, on_ready=on_ready)

    return serve


def _load_store(config: WorkerConfig) -> _Serve:
    _use_cores(config)
    _check_model_path(config)
    from workers.store_worker import StoreWorker, load_store_model

    log_event(_logger, "loading", model_path=config.model_path)
    model = load_store_model(config)

    async def serve(*, stop: asyncio.Event, drain: Drain, on_ready: Callable[[Identity], None]) -> None:
        await StoreWorker(config, model).serve(stop=stop, drain=drain, on_ready=on_ready)

    return serve


def _check_model_path(config: WorkerConfig) -> None:
    if not config.model_path.is_dir():
        raise CheckpointError(f"there is no directory {config.model_path}")


def _progress_teller() -> Callable[[float], None]:
    """Logs every tenth: a checkpoint of many layers must not fill the log."""
    told_tenths = 0

    def tell(share: float) -> None:
        nonlocal told_tenths
        if int(share * 10) > told_tenths:
            told_tenths = int(share * 10)
            log_event(_logger, "loading_weights", progress=round(share, 3))

    return tell


async def _until_stopped(serve: _Serve, *, drain_timeout_s: float) -> Left:
    """What was not finished."""
    stop, drain = asyncio.Event(), Drain(timeout_s=drain_timeout_s)
    num_signals = 0

    def stop_now_or_in_order() -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:
            stop.set()
        drain.begin()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_now_or_in_order)
    await serve(stop=stop, drain=drain, on_ready=_say_ready)
    return drain.left


def _say_ready(identity: Identity) -> None:
    log_event(
        _logger,
        "ready",
        worker_id=identity.worker_id,
        role=identity.role.value,
        epoch=identity.epoch,
        control_address=identity.control_address,
        data_address=identity.data_address,
        max_model_len=identity.max_model_len,
    )


def _use_cores(config: WorkerConfig) -> None:
    """Before any thread starts, so that all of them inherit it. Raises OSError for cores that are not there."""
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(config.num_threads)
    if config.cores:
        try:
            os.sched_setaffinity(0, config.cores)
        except OSError as error:
            there = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise OSError(f"cores {config.cores} cannot be used; there are {there}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers", allow_abbrev=False)
    explanations = setting_help()
    types_of = typing.get_type_hints(WorkerConfig)
    for setting in fields(WorkerConfig):
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=_reader(types_of[setting.name]),
            help=explanations[setting.name],
            **({"required": True} if setting.default is MISSING else {"default": setting.default}),
        )
    return parser


def _reader(setting_type: Any) -> Callable[[str], Any]:
    """Reads the text of a flag. argparse reports what it raises."""
    if isinstance(setting_type, types.UnionType):  # int | None: a flag that is given is never None
        (setting_type,) = (option for option in typing.get_args(setting_type) if option is not types.NoneType)
    if setting_type == tuple[int, ...]:
        return core_list
    if isinstance(setting_type, type) and issubclass(setting_type, Enum):
        return _choice(setting_type)
    assert callable(setting_type)
    return typing.cast(Callable[[str], Any], setting_type)


def core_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _choice(choices: type[Enum]) -> Callable[[str], Enum]:
    def read(text: str) -> Enum:
        try:
            return choices(text)
        except ValueError:
            allowed = ", ".join(str(choice.value) for choice in choices)
            raise argparse.ArgumentTypeError(f"must be one of {allowed}, got {text!r}") from None

    return read


if __name__ == "__main__":
    exit_code = main()
    sys.stderr.flush()
    # All is closed. Taking torch, numba and gRPC apart again would take seconds: measured 4 to 6 on two busy cores.
    os._exit(exit_code)
