from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from workers.channels import Channels
from workers.grpc_options import SERVER_OPTIONS


async def is_healthy(channels: Channels, target: str) -> bool:
    async with channels.use(target) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5.0)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_new_channel_does_not_inherit_the_back_off_of_another_to_the_same_address(
    tmp_path: Path,
) -> None:
    target = f"unix:{tmp_path}/s"
    early, late = Channels(max_idle=2), Channels(max_idle=2)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await is_healthy(early, target)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    server = grpc.aio.server(options=SERVER_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    server.add_insecure_port(target)
    await server.start()
    assert await is_healthy(late, target)
    await early.close()
    await late.close()
    await server.stop(None)


async def test_unused_channels_beyond_the_bound_are_closed() -> None:
    channels = Channels(max_idle=2)
    async with channels.use("127.0.0.1:1") as held:
        for port in (2, 3, 4, 5):
            async with channels.use(f"127.0.0.1:{port}"):
                pass
        assert len(channels) == 3  # two idle ones and the one in use
        async with channels.use("127.0.0.1:1") as again:
            assert again is held
    assert len(channels) == 2
    await channels.close()
    assert len(channels) == 0
