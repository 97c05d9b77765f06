"""`penstock`, or `python -m control_plane.cli`."""

import sys
import traceback
from typing import Annotated

import typer

from control_plane.cli import cache, chat, down, drain, migrate, profile_kv, status, top, up
from control_plane.cli.failures import FAILED, say_error
from control_plane.version import penstock_version

app = typer.Typer(
    name="penstock",
    help="Disaggregated LLM serving: prefill and decode pools behind one OpenAI-compatible endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"penstock {penstock_version()}")
        raise typer.Exit


@app.callback()
def penstock(
    context: typer.Context,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="With an internal error, show where it happened.")
    ] = False,
    _is_version_wanted: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    context.obj = show_traceback


app.command(name="up")(up.up)
app.command(name="status")(status.status)
app.command(name="top")(top.top)
app.command(name="migrate")(migrate.migrate)
app.command(name="chat")(chat.chat)
app.add_typer(cache.app, name="cache")
app.command(name="drain")(drain.drain)
app.command(name="resume")(drain.resume)
app.command(name="down")(down.down)
app.command(name="profile-kv")(profile_kv.profile_kv)


def main() -> None:
    try:
        app()
    except Exception as e:  # noqa: BLE001  the root: what arrives here is a bug of ours
        if "--traceback" in sys.argv:
            traceback.print_exc()
        say_error(f"internal error: {type(e).__name__}: {e} (penstock --traceback COMMAND shows where)")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
