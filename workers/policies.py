"""Who goes first on a worker: each policy is one function from a request, and what its tenant was served, to a rank.

Lower is sooner; ties go by request id. `served` is the tenant's counter (workers.tenants) and the only part of a rank
that changes while a request is here: requests of one tenant keep their order among themselves.

No policy starves a request of the best priority class that waits. `fcfs`, `priority`, `deadline`: a rank that is fixed
and grows with the arrival is passed by finitely many. `fair`: the counter of a tenant that is not served stands still
while those of the others grow. In `priority`, `fair` and `deadline` a steady stream of a more urgent class does keep
the less urgent ones waiting; that is what classes are for.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from workers.request import Request, RequestId

# By which every request wants its first token, whatever it says: so nobody passes one that came so much earlier.
LONGEST_DEADLINE_S = 60.0

Rank = tuple[float, ...]
Policy = Callable[[Request, float], Rank]


def fcfs(request: Request, served: float) -> Rank:
    """Whoever came first."""
    return (request.arrival_s,)


def priority(request: Request, served: float) -> Rank:
    """Classes, and within one whoever came first."""
    return (request.priority, request.arrival_s)


def fair(request: Request, served: float) -> Rank:
    """Classes, and within one the tenant that was served least: the virtual token counter of Sheng et al."""
    return (request.priority, served, request.arrival_s)


def deadline(request: Request, served: float) -> Rank:
    """Classes, and within one the earliest deadline. One that is missed already passes nobody who came long before."""
    latest_s = request.arrival_s + LONGEST_DEADLINE_S
    wanted_s = latest_s if request.deadline_s is None else request.deadline_s
    return (request.priority, min(max(wanted_s, request.arrival_s), latest_s), request.arrival_s)


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {"fcfs": fcfs, "priority": priority, "fair": fair, "deadline": deadline}
)


def own_rank(policy: Policy, request: Request) -> tuple[Rank, RequestId]:
    """Among the requests of one tenant: it stands still, and the id makes it total."""
    return policy(request, 0.0), request.request_id


def rank(policy: Policy, request: Request, served: float) -> tuple[Rank, RequestId]:
    """Among all requests, at a moment."""
    return policy(request, served), request.request_id
