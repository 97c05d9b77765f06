"""Hand-overs that wait for each other, and who gives way. Pure.

A prefill worker holds what it has computed until it is pulled; a decode worker reserves pages before it pulls. Where
the two take requests in different order (`fair` counts on each worker what was served there; requests may also just
come in another order), one may hold the last pages for a request that waits there for pages which the other has
reserved, for one that waits here for pages. Both would wait until the lease is over.

Only this end knows it: somebody pulls what cannot begin, and nobody pulls what is held. So here what nobody pulls gives
way. Who comes for it later learns that it is gone, and computes the prompt itself.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from workers.pages import PagePool, num_pages_for
from workers.request import PageId, Request, RequestId

IsPulled = Callable[[RequestId], bool]


@dataclass(frozen=True, slots=True)
class Ring:
    """The request that has a puller and no pages, and those, held for pullers that do not come, which have them."""

    waiting: Request
    giving_way: tuple[RequestId, ...]


def find_ring(
    waiting: Iterable[Request], held: Iterable[Request], *, pages: PagePool, is_pulled: IsPulled
) -> Ring | None:
    """Of a worker that can do nothing: `waiting` in turn; of `held`, the last give way first, and no more than must."""
    pulled = next((request for request in waiting if is_pulled(request.request_id)), None)
    if pulled is None:
        return None
    num_missing = num_pages_for(pulled.num_tokens) - pages.num_available
    giving_way: list[RequestId] = []
    num_given_up: Counter[PageId] = Counter()  # of the users of a page
    for request in reversed(tuple(held)):
        if num_missing <= 0:
            break
        if not is_pulled(request.request_id):
            giving_way.append(request.request_id)
            num_given_up.update(request.page_ids)
            num_missing -= sum(num_given_up[page] == pages.ref_count(page) for page in request.page_ids)
    return Ring(pulled, tuple(giving_way)) if num_missing <= 0 else None
