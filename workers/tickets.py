"""One listener of the data plane for all that can be pulled: a connection's ticket says what it is for."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from kvstore.data_plane import Connection
from kvstore.errors import TransferError
from kvstore.transfer import receive_ticket, refuse

TICKET_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class TicketIssuer(Protocol):
    """Hand-overs (`workers.exports`) and blocks by key (`workers.block_exports`)."""

    async def serve(self, connection: Connection, ticket: bytes) -> bool:
        """Handles the connection to its end. False, at once, if the ticket is none of its own."""


class TicketDesk:
    """`serve` is the listener's handler."""

    def __init__(self, issuers: Sequence[TicketIssuer], *, timeout_s: float = TICKET_TIMEOUT_S) -> None:
        self._issuers = issuers
        self._timeout_s = timeout_s

    async def serve(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                ticket = await receive_ticket(connection)
        except (TransferError, TimeoutError) as error:
            logger.warning("no ticket from %s: %s", connection.peer, error)
            return
        for issuer in self._issuers:
            if await issuer.serve(connection, ticket):
                return
        await refuse(connection, "the ticket is unknown, used or void")
