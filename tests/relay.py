"""A link between two ends that a test can freeze, slow down, break and cut in the middle of what is said."""

import asyncio
import contextlib

from kvstore.addresses import Address, TcpAddress, UnixAddress

PIECE_BYTES = 16 * 1024


class Relay:
    """Passes on what either end says. To clients it is the server, at an address of its own."""

    def __init__(self) -> None:
        self.max_answer_bytes: int | None = None  # of the server, over all connections; the rest is held back
        self.is_holding = asyncio.Event()  # something is held back
        self.delay_s = 0.0  # of everything the server says
        self._flows = asyncio.Event()
        self._flows.set()
        self._num_answer_bytes = 0
        self._server: asyncio.Server | None = None
        self._target: Address | None = None
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def num_connections(self) -> int:
        return len(self._pumps)

    async def start(self, target: Address) -> TcpAddress:
        self._target = target
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return TcpAddress(host="127.0.0.1", port=self._server.sockets[0].getsockname()[1])

    async def start_unix(self, target: UnixAddress, path: str) -> None:
        self._target = target
        self._server = await asyncio.start_unix_server(self._connected, path)

    def freeze(self) -> None:
        """Nothing passes any more, neither way; new connections are taken and hear nothing."""
        self._flows.clear()

    def thaw(self) -> None:
        self.max_answer_bytes = None
        self._flows.set()

    def hold_after(self, num_bytes: int) -> None:
        """Of what the server says from now on."""
        self.is_holding.clear()
        self.max_answer_bytes = self._num_answer_bytes + num_bytes

    async def cut(self) -> None:
        """Every connection ends now; new ones are taken as before."""
        pumps = tuple(self._pumps)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()
        await self._server.wait_closed()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pump = asyncio.ensure_future(self._pump(reader, writer))
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until one of both ends leaves."""
        ends, ways = [writer], []
        try:
            await self._flows.wait()
            match self._target:
                case TcpAddress(host=host, port=port):
                    server_reader, server_writer = await asyncio.open_connection(host, port)
                case UnixAddress(path=path):
                    server_reader, server_writer = await asyncio.open_unix_connection(path)
                case _:
                    raise AssertionError("the relay was not started")
            ends.append(server_writer)
            ways = [
                asyncio.ensure_future(self._pass_on(reader, server_writer, is_answer=False)),
                asyncio.ensure_future(self._pass_on(server_reader, writer, is_answer=True)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            return  # nobody is there: to the client, the connection ends
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in ends:
                end.transport.abort()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(PIECE_BYTES):
                if is_answer:
                    await asyncio.sleep(self.delay_s)
                    data = self._allowed(data)
                await self._flows.wait()
                writer.write(data)
                await writer.drain()

    def _allowed(self, data: bytes) -> bytes:
        """What exceeds the bytes that may pass is lost, and with it all that comes after."""
        if self.max_answer_bytes is not None:
            room_bytes = max(0, self.max_answer_bytes - self._num_answer_bytes)
            if len(data) > room_bytes:
                data = data[:room_bytes]
                self.is_holding.set()
        self._num_answer_bytes += len(data)
        return data
