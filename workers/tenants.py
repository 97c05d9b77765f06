"""What each tenant was served here, by its weight: the counters of the policy `fair`. Pure.

A computed token costs 1 and a sampled one 1 more, so that a prompt token counts 1 and an output token, which is sampled
and then computed, 2. What is computed again after a preemption, loaded or pulled costs nothing: the tenant has paid
for it, or nobody computed it here.

Idleness earns little: a tenant that comes back is lifted to `MAX_CREDIT_TOKENS` below the least counter of those who
are here. So one that uses less than its share has a prompt computed at once, and not at half the speed beside a flood;
and one that uses more has no credit, as its own counter is ahead.
"""

from collections import Counter

from workers.request import Request

# Of a prompt of usual length. So much sooner than its share allows may a tenant be served.
MAX_CREDIT_TOKENS = 2048.0
# Counters of tenants that left ahead of the others, so that leaving does not wash them off.
MAX_REMEMBERED = 4096


class Tenants:
    """All methods cost O(1), but `enter` of a tenant that was not here: it looks at those who are."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}  # of those who are here, and of some who left
        self._num_requests: Counter[str] = Counter()  # of those who are here
        self._floor = 0.0  # where the least counter was when it was last looked at

    @property
    def num_present(self) -> int:
        return len(self._num_requests)

    def served(self, tenant: str) -> float:
        """Of one that is here."""
        return self._served[tenant]

    def enter(self, request: Request) -> None:
        tenant = request.tenant
        if tenant not in self._num_requests:
            if self._num_requests:
                self._floor = max(self._floor, min(map(self._served.__getitem__, self._num_requests)))
            lifted = max(0.0, self._floor - MAX_CREDIT_TOKENS / request.tenant_weight)
            self._served[tenant] = max(self._served.get(tenant, 0.0), lifted)
        self._num_requests[tenant] += 1

    def leave(self, request: Request) -> None:
        tenant = request.tenant
        self._num_requests[tenant] -= 1
        if self._num_requests[tenant]:
            return
        del self._num_requests[tenant]
        if not self._num_requests:
            self._floor = max(self._floor, self._served[tenant])  # time goes on from where the last one was
        if len(self._served) > MAX_REMEMBERED + len(self._num_requests):
            self._forget()

    def charge(self, request: Request, *, first_token: int, end_token: int, num_sampled: int) -> None:
        """Tokens first_token..end_token-1 were computed, and so many sampled."""
        num_new = max(0, end_token - max(first_token, request.num_charged_tokens))
        request.num_charged_tokens = max(request.num_charged_tokens, end_token)
        self._served[request.tenant] += (num_new + num_sampled) / request.tenant_weight

    def check(self, requests: Counter[str]) -> None:
        """Given how many requests of each tenant are here. AssertionError is a bug of ours."""
        assert self._num_requests == requests, f"{self._num_requests} is not {requests}"
        assert all(tenant in self._served for tenant in requests)

    def _forget(self) -> None:
        """Of those who left, the half with the least to lose."""
        left = [tenant for tenant in self._served if tenant not in self._num_requests]
        left.sort(key=self._served.__getitem__)
        for tenant in left[: len(left) // 2]:
            del self._served[tenant]
