"""Everything goes wrong at once, at random, and no client may notice.

    make bench BENCH=chaos [ARGS="--minutes 3 --seed 5 --shape mixed"]

Two gateways over a Redis, two workers of each pool, and clients that always have a request each under way. Meanwhile
workers are killed, stopped, slowed, cut off and drained, their disk is full, requests are moved to other workers, and
gateways and Redis killed and stopped. What happens, to whom and in which order depends on the seed alone; when it
happens also on how soon the one before is well again.

Every answer is compared, token by token, with that of the same request before the storm: greedy, seeded and with
penalties. Who asked a gateway that is killed asks another one, as clients do, and that counts as no failure. When the
storm has settled, nobody may hold a page, a lease or a request, and no process more descriptors than before.
"""

import argparse
import asyncio
from dataclasses import dataclass, field

from bench.chaos_effects import Storm
from bench.chaos_leaks import footprint, grown, settled
from bench.chaos_load import Account, Clients
from bench.chaos_site import SHAPES, Site, running_site
from bench.chaos_storm import GATEWAY_KINDS, REDIS_KINDS, WORKER_KINDS, Kind, Lane
from bench.report import Claim, write_report

LONGEST_MOVE_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Result:
    account: Account
    events: dict[str, int]
    leaks: list[str] = field(default_factory=list)

    @property
    def claims(self) -> list[Claim]:
        values = {
            "lost": (self.account.num_lost, "tokens"),
            "duplicated": (self.account.num_duplicated, "tokens"),
            "wrong": (self.account.num_wrong, "tokens"),
            "leaked": (len(self.leaks), "things"),
            "client_failures": (len(self.account.failures), "requests"),
        }
        return [
            Claim(name=name, value=value, unit=unit, aim=0, better="lower")
            for name, (value, unit) in values.items()
        ]


def lanes(site: Site) -> list[Lane]:
    """A lane for each pool, and a few more."""
    pools = sorted({worker.rpartition("-")[0] for worker in site.workers})
    worker_kinds = [kind for kind in WORKER_KINDS if site.may_cut or kind is not Kind.CUT_WORKER]
    return [
        *(
            Lane(pool, worker_kinds, [name for name in site.workers if name.startswith(pool)])
            for pool in pools
        ),
        Lane("gateways", GATEWAY_KINDS, list(site.doors)),
        Lane("redis", REDIS_KINDS, ["redis"]),
        *([Lane("disk", [Kind.FILL_DISK], ["disk"])] if site.disk else []),
        Lane("moves", [Kind.MOVE_REQUEST], site.generating, longest_pause_s=LONGEST_MOVE_PAUSE_S),
    ]


async def endure(site: Site, *, seed: int, lasts_s: float) -> Result:
    """Raises RuntimeError if something of the cluster does not become well again."""
    clients = Clients(list(site.doors.values()), seed=seed)
    await clients.learn()
    await settled(site)
    before = footprint(site)
    storm = Storm(site, seed=seed, lasts_s=lasts_s)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(clients.run(stop))
        async with asyncio.TaskGroup() as blowing:
            for lane in lanes(site):
                blowing.create_task(storm.blow(lane))
        stop.set()
    leaks = await settled(site)
    site.note_shared_memory()
    return Result(clients.account, dict(storm.timeline.counts), leaks + grown(before, footprint(site)))


def run(*, shape: str, seed: int, lasts_s: float) -> Result:
    with running_site(shape) as site:
        result = asyncio.run(endure(site, seed=seed, lasts_s=lasts_s))
    result.leaks.extend(f"shared memory {path}" for path in sorted(site.shared_memory) if path.exists())
    return result


def print_result(result: Result) -> None:
    account = result.account
    print()
    for event, number in sorted(result.events.items()):
        print(f"{event:40} {number:6}")
    print(f"{'requests':40} {account.num_requests:6}")
    print(f"{'tokens':40} {account.num_tokens:6}")
    print(f"{'sent again, their gateway was killed':40} {account.num_with_gateway:6}")
    for title, lines in (
        ("failed", account.failures),
        ("not as undisturbed", account.mismatches),
        ("leaked", result.leaks),
    ):
        for line in lines:
            print(f"{title}: {line}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="disaggregated")
    parser.add_argument("--quick", action="store_true", help="one minute")
    chosen = parser.parse_args()
    minutes = 1.0 if chosen.quick else chosen.minutes
    result = run(shape=chosen.shape, seed=chosen.seed, lasts_s=60 * minutes)
    print_result(result)
    write_report("chaos", result.claims, keep=not chosen.quick)


if __name__ == "__main__":
    main()
