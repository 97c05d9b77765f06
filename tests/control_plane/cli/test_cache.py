import json
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.cli.cache_report import format_bytes, format_duration
from control_plane.runtimes.state import GatewayState, RunState, own_process_id
from kvstore.blocks import root_key
from protos import directory_pb2, directory_pb2_grpc, kv_pb2, kv_pb2_grpc, worker_pb2

FINGERPRINT = b"model fingerprint"
DROPPED = "dropped 12 copies of blocks, those of all tiers together"


@dataclass
class FakeTiers(kv_pb2_grpc.KvTransferServicer):
    """One worker's tiers: a constant picture, and a record of what it was asked to drop."""

    name: str
    model: str = "fake"
    failure: str = ""
    num_held: int = 12  # copies, as it answers when it drops them
    is_fresh: bool = False  # nothing has been fetched
    drops: list[kv_pb2.DropRequest] = field(default_factory=list)

    def DescribeTiers(self, request: kv_pb2.DescribeTiersRequest, context: Any) -> kv_pb2.TiersDescription:
        if self.failure:
            context.abort(grpc.StatusCode.INTERNAL, self.failure)
        prefixes = [
            kv_pb2.PrefixDescription(
                root=b"r" * 16, last_key=bytes([number]) * 16, num_blocks=8, age_s=60.0 * number,
                idle_s=5.0, num_hits=number, tier="memory",
            )
            for number in range(1, 1 + min(3, request.num_prefixes))
        ]  # fmt: skip
        return kv_pb2.TiersDescription(
            tiers=[
                kv_pb2.TierDescription(name="device", num_blocks=2, capacity_blocks=4, num_hit_blocks=5),
                kv_pb2.TierDescription(
                    name="memory", num_blocks=3, capacity_blocks=8, used_bytes=3 * 2**20, capacity_bytes=8 * 2**20,
                    num_hit_blocks=25, num_stored_blocks=40, num_evicted_blocks=37, num_errors=0,
                ),
                kv_pb2.TierDescription(name="peer", num_hit_blocks=10, num_errors=2),
            ],
            prefixes=prefixes,
            levels=[] if self.is_fresh else [
                kv_pb2.LevelDescription(name="fine", raw_bytes=8 * 2**20, coded_bytes=2 * 2**20)
            ],
            num_lookup_blocks=100,
        )  # fmt: skip

    def Drop(self, request: kv_pb2.DropRequest, context: Any) -> kv_pb2.DropReply:
        if self.failure:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.failure)
        self.drops.append(request)
        return kv_pb2.DropReply(num_blocks=self.num_held)


class FakeDirectory(directory_pb2_grpc.DirectoryServicer):
    def __init__(self, workers: list[worker_pb2.WorkerDescription]) -> None:
        self._workers = workers

    def Watch(self, request: directory_pb2.WatchRequest, context: Any) -> Iterator[directory_pb2.WatchEvent]:
        for worker in self._workers:
            yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.JOINED, worker=worker)
        yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.SYNCED)


Serve = Callable[..., None]


@pytest.fixture
def serve(run_dir: Path) -> Iterator[Serve]:
    """A cluster's state file, its directory, and the tiers of its workers; its first directory is gone."""
    servers = []

    def listen(address: str, add: Callable[[grpc.Server], None]) -> None:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        add(server)
        server.add_insecure_port(address)
        server.start()
        servers.append(server)

    def start(*workers: FakeTiers) -> None:
        described = []
        for epoch, tiers in enumerate(workers, start=1):
            address = f"unix:{run_dir / tiers.name}"
            listen(
                address,
                lambda server, tiers=tiers: kv_pb2_grpc.add_KvTransferServicer_to_server(tiers, server),
            )
            model = worker_pb2.ModelDescription(name=tiers.model, fingerprint=FINGERPRINT)
            described.append(
                worker_pb2.WorkerDescription(
                    worker_id=tiers.name, epoch=epoch, control_address=address, model=model
                )
            )
        directory = FakeDirectory(described)
        listen(
            f"unix:{run_dir / 'there'}",
            lambda server: directory_pb2_grpc.add_DirectoryServicer_to_server(directory, server),
        )
        gateways = [
            GatewayState(name=name, http_url="", grpc_address="", directory_address=f"unix:{run_dir / name}")
            for name in ("gone", "there")
        ]
        RunState(
            launcher=own_process_id(), ready=True, gateways=tuple(gateways), model="fake", processes=()
        ).write(run_dir)

    yield start
    for server in servers:
        server.stop(None).wait()


def run(run_dir: Path, *arguments: str, text: str | None = None) -> Any:
    command = ["cache", *arguments, "--run-dir", str(run_dir)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "160"}, input=text)


def test_shows_every_tier_with_its_hit_rate_the_compression_and_the_prefixes(
    run_dir: Path, serve: Serve
) -> None:
    serve(FakeTiers("store-0"), FakeTiers("decode-0"))
    result = run(run_dir)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1] == ["decode-0", "device", "2", "0", "B", "0", "B", "5.0%", "-", "-", "0"]
    assert lines[2] == ["decode-0", "memory", "3", "3", "MiB", "8", "MiB", "25.0%", "40", "37", "0"]
    assert lines[3] == ["decode-0", "peer", "10.0%", "2"]
    assert lines[5][:2] == ["store-0", "memory"]
    assert "hit rate: of the full blocks that were looked up on this worker" in result.stdout
    assert ["fine", "16", "MiB", "4", "MiB", "4.00"] in lines
    assert ["030303030303", "decode-0", "memory", "128", "3.0", "min", "5.0", "s", "3"] in lines


def test_before_anything_travelled_it_says_so(run_dir: Path, serve: Serve) -> None:
    serve(FakeTiers("decode-0", is_fresh=True))
    result = run(run_dir)
    assert "Nothing has been fetched from other workers yet (" in result.stdout
    assert "coded" not in result.stdout


def test_the_longest_lived_prefixes_of_all_workers_come_first(run_dir: Path, serve: Serve) -> None:
    serve(FakeTiers("a"), FakeTiers("b"))
    report = json.loads(run(run_dir, "--json", "--prefixes", "4").stdout)
    assert [(prefix["worker"], prefix["age_s"]) for prefix in report["prefixes"]] == [
        ("a", 180.0),
        ("b", 180.0),
        ("a", 120.0),
        ("b", 120.0),
    ]
    assert report["prefixes"][0]["num_tokens"] == 128
    assert report["workers"][0]["tiers"][1]["hit_rate"] == 0.25
    assert report["levels"] == [
        {"name": "fine", "raw_bytes": 16 * 2**20, "coded_bytes": 4 * 2**20, "ratio": 4.0}
    ]


def test_a_worker_that_does_not_answer_is_named_and_is_a_failure(run_dir: Path, serve: Serve) -> None:
    serve(FakeTiers("decode-0"), FakeTiers("decode-1", failure="the disk is on fire"))
    result = run(run_dir)
    assert result.exit_code == 1
    assert result.stderr == "penstock: decode-1 does not say what it holds: internal: the disk is on fire\n"
    assert "25.0%" in result.stdout
    assert "decode-1" not in result.stdout


def test_dropping_a_salt_names_the_tenants_root_to_every_worker(run_dir: Path, serve: Serve) -> None:
    workers = [FakeTiers("decode-0"), FakeTiers("store-0")]
    serve(*workers)
    result = run(run_dir, "drop", "--salt", "tenant-7")
    assert result.exit_code == 0
    assert result.stdout == f"decode-0: {DROPPED}\nstore-0: {DROPPED}\n"
    root = root_key(model_fingerprint=FINGERPRINT, cache_salt="tenant-7")
    assert [worker.drops[0].root for worker in workers] == [root, root]
    assert [worker.drops[0].source_epoch for worker in workers] == [1, 2]


def test_the_empty_salt_is_a_tenant_too(run_dir: Path, serve: Serve) -> None:
    worker = FakeTiers("decode-0")
    serve(worker)
    assert run(run_dir, "drop", "--salt", "").exit_code == 0
    assert worker.drops[0].root == root_key(model_fingerprint=FINGERPRINT)


def test_a_salt_that_nobody_used_is_no_error(run_dir: Path, serve: Serve) -> None:
    serve(FakeTiers("decode-0", num_held=0))
    result = run(run_dir, "drop", "--salt", "tenant-8")
    assert result.exit_code == 0
    assert result.stdout == "decode-0: held nothing of this salt; one that nobody used is no error\n"
    assert run(run_dir, "drop", "--all", "-y").stdout == "decode-0: held nothing\n"


def test_dropping_a_model_asks_its_workers_for_all(run_dir: Path, serve: Serve) -> None:
    one, other = FakeTiers("decode-0", model="one"), FakeTiers("decode-1", model="other")
    serve(one, other)
    assert run(run_dir, "drop", "--model", "other").exit_code == 0
    assert (len(one.drops), [drop.root for drop in other.drops]) == (0, [b""])
    result = run(run_dir, "drop", "--model", "third")
    assert result.exit_code == 1
    assert result.stderr == "penstock: no worker has the model 'third'; known here: one, other\n"


def test_dropping_all_asks_first(run_dir: Path, serve: Serve) -> None:
    worker = FakeTiers("decode-0")
    serve(worker)
    refused = run(run_dir, "drop", "--all", text="n\n")
    assert refused.exit_code == 1
    assert "Forget all KV of decode-0?" in refused.stdout
    assert worker.drops == []
    assert run(run_dir, "drop", "--all", text="y\n").exit_code == 0
    assert run(run_dir, "drop", "--all", "--yes").exit_code == 0
    assert [drop.root for drop in worker.drops] == [b"", b""]


def test_one_worker_can_be_named(run_dir: Path, serve: Serve) -> None:
    workers = [FakeTiers("decode-0"), FakeTiers("decode-1")]
    serve(*workers)
    assert run(run_dir, "drop", "--all", "-y", "--worker", "decode-1").exit_code == 0
    assert [len(worker.drops) for worker in workers] == [0, 1]
    result = run(run_dir, "drop", "--all", "--worker", "decode-9")
    assert result.stderr == "penstock: there is no worker 'decode-9'; known here: decode-0, decode-1\n"


def test_a_worker_that_drops_nothing_is_a_failure_and_the_others_drop(run_dir: Path, serve: Serve) -> None:
    serve(FakeTiers("decode-0", failure="another epoch"), FakeTiers("decode-1"))
    result = run(run_dir, "drop", "--all", "-y")
    assert result.exit_code == 1
    assert result.stdout == f"decode-1: {DROPPED}\n"
    assert result.stderr == "penstock: decode-0 dropped nothing: failed_precondition: another epoch\n"


@pytest.mark.parametrize("flags", [[], ["--all", "--salt", "a"], ["--model", "m", "--all"]])
def test_what_to_drop_must_be_said_in_one_way(flags: list[str], run_dir: Path) -> None:
    result = run(run_dir, "drop", *flags)
    assert result.exit_code == 2
    assert result.stderr == "penstock: cache drop needs exactly one of --salt, --model and --all\n"


def test_a_salt_that_is_no_text_is_refused(run_dir: Path, serve: Serve) -> None:
    serve(FakeTiers("decode-0"))
    result = run(run_dir, "drop", "--salt", "a\udcff")  # as the shell's byte ff arrives
    assert result.exit_code == 2
    assert result.stderr == "penstock: --salt must be text in UTF-8, got 'a\\udcff'\n"


def test_the_run_directory_may_be_named_before_drop(run_dir: Path, serve: Serve) -> None:
    serve(FakeTiers("decode-0"))
    result = CliRunner().invoke(app, ["cache", "--run-dir", str(run_dir), "drop", "--salt", "s"])
    assert result.stdout == f"decode-0: {DROPPED}\n"


def test_where_nothing_runs_it_says_so(run_dir: Path) -> None:
    for arguments in ([], ["drop", "--all", "-y"]):
        result = run(run_dir, *arguments)
        assert result.exit_code == 1
        assert (
            result.stderr
            == f"penstock: nothing runs in {run_dir}; penstock up starts one, --run-dir names another\n"
        )


def test_a_cluster_without_a_directory_is_a_failure(run_dir: Path) -> None:
    gateway = GatewayState(
        name="g", http_url="", grpc_address="", directory_address=f"unix:{run_dir / 'none'}"
    )
    RunState(launcher=own_process_id(), ready=True, gateways=(gateway,), model="m", processes=()).write(
        run_dir
    )
    result = run(run_dir)
    assert result.exit_code == 1
    assert "no directory answers at unix:" in result.stderr


def test_bytes_and_durations_are_for_reading() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1536, 2**20, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1 MiB",
        "5 TiB",
    ]
    assert [format_duration(seconds) for seconds in (0.25, 90, 5400, 172_800)] == [
        "0.2 s",
        "1.5 min",
        "1.5 h",
        "2.0 d",
    ]
