"""uvicorn's HTTP protocol, with a way for the application to reset a connection whose client no longer reads."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from control_plane.gateway.stream import ABORT_EXTENSION


class GatewayProtocol(HttpToolsProtocol):
    """Offers `ABORT_EXTENSION`: to close politely would wait for the unsent bytes, for ever if nobody reads them."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT_EXTENSION: self.transport.abort}  # type: ignore[dict-item]
