"""What `penstock cache` shows: one report for programs, and the same as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from control_plane.cli.tiers import Answer
from kvstore.blocks import BLOCK_SIZE_TOKENS
from protos import kv_pb2

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TIMES = (("d", 86_400), ("h", 3600), ("min", 60))
_HIT_RATE = "hit rate: of the full blocks that were looked up on this worker, the part that this tier gave"
_NOTHING_FETCHED = (
    "Nothing has been fetched from other workers yet (hand-over with a request is not counted)."
)

Report = dict[str, Any]


def as_report(answers: "Sequence[Answer[kv_pb2.TiersDescription]]", *, num_prefixes: int) -> Report:
    """Prefixes are those of all workers, the longest-lived first."""
    prefixes = [
        {"worker": answer.worker.worker_id, **_prefix(prefix)}
        for answer in answers
        if answer.reply is not None
        for prefix in answer.reply.prefixes
    ]
    prefixes.sort(key=lambda prefix: -prefix["age_s"])
    return {
        "workers": [_worker(answer) for answer in answers],
        "levels": _levels(answers),
        "prefixes": prefixes[:num_prefixes],
    }


def print_report(report: Report) -> None:
    console = Console()
    console.print(_tier_table(report["workers"]))
    console.print(_HIT_RATE, style="dim", soft_wrap=True)
    console.print()
    console.print(_level_table(report["levels"]) if report["levels"] else _NOTHING_FETCHED)
    if report["prefixes"]:
        console.print()
        console.print(_prefix_table(report["prefixes"]))


def _worker(answer: "Answer[kv_pb2.TiersDescription]") -> Report:
    worker, reply = answer.worker, answer.reply
    found: Report = {"name": worker.worker_id, "model": worker.model.name, "failure": answer.failure or None}
    if reply is not None:
        found["num_lookup_blocks"] = reply.num_lookup_blocks
        found["tiers"] = [_tier(tier, num_lookup_blocks=reply.num_lookup_blocks) for tier in reply.tiers]
    return found


def _tier(tier: kv_pb2.TierDescription, *, num_lookup_blocks: int) -> Report:
    return {
        "name": tier.name,
        "num_blocks": tier.num_blocks,
        "capacity_blocks": tier.capacity_blocks,
        "used_bytes": tier.used_bytes,
        "capacity_bytes": tier.capacity_bytes,
        "num_hit_blocks": tier.num_hit_blocks,
        "hit_rate": tier.num_hit_blocks / num_lookup_blocks if num_lookup_blocks else None,
        # The engine computes in its pages and uses them again: nothing is stored there, nothing evicted.
        "num_stored_blocks": None if tier.name == "device" else tier.num_stored_blocks,
        "num_evicted_blocks": None if tier.name == "device" else tier.num_evicted_blocks,
        "num_errors": tier.num_errors,
    }


def _levels(answers: "Sequence[Answer[kv_pb2.TiersDescription]]") -> list[Report]:
    """Of all workers together."""
    totals: dict[str, list[int]] = {}
    for answer in answers:
        for level in answer.reply.levels if answer.reply is not None else ():
            total = totals.setdefault(level.name, [0, 0])
            total[0] += level.raw_bytes
            total[1] += level.coded_bytes
    return [
        {"name": name, "raw_bytes": raw, "coded_bytes": coded, "ratio": raw / coded if coded else None}
        for name, (raw, coded) in totals.items()
    ]


def _prefix(prefix: kv_pb2.PrefixDescription) -> Report:
    return {
        "tier": prefix.tier,
        "root": prefix.root.hex(),
        "last_key": prefix.last_key.hex(),
        "num_tokens": prefix.num_blocks * BLOCK_SIZE_TOKENS,
        "age_s": prefix.age_s,
        "idle_s": prefix.idle_s,
        "num_hits": prefix.num_hits,
    }


def _tier_table(workers: Sequence[Report]) -> Table:
    table = _table(
        ["worker", "tier"], ["blocks", "bytes", "capacity", "hit rate", "stored", "evicted", "errors"]
    )
    for worker in workers:
        for tier in worker.get("tiers", ()):
            table.add_row(worker["name"], tier["name"], *_tier_cells(tier))
    return table


def _tier_cells(tier: Mapping[str, Any]) -> list[str]:
    # A tier that keeps nothing itself, such as the peers, has no capacity.
    holds = tier["capacity_blocks"] > 0
    counts = [
        "-" if tier[name] is None else str(tier[name])
        for name in ("num_stored_blocks", "num_evicted_blocks", "num_errors")
    ]
    return [
        str(tier["num_blocks"]) if holds else "",
        format_bytes(tier["used_bytes"]) if holds else "",
        format_bytes(tier["capacity_bytes"]) if holds else "",
        "" if tier["hit_rate"] is None else f"{tier['hit_rate']:.1%}",
        *(counts if holds else ["", "", counts[-1]]),
    ]


def _level_table(levels: Sequence[Report]) -> Table:
    table = _table(["level"], ["KV", "coded", "smaller by"])
    for level in levels:
        ratio = "" if level["ratio"] is None else f"{level['ratio']:.2f}"
        table.add_row(
            level["name"], format_bytes(level["raw_bytes"]), format_bytes(level["coded_bytes"]), ratio
        )
    return table


def _prefix_table(prefixes: Sequence[Report]) -> Table:
    table = _table(["prefix", "worker", "tier"], ["tokens", "age", "idle", "hits"])
    for prefix in prefixes:
        table.add_row(
            prefix["last_key"][:12],
            prefix["worker"],
            prefix["tier"],
            str(prefix["num_tokens"]),
            format_duration(prefix["age_s"]),
            format_duration(prefix["idle_s"]),
            str(prefix["num_hits"]),
        )
    return table


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in words:
        table.add_column(title, no_wrap=True)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def format_bytes(num_bytes: float) -> str:
    """1536 is "1.5 KiB"."""
    for unit in _UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1024
    return f"{num_bytes:.4g} {_UNITS[-1]}"


def format_duration(seconds: float) -> str:
    """5400 is "1.5 h"."""
    for unit, size_s in _TIMES:
        if seconds >= size_s:
            return f"{seconds / size_s:.1f} {unit}"
    return f"{seconds:.1f} s"
