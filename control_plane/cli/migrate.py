"""`penstock migrate`: a running request goes on elsewhere."""

import json
from typing import Annotated, Any

import typer

from control_plane.cli import options
from control_plane.cli.failures import FAILED, clean_errors

MOVED = "moved"


def migrate(
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="As penstock top names it.")],
    to: Annotated[str, typer.Option("--to", metavar="WORKER", help="The worker that goes on with it.")],
    config: options.ConfigOption = None,
    run_dir: options.RunDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for programs.")] = False,
) -> None:
    """Move a request to another worker while it generates. The exit code is 0 if it has moved, else 1."""
    with clean_errors():
        from control_plane.cli.requests import move_request

        state = options.running_cluster(config, run_dir)
        report = move_request(state.gateways, request, worker_id=to)
        print(json.dumps(report, indent=1) if as_json else describe(report))
        if report["outcome"] != MOVED:
            raise typer.Exit(FAILED)


def describe(report: dict[str, Any]) -> str:
    """One line."""
    way = f"{report['request_id']}: {report['source']} -> {report['target']}"
    duration = f"{1000 * report['duration_s']:.0f} ms"
    if report["outcome"] == MOVED:
        gap = f"{1000 * report['gap_s']:.0f} ms between its last token there and its first here"
        return f"{way}: moved in {duration} at {report['num_tokens']} tokens, {gap}"
    detail = f": {report['detail']}" if report["detail"] else ""
    return f"{way}: {report['outcome'].replace('_', ' ')} after {duration}{detail}"
