"""What `penstock up` shows: a live table while models load on a terminal, plain lines elsewhere."""

import shlex
import time
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from control_plane.config import ClusterConfig
from control_plane.runtimes.state import ProcessState, RunState, Status

_REFRESH_PER_S = 8
_BAR_WIDTH = 24
_STYLES = {
    Status.STARTING: "yellow",
    Status.READY: "green",
    Status.RESTARTING: "red",
    Status.DRAINED: "yellow",
    Status.STOPPING: "yellow",
    Status.STOPPED: "dim",
}


class Console:
    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._terminal = RichConsole()
        self._began_s = time.monotonic()
        self._shown: dict[str, tuple[Status, str]] = {}
        self._state: RunState | None = None
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if self._terminal.is_terminal:
            self._live = Live(
                get_renderable=self._table, console=self._terminal, refresh_per_second=_REFRESH_PER_S
            )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_table()

    def show(self, state: RunState) -> None:
        """Takes in a new state. The table is drawn from it in time; without one, what is new is a line."""
        self._state = state
        for process in state.processes:
            now = (process.status, process.detail)
            if self._shown.get(process.name) != now:
                self._shown[process.name] = now
                if not self._live:
                    self._print_change(process)

    def announce(self, state: RunState) -> None:
        """The table's last picture, then where the cluster serves and how to ask it."""
        self._end_table()
        print(announcement(state, num_seconds=time.monotonic() - self._began_s), flush=True)

    def stopping(self) -> None:
        self._end_table()
        print("\nStopping (Ctrl-C again kills) ...", flush=True)

    def stopped(self) -> None:
        print(f"Stopped. Logs are in {self._config.run_dir / 'logs'}", flush=True)

    def _end_table(self) -> None:
        if self._live:
            live, self._live = self._live, None
            live.stop()

    def _print_change(self, process: ProcessState) -> None:
        if process.status in (Status.STOPPING, Status.STOPPED):
            return
        log = f" (log: {process.log_path})" if process.status is Status.RESTARTING else ""
        detail = f": {process.detail}" if process.detail else ""
        print(f"{process.name:12} {process.status.value}{detail}{log}", flush=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("process", "cores", "state", ""):
            table.add_column(title, header_style="dim", no_wrap=True)
        for process in self._state.processes if self._state else ():
            style = _STYLES[process.status]
            state: Spinner | Text = Text(process.status.value, style=style)
            if process.status is Status.STARTING:
                self._spinner.update(text=Text(process.status.value), style=style)
                state = self._spinner
            table.add_row(process.name, format_cores(process.cores), state, _activity(process))
        table.caption = f"{time.monotonic() - self._began_s:.0f} s"
        table.caption_justify = "left"
        return table


def _activity(process: ProcessState) -> Table | Text:
    if process.progress is None:
        return Text(process.detail, style="dim")
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(
        ProgressBar(total=1.0, completed=process.progress, width=_BAR_WIDTH),
        Text(process.detail, style="dim"),
    )
    return row


def format_cores(cores: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) is "0-2,5"; none is "any"."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and runs[-1][-1] == core - 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "any"


def announcement(state: RunState, *, num_seconds: float | None = None) -> str:
    after = f" after {num_seconds:.1f} s" if num_seconds is not None else ""
    # A question that the demo model can answer too.
    messages = r'[{"role": "user", "content": "Repeat:\nvalue,array,after"}]'
    body = f'{{"model": "{state.model}", "stream": true, "temperature": 0, "messages": {messages}}}'
    places = "\n".join(
        f"  HTTP  {gateway.http_url}/v1\n  gRPC  {gateway.grpc_address}" for gateway in state.gateways
    )
    return f"""
Serving {state.model}{after}
{places}

curl -N {state.http_url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d {shlex.quote(body)}

from openai import OpenAI
client = OpenAI(base_url="{state.http_url}/v1", api_key="unused")
messages = {messages}
answer = client.chat.completions.create(model="{state.model}", messages=messages, temperature=0, stream=True)
for chunk in answer:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""
