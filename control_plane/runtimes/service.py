"""Which workers are out of service: a file of each one's name in `run_dir/drained`.

`penstock drain` makes it, `penstock resume` removes it. Until then the launcher does not start such a worker again.
"""

from pathlib import Path

DRAINED_DIR = "drained"


def take_out(run_dir: Path, worker: str) -> None:
    directory = run_dir / DRAINED_DIR
    directory.mkdir(exist_ok=True)
    (directory / worker).touch()


def put_back(run_dir: Path, worker: str) -> None:
    (run_dir / DRAINED_DIR / worker).unlink(missing_ok=True)


def is_out(run_dir: Path, worker: str) -> bool:
    return (run_dir / DRAINED_DIR / worker).exists()
