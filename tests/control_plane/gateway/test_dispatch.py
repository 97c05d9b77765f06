
from control_plane.generation import FinishReason
from tests.control_plane.fake_cluster import Cluster, collect, make_generation
from tests.control_plane.fake_worker import FakeWorker, expected_tokens


async def test_a_generation_on_one_worker_yields_every_token_and_the_end(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("decode-0"))
    generation = make_generation(max_tokens=5)
    chunks = await collect(cluster.dispatcher(), generation)
    assert [token for chunk in chunks for token in chunk.token_ids] == expected_tokens(
        generation.prompt_token_ids, 5
    )
    assert [chunk.finish_reason for chunk in chunks][-1] is FinishReason.LENGTH
    assert cluster.num_requests == 0
    assert worker.aborts == []
