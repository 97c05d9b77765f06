"""The one place that speaks to Redis: writes a gateway's entries to the stream and reads everybody's.

`<prefix>:stream`         the entries, trimmed to about MAX_STREAM_ENTRIES
`<prefix>:epochs:<id>`    the incarnations of one worker, in the order in which they registered

All of it is soft: every key has a time to live, and a Redis that comes back empty is filled by those who know.
Every call has a deadline. A Redis that is away is tried again for as long as the gateway lives; one that
refuses to write (full, read-only) is still read, and what it refuses is missed by the others until it takes
entries again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from control_plane.directory.redis_directory import Outgoing, RedisDirectory
from control_plane.directory.stream_entries import read_entry

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0
# Entries of 512 blocks have 9 KB: at most 300 KB a call and 150 MB in Redis; most have 100 bytes.
MAX_ENTRIES_PER_CALL = 32
MAX_STREAM_ENTRIES = 16384
KEY_TTL_S = 3600
READ_BLOCK_S = 0.2
CANCEL_AGAIN_S = 0.05

# Takes the entry into the stream if the incarnation is the newest one of its worker. The publisher says which
# ones it replaced, because an emptied Redis has forgotten them. A claim that is refused leaves a sign of life in the
# stream, so that its number is not missed.
# KEYS: epochs, stream. ARGV: epoch, number of replaced ones, they, ttl in s, length of the stream, and the fields.
_CLAIM = """
local epoch, num_replaced = ARGV[1], tonumber(ARGV[2])
local known, place = redis.call('LRANGE', KEYS[1], 0, -1), {}
for index, each in ipairs(known) do place[each] = index end
for index = 2 + num_replaced, 3, -1 do
  if ARGV[index] ~= epoch and not place[ARGV[index]] then redis.call('LPUSH', KEYS[1], ARGV[index]) end
end
local holds = not place[epoch] or place[epoch] == #known
if holds and not place[epoch] then redis.call('RPUSH', KEYS[1], epoch) end
redis.call('LTRIM', KEYS[1], -8, -1)
redis.call('EXPIRE', KEYS[1], ARGV[3 + num_replaced])
local fields = {}
for index = 5 + num_replaced, #ARGV do fields[#fields + 1] = ARGV[index] end
if not holds then
  for index = 1, #fields, 2 do
    if fields[index] == 'k' then fields[index + 1] = 'here' end
    if fields[index] == 'b' then fields[index + 1] = '' end
  end
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4 + num_replaced], '*', unpack(fields))
return redis.call('LINDEX', KEYS[1], -1)
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisSettings:
    """`url` may hold a password: it is in no log and no error. `call_timeout_s`: of each call.

    Raises ValueError for a URL that redis-py cannot use, which it would find out at the first call only.
    """

    url: str
    prefix: str
    heartbeat_s: float
    call_timeout_s: float = 1.0

    def __post_init__(self) -> None:
        try:
            Redis.from_url(self.url).connection_pool.make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, RedisError):
            # Their messages quote parts of the URL.
            raise ValueError(
                "url cannot be used: its port, its options or a character that needs %-encoding"
            ) from None


class RedisLink:
    """`run` it for as long as the gateway lives."""

    def __init__(
        self,
        directory: RedisDirectory,
        settings: RedisSettings,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_up = False
        self._directory = directory
        self._settings = settings
        self._now_s = now_s
        self._stream = f"{settings.prefix}:stream"
        self._cursor: bytes | None = None
        self._is_refused = False

    async def run(self) -> None:
        """Until cancelled."""
        retry_s, is_news = FIRST_RETRY_S, True
        while True:
            started_s = self._now_s()
            try:
                await self._stay_linked()
            except (RedisError, OSError, TimeoutError) as error:
                level = logging.WARNING if self.is_up or is_news else logging.DEBUG
                _say("redis_away", level=level, reason=f"{type(error).__name__}: {error}")
            finally:
                was_up, self.is_up = self.is_up, False
                self._directory.link_lost()
            is_news = False
            # A Redis that takes us in and throws us out again must not make every worker send all it has each time.
            has_lasted = was_up and self._now_s() - started_s > LAST_RETRY_S
            retry_s = FIRST_RETRY_S if has_lasted else min(2 * retry_s, LAST_RETRY_S)
            await asyncio.sleep(retry_s)

    async def _stay_linked(self) -> None:
        """Until Redis is lost, which raises."""
        timeout_s = self._settings.call_timeout_s
        async with Redis.from_url(
            self._settings.url,
            socket_timeout=timeout_s + READ_BLOCK_S,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        ) as redis:
            await _all(self._find_place(redis))
            self.is_up = True
            _say("redis_linked")
            self._directory.link_up(now_s=self._now_s())
            await _all(self._beat(), self._write(redis), self._read(redis))

    async def _find_place(self, redis: Redis) -> None:
        """After the last entry, or where we were; from the start if the stream is younger than we remember."""
        async with asyncio.timeout(self._settings.call_timeout_s):
            newest: Any = await redis.xrevrange(self._stream, count=1)
        last: bytes = newest[0][0] if newest else b"0-0"
        if self._cursor is None:
            self._cursor = last
        elif _order(self._cursor) > _order(last):
            self._cursor = b"0-0"

    async def _beat(self) -> None:
        while True:
            self._directory.beat(now_s=self._now_s())
            await asyncio.sleep(self._settings.heartbeat_s)

    async def _write(self, redis: Redis) -> None:
        while True:
            await self._directory.has_outgoing.wait()
            outgoing = self._directory.take_outgoing(MAX_ENTRIES_PER_CALL)
            async with asyncio.timeout(self._settings.call_timeout_s):
                answers = await self._send(redis, outgoing)
            self._settle(outgoing, answers)

    async def _send(self, redis: Redis, outgoing: Sequence[Outgoing]) -> list[Any]:
        """An answer or an error for each."""
        async with redis.pipeline(transaction=False) as pipeline:
            for each in outgoing:
                fields: dict[Any, Any] = {**each.entry.fields()}
                if each.claim is None:
                    pipeline.xadd(self._stream, fields, maxlen=MAX_STREAM_ENTRIES, approximate=True)
                    continue
                replaced = each.claim.replaced_epochs
                pipeline.eval(
                    _CLAIM,
                    2,
                    f"{self._settings.prefix}:epochs:{each.claim.incarnation.worker_id}",
                    self._stream,
                    *(each.claim.incarnation.epoch, len(replaced), *replaced, KEY_TTL_S, MAX_STREAM_ENTRIES),
                    *(part for field in fields.items() for part in field),
                )
            pipeline.expire(self._stream, KEY_TTL_S)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers[: len(outgoing)]

    def _settle(self, outgoing: Sequence[Outgoing], answers: Sequence[Any]) -> None:
        refusal = None
        for each, answer in zip(outgoing, answers, strict=True):
            if isinstance(answer, ResponseError):
                refusal = answer
            elif isinstance(answer, Exception):
                raise answer
            if each.claim is None:
                continue
            if isinstance(answer, ResponseError):
                self._directory.claim_failed(each.claim)
            elif (newest_epoch := int(answer)) != each.claim.incarnation.epoch:
                self._directory.claim_refused(each.claim, newest_epoch=newest_epoch, now_s=self._now_s())
        if refusal is not None and not self._is_refused:
            _say("redis_refuses", level=logging.WARNING, reason=str(refusal))
        self._is_refused = refusal is not None

    async def _read(self, redis: Redis) -> None:
        block_ms = int(READ_BLOCK_S * 1000)
        while True:
            assert self._cursor is not None, "it is read before it is known from where"
            async with asyncio.timeout(self._settings.call_timeout_s + READ_BLOCK_S):
                answer: Any = await redis.xread(
                    {self._stream: self._cursor}, count=MAX_ENTRIES_PER_CALL, block=block_ms
                )
            for entry_id, fields in answer[0][1] if answer else ():
                self._cursor = entry_id
                try:
                    self._directory.receive(read_entry(fields), now_s=self._now_s())
                except ValueError as error:
                    _say("redis_entry_foreign", level=logging.WARNING, reason=str(error))
                # One entry of 512 blocks takes 1 ms.
                await asyncio.sleep(0)


def _say(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    _log.log(level, event, extra={"fields": fields})


def _order(entry_id: bytes) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split(b"-")))


async def _all(*parts: Coroutine[Any, Any, None]) -> None:
    """Until one fails. A task group of Python 3.11 would swallow a cancellation during which one fails."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        pending = set(tasks)
        while pending:  # redis-py 8.1 loses one cancellation in some hundred
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # of the same loss as the one that is raised: asked for, or asyncio logs it
