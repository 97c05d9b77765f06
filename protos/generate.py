"""Generates the Python code of every .proto beside this file; `--check` proves that it is up to date."""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
GENERATED_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(destination: Path) -> list[Path]:
    """Writes the generated modules of every .proto under `destination`/protos and returns their paths, sorted."""
    sources = sorted(str(path.relative_to(PROTOS.parent)) for path in PROTOS.glob("*.proto"))
    # Plugins are named by path, so that it works without an activated virtual environment.
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out=quiet:{destination}" for kind in ("mypy", "mypy_grpc")]
    outputs += [f"--{kind}_out={destination}" for kind in ("python", "grpc_python")]
    status = protoc.main(["protoc", f"--proto_path={PROTOS.parent}", *plugins, *outputs, *sources])
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status} on {', '.join(sources)}")
    return sorted(path for pattern in GENERATED_PATTERNS for path in (destination / "protos").glob(pattern))


def stale() -> list[str]:
    """Names of generated modules that are missing, differ from their .proto, or have none."""
    with tempfile.TemporaryDirectory() as directory:
        fresh = {path.name: path.read_bytes() for path in generate(Path(directory))}
    present = {
        path.name: path.read_bytes() for pattern in GENERATED_PATTERNS for path in PROTOS.glob(pattern)
    }
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if any generated module is stale"
    )
    if not parser.parse_args().check:
        generate(PROTOS.parent)
        return 0
    names = stale()
    if names:
        print(f"stale: {', '.join(names)}; run `make protos`", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
