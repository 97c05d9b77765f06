"""What every bench ends with: one JSON line of claims, printed last and, of a full run, kept in bench/results/."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One measured figure under a stable name, and the value it aims at."""

    name: str
    value: float
    unit: str
    aim: float
    better: Literal["higher", "lower"]

    @property
    def reached(self) -> bool:
        return self.value >= self.aim if self.better == "higher" else self.value <= self.aim


def write_report(bench: str, claims: Sequence[Claim], *, keep: bool, device: str | None = None) -> None:
    """Prints the claims as a table and then as one JSON line, and keeps that line in bench/results/<bench>.json."""
    for claim in claims:
        verdict = "reached" if claim.reached else "missed"
        print(f"{claim.name:40} {claim.value:10.4g} {claim.unit:8} aim {claim.aim:g} ({verdict})")
    report = {
        "bench": bench,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": hardware() if device is None else f"{device}; {hardware()}",
        "claims": [{**asdict(claim), "value": float(f"{claim.value:.4g}")} for claim in claims],
    }
    line = json.dumps(report)
    if keep:
        results = _ROOT / "bench" / "results"
        results.mkdir(exist_ok=True)
        (results / f"{bench}.json").write_text(line + "\n")
    print(line, flush=True)


def hardware() -> str:
    """The processor's name, the cores this process may use, and the widest vectors they have."""
    model, flags = platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() == "flags":
            flags = value
    vectors = next((known for known in ("avx512f", "avx2") if known in flags), "no AVX2")
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {vectors}"


def _commit() -> str:
    """The commit the tree is at, with a plus where tracked files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
        cwd=_ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or "unknown"
