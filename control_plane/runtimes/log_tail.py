"""Follows the log of a process: JSON lines with an `event` field, between lines of any other kind."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class LogEvent:
    name: str
    fields: dict[str, Any] = field(default_factory=dict)


class LogTail:
    """Reads what was appended since the last call. A line counts once it is complete."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self._path = path
        self._offset = offset
        self._partial = b""

    def read_events(self) -> list[LogEvent]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [event for line in lines if (event := _parse(line))]


def _parse(line: bytes) -> LogEvent | None:
    if not line.startswith(b"{"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    name = entry.pop("event", None)
    return LogEvent(name, entry) if isinstance(name, str) else None


def last_lines(path: Path, *, num_lines: int = 15, offset: int = 0) -> list[str]:
    """The end of a log as people want to read it: a JSON line as its event and fields, tracebacks unfolded."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(offset, size - MAX_TAIL_BYTES))
            raw = file.read().splitlines()
    except FileNotFoundError:
        return []
    lines: list[str] = []
    for line in raw:
        event = _parse(line)
        lines.extend(_readable(event) if event else [line.decode(errors="replace")])
    return [line for line in lines if line.strip()][-num_lines:]


_UNINTERESTING = ("unix_s", "logger", "level", "traceback")


def _readable(event: LogEvent) -> list[str]:
    facts = " ".join(f"{key}={value}" for key, value in event.fields.items() if key not in _UNINTERESTING)
    level = str(event.fields.get("level", "info"))
    return [f"{level}: {event.name} {facts}".rstrip(), *str(event.fields.get("traceback", "")).splitlines()]
