"""What gateways that share a directory tell each other: entries of one Redis stream, which puts them in one order.

Each gateway numbers its entries 1, 2, 3 ... through its life. Whoever reads a number that does not follow the last
one has missed something, however it was lost: never written, trimmed, or gone with a Redis that was emptied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

# Fields of an entry; short, because they are in every one.
_GATEWAY, _NUMBER, _KIND, _BODY = b"g", b"n", b"k", b"b"


class Kind(Enum):
    """And what the body is."""

    REGISTER = "register"  # directory.v1.RegisterRequest
    HEARTBEAT = "heartbeat"  # directory.v1.HeartbeatRequest
    GOODBYE = "goodbye"  # directory.v1.DeregisterRequest, as the worker sent it
    SILENT = "silent"  # the same, written by the gateway that heard nothing of the worker any more
    RESEND = "resend"  # the id of the gateway that shall tell all it knows at first hand; empty: everybody
    HERE = "here"  # nothing: a sign of life


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    gateway_id: str
    number: int
    kind: Kind
    body: bytes = b""

    def fields(self) -> dict[bytes, bytes]:
        return {
            _GATEWAY: self.gateway_id.encode(),
            _NUMBER: str(self.number).encode(),
            _KIND: self.kind.value.encode(),
            _BODY: self.body,
        }

    @property
    def starts_over(self) -> bool:
        """It asks everybody for everything and tells all itself, so what was before it is not missed."""
        return self.kind is Kind.RESEND and not self.body


def read_entry(fields: Mapping[bytes, bytes]) -> Entry:
    """Raises ValueError for what no gateway of ours wrote."""
    try:
        return Entry(
            gateway_id=fields[_GATEWAY].decode(),
            number=int(fields[_NUMBER]),
            kind=Kind(fields[_KIND].decode()),
            body=fields[_BODY],
        )
    except KeyError as error:
        raise ValueError(f"an entry must have the field {error}, got {sorted(fields)}") from error
