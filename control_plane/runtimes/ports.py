"""Free ports, checked before anything is loaded: a busy one costs a moment and not a minute."""

import socket
from dataclasses import replace

from control_plane.config import ClusterConfig
from control_plane.runtimes.errors import PortBusy, RuntimeFailure


def with_free_ports(config: ClusterConfig) -> ClusterConfig:
    """The same settings with every port 0 replaced by a free one. Raises PortBusy, which names the setting.

    Another program can still take a port before its server binds it; the server's own error tells then.
    """
    gateway = config.gateway
    held: list[socket.socket] = []
    try:
        http_port = _bind(held, gateway.host, gateway.port, setting="gateway.port", flag="--port")
        grpc_port = _bind(
            held, gateway.host, gateway.grpc_port, setting="gateway.grpc_port", flag="--grpc-port"
        )
        directory = config.directory
        if config.transport == "tcp":
            flag = "--set directory.port"
            port = _bind(held, directory.host, directory.port, setting="directory.port", flag=flag)
            directory = replace(directory, port=port)
    finally:
        for bound in held:
            bound.close()
    return replace(config, gateway=replace(gateway, port=http_port, grpc_port=grpc_port), directory=directory)


def _bind(held: list[socket.socket], host: str, port: int, *, setting: str, flag: str) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as e:
        raise RuntimeFailure(f"{setting}: the host {host!r} is unknown: {e.strerror}") from e
    bound = socket.socket(family, kind, protocol)
    held.append(bound)
    # Connections of an earlier run in TIME_WAIT are no obstacle; a listening socket is.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(1)
    except OSError as e:
        raise PortBusy(
            f"{setting}: cannot listen on {host}:{port}: {e.strerror}; "
            f"choose another with {flag} (0 takes a free one)"
        ) from e
    return int(bound.getsockname()[1])


def reachable_host(host: str) -> str:
    """The host under which this machine reaches a server that listens on `host`, ready for a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
