"""From an error to one line on stderr and an exit code: 2 for what the user typed or configured, 1 for what failed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from control_plane.runtimes.errors import RuntimeFailure, StartFailed
from control_plane.strict_yaml import ConfigError

FAILED = 1
USAGE = 2
LEFT = 3  # done, but a drained worker had to leave something
_PREFIX = "penstock: "


class CommandFailed(Exception):
    """A command cannot do what it was asked; the message is for the person at the terminal."""


@contextmanager
def clean_errors() -> Iterator[None]:
    """Ends the command with a message and never with a traceback, whatever a user or the machine can cause."""
    try:
        yield
    except ConfigError as e:
        say_error(str(e))
        raise typer.Exit(USAGE) from e
    except StartFailed as e:
        say_error(str(e))
        if e.log_tail:
            print("The end of its log:", file=sys.stderr)
            for line in e.log_tail:
                print(f"  {line}", file=sys.stderr)
        raise typer.Exit(FAILED) from e
    except (RuntimeFailure, CommandFailed) as e:
        say_error(str(e))
        raise typer.Exit(FAILED) from e
    except OSError as e:
        place = f"{e.filename}: " if e.filename else ""
        say_error(f"{place}{e.strerror or e}")
        raise typer.Exit(FAILED) from e


def say_error(message: str) -> None:
    print(f"{_PREFIX}{message}", file=sys.stderr, flush=True)


def is_error(line: str) -> bool:
    """One that `say_error` began."""
    return line.startswith(_PREFIX)
