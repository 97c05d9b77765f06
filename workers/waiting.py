"""The queue of a worker: a lane for each tenant, and the heads of the lanes compared when somebody can be admitted.

What a tenant was served changes with every step; the order within a lane does not. So nothing is sorted again: a step
that has no seat to give costs nothing, one that has looks at the head of each lane.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from functools import partial
from heapq import heapify, heappop, heapreplace

from workers.loads import num_prompt_tokens_left
from workers.pages import num_pages_for
from workers.policies import Policy, Rank, own_rank, rank
from workers.request import Request, RequestId
from workers.tenants import Tenants


class WaitingQueue:
    """Iterates in turn: as the policy says if those before were admitted, and their tenants had paid for them."""

    def __init__(self, policy: Policy, tenants: Tenants) -> None:
        self._policy = policy
        self._own_rank = partial(own_rank, policy)
        self._tenants = tenants
        self._lanes: dict[str, list[Request]] = {}  # none is empty
        self._num_requests = 0
        self._num_left: dict[RequestId, int] = {}  # prompt tokens of each: its loads change while it waits
        self.num_prompt_tokens_left = 0  # the sum of these
        self.num_pages = 0  # that their tokens fill
        self._first: Request | None = None

    def __len__(self) -> int:
        return self._num_requests

    def add(self, request: Request) -> None:
        insort(self._lanes.setdefault(request.tenant, []), request, key=self._own_rank)
        self._num_requests += 1
        self._num_left[request.request_id] = 0
        self.count_loads(request)
        self.num_pages += num_pages_for(request.num_tokens)

    def remove(self, request: Request) -> None:
        lane = self._lanes[request.tenant]
        position = bisect_left(lane, self._own_rank(request), key=self._own_rank)
        assert lane[position] is request, f"request {request.request_id!r} is not where its rank says"
        del lane[position]
        if not lane:
            del self._lanes[request.tenant]
        self._num_requests -= 1
        self.num_prompt_tokens_left -= self._num_left.pop(request.request_id)
        self.num_pages -= num_pages_for(request.num_tokens)
        if request is self._first:
            self._first = None

    def count_loads(self, request: Request) -> None:
        """More or less of one that waits is loaded now."""
        num_left = num_prompt_tokens_left(request)
        self.num_prompt_tokens_left += num_left - self._num_left[request.request_id]
        self._num_left[request.request_id] = num_left

    def put_first(self, request: Request) -> None:
        """One that waits is next, whatever the policy says."""
        self._first = request

    def requests(self) -> Iterator[Request]:
        """In no order."""
        for lane in self._lanes.values():
            yield from lane

    def __iter__(self) -> Iterator[Request]:
        if self._first is None:
            yield from self._by_policy()
            return
        yield self._first
        yield from (request for request in self._by_policy() if request is not self._first)

    def _by_policy(self) -> Iterator[Request]:
        if len(self._lanes) == 1:
            yield from self.requests()
            return
        served = {tenant: self._tenants.served(tenant) for tenant in self._lanes}
        lanes = {tenant: iter(lane) for tenant, lane in self._lanes.items()}
        heads = [self._ranked(next(lane), served) for lane in lanes.values()]
        heapify(heads)
        while heads:
            _, head = heads[0]
            yield head
            served[head.tenant] += _cost(head)
            following = next(lanes[head.tenant], None)
            if following is None:
                heappop(heads)
            else:
                heapreplace(heads, self._ranked(following, served))

    def check(self) -> None:
        """Proves the invariants. AssertionError is a bug of ours."""
        assert self._num_requests == sum(map(len, self._lanes.values()))
        num_left = {request.request_id: num_prompt_tokens_left(request) for request in self.requests()}
        assert self._num_left == num_left, f"{self._num_left} tokens left are {num_left}"
        assert self.num_prompt_tokens_left == sum(num_left.values())
        assert self.num_pages == sum(num_pages_for(request.num_tokens) for request in self.requests())
        assert self._first is None or self._first in self._lanes.get(self._first.tenant, [])
        for tenant, lane in self._lanes.items():
            assert lane, f"the lane of {tenant!r} is empty"
            assert all(request.tenant == tenant for request in lane)
            assert lane == sorted(lane, key=self._own_rank)

    def _ranked(self, request: Request, served: dict[str, float]) -> tuple[tuple[Rank, RequestId], Request]:
        return rank(self._policy, request, served[request.tenant]), request


def _cost(request: Request) -> float:
    """What its tenant will have paid when it has its next token, as far as that is known."""
    num_left = request.num_tokens - max(request.num_computed_tokens, request.num_charged_tokens)
    return (max(0, num_left) + 1) / request.tenant_weight
