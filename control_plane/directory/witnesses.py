"""Through which gateway each worker was heard last, and whether that gateway would tell if it were alive."""

from dataclasses import dataclass

from control_plane.directory.member import WorkerId

# A worker's word arrives later through another gateway, and a worker that changes its gateway is silent meanwhile.
TTLS_THROUGH_OTHERS = 2
# A gateway that is silent has left its workers to the others; one that nobody takes over is gone for good.
TTLS_WITHOUT_A_GATEWAY = 30


@dataclass(slots=True)
class _Gateway:
    last_number: int
    seen_s: float
    asked_s: float = float("-inf")


@dataclass(slots=True)
class _Sign:
    through: str
    at_s: float


class Witnesses:
    """Our own entries in the stream prove that it can be written and read; nothing else does."""

    def __init__(self, *, gateway_id: str, ttl_s: float) -> None:
        self._own_id = gateway_id
        self._ttl_s = ttl_s
        self._gateways: dict[str, _Gateway] = {}
        self._signs: dict[WorkerId, _Sign] = {}
        self._works_since_s = 0.0
        self._asked_all_s = float("-inf")

    def heard(self, worker_id: WorkerId, *, through: str, now_s: float) -> None:
        self._signs[worker_id] = _Sign(through, now_s)

    def forget(self, worker_id: WorkerId) -> None:
        self._signs.pop(worker_id, None)

    def is_through(self, worker_id: WorkerId, gateway_id: str) -> bool:
        sign = self._signs.get(worker_id)
        return sign is not None and sign.through == gateway_id

    def is_ours(self, worker_id: WorkerId) -> bool:
        return self.is_through(worker_id, self._own_id)

    def saw(self, gateway_id: str, *, number: int, now_s: float) -> bool | None:
        """Whether entries before this one were missed; None: it was seen before."""
        gateway = self._gateways.get(gateway_id)
        if gateway is None:
            self._forget_dead_gateways(now_s=now_s)
            self._gateways[gateway_id] = _Gateway(last_number=number, seen_s=now_s)
            if gateway_id == self._own_id:
                self._works_since_s = now_s
            return number > 1
        if number <= gateway.last_number:
            return None
        missed = number > gateway.last_number + 1
        if gateway_id == self._own_id and now_s - gateway.seen_s >= self._ttl_s:
            self._works_since_s = now_s
        gateway.last_number, gateway.seen_s = number, now_s
        return missed

    def may_ask(self, gateway_id: str, *, now_s: float) -> bool:
        """Once in a ttl; remembers that it was asked. To be asked again, it must have missed the question."""
        gateway = self._gateways.get(gateway_id)
        if gateway is None or now_s - max(gateway.asked_s, self._asked_all_s) < self._ttl_s:
            return False
        gateway.asked_s = now_s
        return True

    def asks_everybody(self, *, now_s: float) -> None:
        self._asked_all_s = now_s

    def may_be_dead(self, worker_id: WorkerId, *, now_s: float, is_reached: bool) -> bool:
        """Whether silence of this worker means anything. `is_reached`: there is an open session with it.

        Whom we heard ourselves may have gone to another gateway, which cannot tell us while the stream does not
        work. A session that is open then shows that it lives: those of the dead and the frozen break.
        """
        sign = self._signs.get(worker_id)
        if sign is None:
            return True
        if sign.through == self._own_id:
            works_for_s = now_s - self._works_since_s if self._is_fresh(self._own_id, now_s=now_s) else 0.0
            return not is_reached or works_for_s >= TTLS_THROUGH_OTHERS * self._ttl_s
        if not self._is_fresh(self._own_id, now_s=now_s):
            return False
        num_ttls = (
            TTLS_THROUGH_OTHERS if self._is_fresh(sign.through, now_s=now_s) else TTLS_WITHOUT_A_GATEWAY
        )
        return now_s - max(sign.at_s, self._works_since_s) >= num_ttls * self._ttl_s

    def _is_fresh(self, gateway_id: str, *, now_s: float) -> bool:
        gateway = self._gateways.get(gateway_id)
        return gateway is not None and now_s - gateway.seen_s < self._ttl_s

    def _forget_dead_gateways(self, *, now_s: float) -> None:
        """Each start of a gateway has a new id, so they would gather."""
        oldest_s = now_s - TTLS_WITHOUT_A_GATEWAY * self._ttl_s
        for gateway_id in [known for known, gateway in self._gateways.items() if gateway.seen_s < oldest_s]:
            del self._gateways[gateway_id]
