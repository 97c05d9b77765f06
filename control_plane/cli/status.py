"""`penstock status`: processes by the state file, load by the directory, health by the gateway."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from control_plane.cli import options
from control_plane.cli.failures import FAILED, clean_errors
from control_plane.runtimes.state import ProcessState, RunState, read_state

if TYPE_CHECKING:
    from rich.table import Table

    from control_plane.cli.members import MemberLoad

_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One process. `health` is what is true now: the state file of a killed launcher tells of better days."""

    process: ProcessState
    health: str
    member: "MemberLoad | None"


def status(
    config: options.ConfigOption = None,
    run_dir: options.RunDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for programs.")] = False,
) -> None:
    """Show who is there, how busy and how healthy. The exit code is 0 if the cluster serves, else 1."""
    with clean_errors():
        from control_plane.cli.gateways import warn_without_redis

        directory = options.load(config, run_dir).run_dir
        state = read_state(directory)
        if state is None:
            raise options.nothing_runs(directory)
        rows, gateways = inspect(state)
        if as_json:
            print(json.dumps(_as_json(state, rows, gateways), indent=1))
        else:
            _print(state, rows, gateways)
        if state.launcher.is_alive():
            warn_without_redis(state.gateways)
        if any(health != "ready" for health in gateways):
            raise typer.Exit(FAILED)


def inspect(state: RunState) -> tuple[list[Row], list[str]]:
    """A row for each process, and how each gateway is: "ready", "not ready" or why it cannot be asked."""
    from control_plane.cli.gateways import ask_health
    from control_plane.cli.members import fetch_members

    if not state.launcher.is_alive():
        gateways = ["dead: the launcher was killed; penstock down clears up"] * len(state.gateways)
        members = None
    else:
        gateways = [ask_health(gateway) for gateway in state.gateways]
        addresses = [gateway.directory_address for gateway in state.gateways]
        members = fetch_members(addresses, timeout_s=_TIMEOUT_S)
    by_name = {member.worker_id: member for member in members or ()}
    rows = []
    for process in state.processes:
        member = by_name.get(process.name)
        health = _health(process, is_member=member is not None or not process.pool, known=members is not None)
        if member is not None and member.is_draining:
            health = "draining"
        rows.append(Row(process=process, health=health, member=member))
    return rows, gateways


def _health(process: ProcessState, *, is_member: bool, known: bool) -> str:
    if process.process_id is None or not process.process_id.is_alive():
        return process.status.value if process.process_id is None else "dead"
    if process.status.value == "ready" and known and not is_member:
        return "not in the directory"
    return process.status.value


def _as_json(state: RunState, rows: list[Row], gateways: list[str]) -> dict[str, object]:
    return {
        "model": state.model,
        "gateways": [
            {**asdict(gateway), "health": health}
            for gateway, health in zip(state.gateways, gateways, strict=True)
        ],
        "launcher_pid": state.launcher.pid,
        "processes": [
            {
                "name": row.process.name,
                "pool": row.process.pool or None,
                "health": row.health,
                "detail": row.process.detail,
                "pid": row.process.process_id.pid if row.process.process_id else None,
                "cores": row.process.cores,
                "num_restarts": row.process.num_restarts,
                "log_path": row.process.log_path,
                "load": asdict(row.member) if row.member else None,
            }
            for row in rows
        ],
    }


def _print(state: RunState, rows: list[Row], gateways: list[str]) -> None:
    from rich.console import Console

    for gateway, health in zip(state.gateways, gateways, strict=True):
        print(f"{state.model} at {gateway.http_url}/v1 (gRPC {gateway.grpc_address}): {health}")
    print()
    Console().print(_table(rows))
    # Not in the table, whose columns are narrow: there are commands in it, to be copied.
    for row in rows:
        if remark := _remark(row.process):
            print(f"{row.process.name}: {remark}")


def _table(rows: list[Row]) -> "Table":
    from rich.table import Table

    from control_plane.cli.console import format_cores

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("process", "health", "pid", "cores"):
        table.add_column(title, no_wrap=True)
    for title in ("running", "waiting", "pages used", "leases"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        process_id, member = row.process.process_id, row.member
        load = ["", "", "", ""]
        if member:
            load = [
                str(member.num_running),
                str(member.num_waiting),
                _pages_used(member),
                str(member.num_leases),
            ]
        table.add_row(
            row.process.name,
            row.health,
            str(process_id.pid) if process_id else "",
            format_cores(row.process.cores),
            *load,
        )
    return table


def _pages_used(member: "MemberLoad") -> str:
    # What a store reports as pages are blocks in memory, which penstock cache shows.
    return "-" if member.role == "store" else f"{member.num_pages - member.num_free_pages}/{member.num_pages}"


def _remark(process: ProcessState) -> str:
    restarts = f"restarts: {process.num_restarts}" if process.num_restarts else ""
    return "; ".join(filter(None, [process.detail, restarts]))
