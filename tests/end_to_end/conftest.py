"""Real clusters: `penstock up` with the model that ships with us, one process per worker."""

from collections.abc import Callable, Iterator

import pytest
from openai import OpenAI

from bench.cluster import RunningCluster, running_cluster
from tests.end_to_end.kv_site import ONE_WORKER, Site

DISAGGREGATED = {
    "routing": {"prefill_threshold_tokens": 32},
    "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}},
}
MIXED = {"pools": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 1}}}


@pytest.fixture(scope="session")
def disaggregated() -> Iterator[RunningCluster]:
    with running_cluster(DISAGGREGATED) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def mixed() -> Iterator[RunningCluster]:
    with running_cluster(MIXED) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.stop()


@pytest.fixture(scope="session")
def plain() -> Iterator[OpenAI]:
    """A client of a cluster without tiers."""
    with (
        running_cluster({"pools": ONE_WORKER, "kv": {"memory_tier_bytes": 0}}) as cluster,
        OpenAI(base_url=cluster.url, api_key="unused", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.fixture
def connect() -> Iterator[Callable[[RunningCluster], OpenAI]]:
    """Makes official clients that never retry by themselves, so that no failure is hidden."""
    clients = []

    def open_client(cluster: RunningCluster) -> OpenAI:
        clients.append(OpenAI(base_url=cluster.url, api_key="unused", max_retries=0, timeout=60))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()
