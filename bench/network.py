"""A link of a chosen bandwidth between two processes of this machine.

`NamespaceLink` is two network namespaces joined by a veth pair, each end shaped by a token bucket (tc tbf): what leaves
a process is what a slower card would let through, and the kernel's TCP reacts to it. It needs the rights to make
namespaces. `RelayLink` needs none: a relay between the two sends no faster than it may; TCP ends at it. Neither adds
latency (netem is not in every kernel).
"""

import os
import re
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_SOURCE_HOST, _PULLER_HOST, _NETWORK_BITS = "10.213.17.1", "10.213.17.2", 30
_DEVICE = "kv"
_RELAY_HOST = "127.0.0.2"
_BUCKET_S = 0.001  # of sending at once; a smaller bucket cannot keep up with the timer's ticks
_LEAST_BUCKET_BYTES = 32 * 1024
_QUEUE_MS = 20
_RELAY_BYTES = 64 * 1024


class Link(Protocol):
    """`source_host` is where the source listens, `source_flags` what it must say of itself, on `data_port`.

    `source_prefix` and `puller_prefix` come before the commands of the two processes.
    """

    name: str
    source_host: str
    source_flags: Sequence[str]
    source_prefix: Sequence[str]
    puller_prefix: Sequence[str]

    def set_rate(self, mbit_s: float) -> None:
        """In both directions, from now on, also for what is on its way."""


@contextmanager
def shaped_link(*, data_port: int) -> Iterator[Link]:
    """The better of the two that this process has the rights for; nothing of it is left afterwards."""
    link: AbstractContextManager[Link] = _namespaces() if _may_make_namespaces() else _relay(data_port)
    with link as opened:
        yield opened


@dataclass(slots=True)
class NamespaceLink:
    namespaces: tuple[str, str]
    source_prefix: Sequence[str]
    puller_prefix: Sequence[str]
    name: str = "network namespaces, tc tbf"
    source_host: str = _SOURCE_HOST
    source_flags: Sequence[str] = ()

    def set_rate(self, mbit_s: float) -> None:
        bucket_bytes = max(_LEAST_BUCKET_BYTES, int(mbit_s * 1e6 / 8 * _BUCKET_S))
        for namespace in self.namespaces:
            _run(
                "tc", "-n", namespace, "qdisc", "replace", "dev", _DEVICE, "root", "tbf",
                "rate", f"{mbit_s:g}mbit", "burst", str(bucket_bytes), "latency", f"{_QUEUE_MS}ms",
            )  # fmt: skip


def _may_make_namespaces() -> bool:
    name = _namespace("probe")
    try:
        _run("ip", "netns", "add", name)
        _run("tc", "-n", name, "qdisc", "show")
        return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        _remove(name)


@contextmanager
def _namespaces() -> Iterator[NamespaceLink]:
    _remove_those_of_the_dead()
    source, puller = _namespace("source"), _namespace("puller")
    try:
        for name in (source, puller):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        ends = ("name", _DEVICE, "type", "veth", "peer", "name", _DEVICE, "netns", puller)
        _run("ip", "-n", source, "link", "add", *ends)
        for name, host in ((source, _SOURCE_HOST), (puller, _PULLER_HOST)):
            _run("ip", "-n", name, "addr", "add", f"{host}/{_NETWORK_BITS}", "dev", _DEVICE)
            _run("ip", "-n", name, "link", "set", _DEVICE, "up")
        in_namespace = ("ip", "netns", "exec")
        yield NamespaceLink(
            namespaces=(source, puller),
            source_prefix=(*in_namespace, source),
            puller_prefix=(*in_namespace, puller),
        )
    finally:
        _remove(source)
        _remove(puller)


def _namespace(role: str) -> str:
    return f"penstock-{os.getpid()}-{role}"


def _remove_those_of_the_dead() -> None:
    """A bench that was killed could not clear up."""
    listed = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True, check=True).stdout
    for match in re.finditer(r"^penstock-(\d+)-\w+", listed, re.MULTILINE):
        if not Path(f"/proc/{match[1]}").exists():
            _remove(match[0])


def _remove(namespace: str) -> None:
    with suppress(OSError):
        subprocess.run(("ip", "netns", "del", namespace), capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass(slots=True)
class RelayLink:
    """Listens where the source says it does and passes on what comes, at most so fast in each direction."""

    data_port: int
    name: str = "throttled relay"
    source_host: str = "127.0.0.1"
    source_flags: Sequence[str] = ("--advertise-host", _RELAY_HOST)
    source_prefix: Sequence[str] = ()
    puller_prefix: Sequence[str] = ()
    bytes_s: float = 12.5e6
    stopping: threading.Event = field(default_factory=threading.Event)

    def set_rate(self, mbit_s: float) -> None:
        self.bytes_s = mbit_s * 1e6 / 8

    def serve(self, listener: socket.socket) -> None:
        while not self.stopping.is_set():
            if not select.select([listener], [], [], 0.1)[0]:
                continue
            puller, _ = listener.accept()
            source = socket.create_connection((self.source_host, self.data_port))
            for receiving, sending in ((puller, source), (source, puller)):
                threading.Thread(target=self._pass_on, args=(receiving, sending), daemon=True).start()

    def _pass_on(self, receiving: socket.socket, sending: socket.socket) -> None:
        buffer = memoryview(bytearray(_RELAY_BYTES))
        free_at_s = 0.0
        with receiving, suppress(OSError):
            while num_bytes := receiving.recv_into(buffer):
                sending.sendall(buffer[:num_bytes])
                free_at_s = max(free_at_s, time.perf_counter() - _BUCKET_S) + num_bytes / self.bytes_s
                time.sleep(max(0.0, free_at_s - time.perf_counter()))
            sending.shutdown(socket.SHUT_WR)


@contextmanager
def _relay(data_port: int) -> Iterator[RelayLink]:
    link = RelayLink(data_port)
    with socket.create_server((_RELAY_HOST, data_port)) as listener:
        accepting = threading.Thread(target=link.serve, args=(listener,), daemon=True)
        accepting.start()
        try:
            yield link
        finally:
            link.stopping.set()
            accepting.join()
