"""The shape of the tree, held by machine: who may import whom, and what stays pure."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protos", "kernels", "kvstore", "workers", "control_plane")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_ours(package: str) -> None:
    result = run_python(f"import {package}; print({package}.__file__)")
    assert result.stdout.strip() == str(ROOT / package / "__init__.py"), result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "kvstore.blocks",
        "kvstore.prefix_index",
        "workers.request",
        "workers.pages",
        "workers.scheduler",
        "workers.state",
        "workers.timeline",
        "control_plane.routing.router",
        "control_plane.gateway.app",
        "control_plane.gateway.dispatch",
        "control_plane.config",
    ],
)
def test_imports_without_torch(module: str) -> None:
    result = run_python(
        f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_serves_without_triton_where_there_is_no_gpu() -> None:
    result = run_python(
        "import sys, workers.engine.cpu_engine, workers.worker; print('triton' in sys.modules)"
    )
    assert result.stdout.strip() == "False", result.stdout + result.stderr


def test_package_inits_hold_a_docstring_and_nothing_else() -> None:
    offenders = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            compiled = compile(path.read_text(), str(path), "exec")
            if compiled.co_names not in ((), ("__doc__",)) or not compiled.co_consts[0]:
                offenders.append(str(path.relative_to(ROOT)))
    assert offenders == []


def test_tests_have_no_package_inits_that_could_shadow_ours() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_generated_code_is_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, "protos/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr


def test_every_installed_version_is_pinned_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines
    assert [line for line in lines if "==" not in line] == []
