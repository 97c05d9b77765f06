"""What the loop of a worker is told between steps, by sessions and by its own tasks."""

from dataclasses import dataclass

from workers.errors import PullError
from workers.request import Handoff, LoadRegion, Request, RequestId, SessionId


@dataclass(frozen=True, slots=True)
class Submitted:
    request: Request
    unix_s: float  # when it came: the wait for the gap counts as queueing


@dataclass(frozen=True, slots=True)
class Aborted:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class SessionClosed:
    session_id: SessionId


@dataclass(frozen=True, slots=True)
class PullEnded:
    """What came of it: the request's state, or why there is none. No page is written any more."""

    request_id: RequestId
    handoff: Handoff | PullError


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    request_id: RequestId
    released: bool


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Whoever pulls this request while it runs has all that is ready."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class BlocksPlaced:
    """The blocks of a region from `first_block` up to those placed before are in the request's pages."""

    request_id: RequestId
    region: LoadRegion
    first_block: int
    is_exact: bool


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """What of a region is not in pages yet does not come."""

    request_id: RequestId
    region: LoadRegion


@dataclass(frozen=True, slots=True)
class RingLasts:
    """Since the step of this number the worker could do nothing, as hand-overs wait for each other."""

    step_number: int


@dataclass(frozen=True, slots=True)
class PagesFree:
    """Pages that a thread was reading are nobody's: who lacked pages may go on."""


Message = (
    Submitted
    | Aborted
    | SessionClosed
    | PullEnded
    | LeaseEnded
    | CaughtUp
    | BlocksPlaced
    | LoadFailed
    | RingLasts
    | PagesFree
)
