"""`penstock cache`: what the tiers hold and how well they do; `penstock cache drop` makes them forget."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from control_plane.cli import options
from control_plane.cli.failures import FAILED, CommandFailed, clean_errors, say_error
from control_plane.strict_yaml import ConfigError

if TYPE_CHECKING:
    from control_plane.cli.tiers import Worker

app = typer.Typer(help="Show where KV is kept and how often it is found; forget some of it.")


@app.callback(invoke_without_command=True)
def cache(
    context: typer.Context,
    config: options.ConfigOption = None,
    run_dir: options.RunDirOption = None,
    num_prefixes: Annotated[
        int, typer.Option("--prefixes", min=0, max=1000, help="Show so many of the longest-lived prefixes.")
    ] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for programs.")] = False,
) -> None:
    """Show the tiers of every worker: blocks, bytes, hit rates, compression, prefixes.

    Exit code 1 if one does not answer.
    """
    if context.invoked_subcommand is not None:
        return
    with clean_errors():
        from control_plane.cli.cache_report import as_report, print_report
        from control_plane.cli.tiers import describe, find_workers

        answers = describe(find_workers(options.running_cluster(config, run_dir)), num_prefixes=num_prefixes)
        report = as_report(answers, num_prefixes=num_prefixes)
        if as_json:
            print(json.dumps(report, indent=1))
        else:
            print_report(report)
        silent = [answer for answer in answers if answer.reply is None]
        for answer in silent:
            say_error(f"{answer.worker.worker_id} does not say what it holds: {answer.failure}")
        if silent:
            raise typer.Exit(FAILED)


@app.command()
def drop(
    context: typer.Context,
    salt: Annotated[
        str | None, typer.Option(metavar="SALT", help="What was computed under this cache_salt; '' for none.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="All of the workers of this model.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of every worker.")] = False,
    worker: Annotated[str | None, typer.Option(metavar="NAME", help="Only what this worker holds.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before --all.")] = False,
    config: options.ConfigOption = None,
    run_dir: options.RunDirOption = None,
) -> None:
    """Forget KV in every tier: memory, disk and device pages that nobody uses. Running requests keep theirs."""
    with clean_errors():
        if (salt is not None) + (model is not None) + everything != 1:
            raise ConfigError("cache drop needs exactly one of --salt, --model and --all")
        if salt is not None and any("\ud800" <= character <= "\udfff" for character in salt):
            raise ConfigError(f"--salt must be text in UTF-8, got {salt!r}")
        from control_plane.cli.tiers import find_workers

        above = context.parent.params if context.parent else {}  # `penstock cache --run-dir DIR drop`
        state = options.running_cluster(config or above.get("config"), run_dir or above.get("run_dir"))
        workers = _chosen(find_workers(state), model=model, name=worker)
        if everything and not yes:
            typer.confirm(f"Forget all KV of {', '.join(one.worker_id for one in workers)}?", abort=True)
        _drop(workers, salt=salt)


def _drop(workers: "list[Worker]", *, salt: str | None) -> None:
    from control_plane.cli.tiers import drop as ask_to_drop

    failed = False
    for answer in ask_to_drop(workers, cache_salt=salt):
        if answer.reply is None:
            say_error(f"{answer.worker.worker_id} dropped nothing: {answer.failure}")
            failed = True
        else:
            print(f"{answer.worker.worker_id}: {_dropped(answer.reply.num_blocks, salt=salt)}")
    if failed:
        raise typer.Exit(FAILED)


def _dropped(num_copies: int, *, salt: str | None) -> str:
    if num_copies:
        return f"dropped {num_copies} copies of blocks, those of all tiers together"
    return "held nothing" + (" of this salt; one that nobody used is no error" if salt is not None else "")


def _chosen(workers: "list[Worker]", *, model: str | None, name: str | None) -> "list[Worker]":
    """Raises CommandFailed if nobody is left."""
    if name is not None:
        known = ", ".join(worker.worker_id for worker in workers)
        workers = [worker for worker in workers if worker.worker_id == name]
        if not workers:
            raise CommandFailed(f"there is no worker {name!r}; known here: {known or 'none'}")
    if model is not None:
        known = ", ".join(sorted({worker.model.name for worker in workers}))
        workers = [worker for worker in workers if worker.model.name == model]
        if not workers:
            raise CommandFailed(f"no worker has the model {model!r}; known here: {known or 'none'}")
    if not workers:
        raise CommandFailed("no worker is in the directory")
    return workers
