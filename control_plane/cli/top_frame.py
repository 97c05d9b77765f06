"""One picture of `penstock top`, from what the directory and the gateways say."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from control_plane.cli.members import MemberLoad
from control_plane.cli.migrate import MOVED, describe
from control_plane.cli.requests import Requests

_MAX_MOVES = 5
_MIN_ROWS = 5  # of requests, however many workers there are
_POOLS = ("prefill", "decode", "mixed", "store")


def frame(
    model: str, members: Sequence[MemberLoad] | None, requests: Requests, *, num_lines: int | None
) -> RenderableType:
    """`num_lines`: of the screen, which requests fill as far as the rest leaves it to them; None shows all."""
    above: list[RenderableType] = [Text(f"{model}: {_count(len(requests.running), 'request')}", style="bold")]
    above += [Text(f"{name} does not answer: {why}", style="red") for name, why in requests.silent.items()]
    num_taken = len(above)
    if members is None:
        above.append(Text("no directory answers", style="red"))
        num_taken += 1
    else:
        workers = _workers(members)
        above += [Text(), workers]
        num_taken += workers.row_count + 2
    below: list[RenderableType] = []
    if requests.recent_moves:
        below += [Text(), Text("moves", style="dim"), *_moves(requests.recent_moves)]
        num_taken += len(below)
    if requests.running:
        # Beside its rows it has a blank line, a head and perhaps a caption.
        max_rows = None if num_lines is None else max(_MIN_ROWS, num_lines - num_taken - 3)
        above += [Text(), _requests(requests.running, max_rows=max_rows)]
    return Group(*above, *below)


def _workers(members: Sequence[MemberLoad]) -> Table:
    """Each pool in a line, its workers below."""
    table = _table(left=("pool", "worker"), right=("running", "waiting", "pages used", "demanded", "leases"))
    table.add_column("", no_wrap=True)
    by_pool = sorted(members, key=lambda member: (_POOLS.index(member.role), member.worker_id))
    for pool, grouped in groupby(by_pool, key=lambda member: member.role):
        workers = list(grouped)
        table.add_row(pool, _count(len(workers), "worker"), *_loads(workers), "", style="bold")
        for worker in workers:
            state = Text("draining", style="yellow") if worker.is_draining else ""
            table.add_row("", worker.worker_id, *_loads([worker]), state)
    return table


def _loads(workers: Sequence[MemberLoad]) -> Iterator[str]:
    yield str(sum(worker.num_running for worker in workers))
    yield str(sum(worker.num_waiting for worker in workers))
    num_pages = sum(worker.num_pages for worker in workers)
    num_used = num_pages - sum(worker.num_free_pages for worker in workers)
    # What a store reports as pages are blocks in memory, which penstock cache shows.
    yield "-" if workers[0].role == "store" else f"{num_used}/{num_pages}"
    yield str(sum(worker.num_demanded_pages for worker in workers))
    yield str(sum(worker.num_leases for worker in workers))


def _requests(running: Sequence[dict[str, Any]], *, max_rows: int | None) -> Table:
    table = _table(left=("request", "worker"), right=("prompt", "output", "priority", "age"))
    for request in running[:max_rows]:
        place = request["worker"] or "none yet"
        if request["moving_to"]:
            place = f"{place} -> {request['moving_to']}"
        table.add_row(
            Text(request["request_id"]),
            Text(place, style="yellow" if request["moving_to"] else ""),
            str(request["num_prompt_tokens"]),
            str(request["num_output_tokens"]),
            str(request["priority"]),
            f"{request['age_s']:.1f} s",
        )
    num_more = len(running) - table.row_count
    if num_more:
        table.caption = f"and {_count(num_more, 'younger one')}"
        table.caption_justify = "left"
    return table


def _moves(reports: Sequence[dict[str, Any]]) -> Iterator[Text]:
    for report in reversed(reports[-_MAX_MOVES:]):
        style = "" if report["outcome"] == MOVED else "yellow"
        yield Text(f"{describe(report)} ({report['reason']})", style=style)


def _table(*, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in left:
        table.add_column(title, header_style="dim", no_wrap=True)
    for title in right:
        table.add_column(title, header_style="dim", justify="right", no_wrap=True)
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
