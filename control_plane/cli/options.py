"""Options that several commands share, and the settings they mean."""

import json
from pathlib import Path
from typing import Annotated

import typer

from control_plane.cli.failures import CommandFailed
from control_plane.config import ClusterConfig, load_config
from control_plane.runtimes.state import RunState, read_state

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="YAML file with settings of the cluster."),
]
RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", metavar="DIR", help="Where the cluster keeps logs, state and sockets. (default: run)"
    ),
]


def assignments(**flags: object) -> list[str]:
    """Overrides for the flags that were given: `gateway__port=8001` stands for `gateway.port=8001`."""
    given = ((name.replace("__", "."), value) for name, value in flags.items() if value is not None)
    return [f"{key}={json.dumps(value) if isinstance(value, str) else value}" for key, value in given]


def load(config: Path | None, run_dir: Path | None, overrides: list[str] | None = None) -> ClusterConfig:
    """Raises ConfigError."""
    in_run_dir = [] if run_dir is None else [f"run_dir={run_dir}"]
    return load_config(config, overrides=[*(overrides or []), *in_run_dir])


def running_cluster(config: Path | None, run_dir: Path | None) -> RunState:
    """Raises CommandFailed if none runs in the run directory."""
    directory = load(config, run_dir).run_dir
    state = read_state(directory)
    if state is None or not state.launcher.is_alive():
        raise nothing_runs(directory)
    return state


def nothing_runs(directory: Path) -> CommandFailed:
    return CommandFailed(f"nothing runs in {directory}; penstock up starts one, --run-dir names another")
