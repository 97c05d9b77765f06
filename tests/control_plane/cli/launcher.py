"""`penstock up` with fake workers and a fake gateway, started as a script: launcher.py BEHAVIOURS [KEY=VALUE ...]"""

import asyncio
import json
import sys
from pathlib import Path

import typer

from control_plane.cli.failures import clean_errors
from control_plane.cli.up import serve
from control_plane.config import ClusterConfig, load_config
from control_plane.runtimes.commands import Commands, WorkerPlace

FAKE_PROCESS = str(Path(__file__).parents[1] / "runtimes" / "fake_process.py")


def main(behaviours_json: str, *overrides: str) -> None:
    behaviours = json.loads(behaviours_json)

    def control(path: Path, replica: int) -> list[str]:
        return [sys.executable, FAKE_PROCESS, "control", str(path), str(replica)]

    def worker(config: ClusterConfig, place: WorkerPlace) -> list[str]:
        path = config.socket_dir / f"{place.name}.control.sock"
        return [sys.executable, FAKE_PROCESS, "worker", str(path), behaviours.get(place.name, "")]

    with clean_errors():
        if not asyncio.run(
            serve(load_config(overrides=overrides), commands=Commands(control=control, worker=worker))
        ):
            raise typer.Exit(130)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except typer.Exit as e:
        sys.exit(e.exit_code)
