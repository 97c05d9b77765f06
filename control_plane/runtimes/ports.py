"""Free ports, checked before anything is loaded: a busy one costs a moment and not a minute."""

import socket
from dataclasses import dataclass, replace

from control_plane.config import ClusterConfig
from control_plane.runtimes.errors import PortBusy, RuntimeFailure

_ATTEMPTS = 20  # to find as many free ports in a row as there are replicas


def with_free_ports(config: ClusterConfig) -> ClusterConfig:
    """The same settings with every port 0 replaced by a free one, the replicas' ports behind it free as well.

    Raises PortBusy, which names the setting.
    Another program can still take a port before its server binds it; the server's own error tells then.
    """
    gateway, replicas = config.gateway, range(config.gateway.replicas)
    held: list[socket.socket] = []
    try:
        http = _Setting("gateway.port", "--port", gateway.host)
        http_port = _bind_row(held, http, gateway.port, replicas)
        grpc = _Setting("gateway.grpc_port", "--grpc-port", gateway.host)
        grpc_port = _bind_row(held, grpc, gateway.grpc_port, replicas)
        directory = config.directory
        if config.transport == "tcp":
            setting = _Setting("directory.port", "--set directory.port", directory.host)
            directory = replace(directory, port=_bind_row(held, setting, directory.port, replicas))
    finally:
        for bound in held:
            bound.close()
    return replace(config, gateway=replace(gateway, port=http_port, grpc_port=grpc_port), directory=directory)


@dataclass(frozen=True, slots=True)
class _Setting:
    name: str
    flag: str
    host: str


def _bind_row(held: list[socket.socket], setting: _Setting, first_port: int, replicas: range) -> int:
    """Holds a port for every replica, each the next one, and returns the first."""
    for attempt in range(_ATTEMPTS):
        bound: list[socket.socket] = []
        try:
            port = first_port
            for replica in replicas:
                port = _bind(bound, setting, port + 1 if replica else first_port)
        except PortBusy:
            for one in bound:
                one.close()
            if first_port or attempt == _ATTEMPTS - 1:
                raise
        else:
            held += bound
            return port - len(replicas) + 1
    raise AssertionError("unreachable")


def _bind(held: list[socket.socket], setting: _Setting, port: int) -> int:
    host = setting.host
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as e:
        raise RuntimeFailure(f"{setting.name}: the host {host!r} is unknown: {e.strerror}") from e
    bound = socket.socket(family, kind, protocol)
    held.append(bound)
    # Connections of an earlier run in TIME_WAIT are no obstacle; a listening socket is.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(1)
    except OSError as e:
        raise PortBusy(
            f"{setting.name}: cannot listen on {host}:{port}: {e.strerror}; "
            f"choose another with {setting.flag} (0 takes a free one)"
        ) from e
    return int(bound.getsockname()[1])


def reachable_host(host: str) -> str:
    """The host under which this machine reaches a server that listens on `host`, ready for a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
