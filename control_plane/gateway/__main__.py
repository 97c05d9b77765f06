"""`python -m control_plane.gateway --config FILE`: the control process of a cluster.

Logs are JSON lines on stderr; the events `ready` (with the addresses) and `stopped` are for whoever started the
process. It ends with 0 after SIGTERM or SIGINT, with 2 for a configuration, an address or a model directory
that cannot be used, with 1 after a crash.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from control_plane.config import load_config
from control_plane.gateway.logs import log_event, start_logging
from control_plane.strict_yaml import ConfigError

if TYPE_CHECKING:
    from control_plane.gateway.control_process import Addresses

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CRASHED, EXIT_REFUSED = 1, 2

_logger = logging.getLogger("control_plane.gateway")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. Does not return for flags that argparse refuses: it exits with 2 itself."""
    parser = argparse.ArgumentParser(prog="python -m control_plane.gateway", allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="the YAML file of the cluster; default: all defaults")
    parser.add_argument(
        "--replica", type=int, default=0, help="which of gateway.replicas this is; default: 0"
    )
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
    except ConfigError as error:
        parser.error(str(error))
    if not 0 <= options.replica < config.gateway.replicas:
        parser.error(f"--replica is {options.replica}, but gateway.replicas is {config.gateway.replicas}")
    start_logging(config.log_level)
    for number in STOP_SIGNALS:  # until there is an event loop to stop, there is nothing to clean up
        signal.signal(number, lambda *_: sys.exit(0))
    # gRPC reads it when it is loaded. Its own lines are no JSON, and it writes one for every closed connection.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from control_plane.gateway.control_process import StartRefused, serve

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_signal(partial(serve, config, replica=options.replica, on_ready=_say_ready)))
    except StartRefused as error:
        log_event(_logger, "refused", level=logging.ERROR, detail=str(error))
        return EXIT_REFUSED
    except Exception:
        _logger.exception("crashed")
        return EXIT_CRASHED
    log_event(_logger, "stopped")
    return 0


async def _until_signal(run: Callable[..., Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    await run(stop=stop)


def _say_ready(addresses: "Addresses") -> None:
    log_event(_logger, "ready", **asdict(addresses))


if __name__ == "__main__":
    sys.exit(main())
