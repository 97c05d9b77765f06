"""Where a data plane listens: "tcp://10.0.0.3:4002", "tcp://[::1]:4002" or "unix:///run/penstock/worker.sock"."""

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True, slots=True)
class TcpAddress:
    host: str
    port: int  # 0 listens on any free port

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Raises ValueError that names `text` and the two forms an address may have."""
    try:
        parts = urlsplit(text)
        match parts.scheme:
            case "tcp" if parts.hostname and parts.port is not None and parts.path == "":
                return TcpAddress(host=parts.hostname, port=parts.port)
            case "unix" if parts.netloc == "" and parts.path.startswith("/"):
                return UnixAddress(path=text.removeprefix("unix://"))
    except ValueError as error:
        raise ValueError(f"not a data address: {text!r} ({error})") from error
    raise ValueError(f"not a data address: {text!r}, must be tcp://HOST:PORT or unix:///PATH")
