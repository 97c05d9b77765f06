"""Whose request it is: the name in a header that the operator trusts, and what share of the cluster is its.

Clients must not choose it: whoever authenticates them in front of the gateway sets the header, and overwrites what they
sent. Without such a header all requests are of one tenant without a name, so nobody can pose as another.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from control_plane.errors import InvalidRequest

MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3  # as workers take them
_GOOD_NAME = re.compile(r"[!-~]{1,128}")  # visible ASCII: safe in a log


@dataclass(frozen=True, slots=True)
class Tenant:
    """`weight`: how large its share is beside those of others."""

    name: str = ""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenancy:
    """`header` is a header of HTTP, and a key of gRPC's metadata in lower case; empty: none is read."""

    header: str = ""
    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def tenant_of(self, headers: Iterable[tuple[str, str]]) -> Tenant:
        """`InvalidRequest` for a name that nobody can have, and for more than one: who set which is not known here."""
        wanted = self.header.lower()
        names = [value for header, value in headers if wanted and header.lower() == wanted]
        if len(names) > 1:
            raise InvalidRequest(f"The header {self.header} must come once, got {len(names)} of them.")
        name = names[0] if names else ""
        if name and not _GOOD_NAME.fullmatch(name):
            raise InvalidRequest(
                f"The header {self.header} must name a tenant in 1 to 128 visible ASCII characters, got {len(name)}"
                " characters or others."
            )
        return Tenant(name, self.weights.get(name, 1.0))


def parse_weights(text: str) -> Mapping[str, float]:
    """`gold=3,free=0.5`. `ValueError` names the part that is wrong."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or name in weights or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ValueError(
                f"{part!r} must be NAME=WEIGHT, each name once, with weights from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
            )
        weights[name] = weight
    return MappingProxyType(weights)
