from workers.channels import Channels


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
