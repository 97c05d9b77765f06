"""Logs of the control process: one JSON object a line on stderr, for people and for whoever started it."""

import json
import logging
import sys
from typing import Any

# The lines of this logger are JSON objects already; see gateway.timeline.
REQUEST_LOGGER = "penstock.gateway.request"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if record.name == REQUEST_LOGGER:
            return record.getMessage()
        entry: dict[str, Any] = {
            "unix_s": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def start_logging(level: str) -> None:
    """Sends everything of `level` ("debug", "info", ...) and above to stderr, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # uvicorn's own start and stop are not ours; `ready` and `stopped` are.
    logging.getLogger("uvicorn.error").setLevel(max(root.level, logging.WARNING))


def log_event(logger: logging.Logger, event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Logs `event`, a fixed name that can be searched for, with its facts as fields."""
    logger.log(level, event, extra={"fields": fields})
