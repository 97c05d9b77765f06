"""`penstock top`: the cluster as it works, live."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from control_plane.cli import options
from control_plane.cli.failures import clean_errors
from control_plane.runtimes.state import RunState

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WIDTH_OF_PIPES = 200
_DIRECTORY_TIMEOUT_S = 2.0


def top(
    config: options.ConfigOption = None,
    run_dir: options.RunDirOption = None,
    interval_s: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One picture; so it is without a terminal.")] = False,
) -> None:
    """Watch pools, workers, requests and moves. Ctrl-C ends it."""
    with clean_errors():
        from rich.console import Console

        state = options.running_cluster(config, run_dir)
        console = Console()
        if once or not console.is_terminal:
            # For programs and pipes: nothing is cut, above all no id that `penstock migrate` needs.
            console.width = max(console.width, _WIDTH_OF_PIPES)
            console.print(_frame(state, num_lines=None))
        else:
            _watch(state, console, interval_s=interval_s)


def _watch(state: RunState, console: "Console", *, interval_s: float) -> None:
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(_frame(state, num_lines=console.height), refresh=True)
                time.sleep(interval_s)
        except KeyboardInterrupt:
            return


def _frame(state: RunState, *, num_lines: int | None) -> "RenderableType":
    from control_plane.cli.members import fetch_members
    from control_plane.cli.requests import fetch_requests
    from control_plane.cli.top_frame import frame

    addresses = [gateway.directory_address for gateway in state.gateways]
    members = fetch_members(addresses, timeout_s=_DIRECTORY_TIMEOUT_S)
    return frame(state.model, members, fetch_requests(state.gateways), num_lines=num_lines)
