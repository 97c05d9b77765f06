"""Models whose workers were there and are gone. A worker that dies or is rolled comes back as another incarnation."""

import math
from dataclasses import dataclass

from control_plane.directory.member import Model


@dataclass(frozen=True, slots=True)
class _Absence:
    model: Model
    since_s: float


class Absences:
    """When somebody who generates with a model was there last, by its fingerprint."""

    def __init__(self) -> None:
        self._by_fingerprint: dict[bytes, _Absence] = {}

    def note(self, model: Model, *, now_s: float) -> None:
        """A worker of this model has gone."""
        self._by_fingerprint[model.fingerprint] = _Absence(model, now_s)

    def clear(self) -> None:
        """Nobody comes back."""
        self._by_fingerprint.clear()

    def since_s(self, fingerprint: bytes | None) -> float:
        """Of the worker that went last, of any model for None; -inf: nobody has gone."""
        if fingerprint is not None:
            absence = self._by_fingerprint.get(fingerprint)
            return absence.since_s if absence is not None else -math.inf
        return max((absence.since_s for absence in self._by_fingerprint.values()), default=-math.inf)

    def models(self, *, since_s: float) -> list[Model]:
        """Those of which a worker has gone since then."""
        return [absence.model for absence in self._by_fingerprint.values() if absence.since_s > since_s]
