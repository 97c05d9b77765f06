import subprocess
import sys

import pytest

from bench import network
from bench.cluster import free_port
from bench.network import Link, shaped_link

NUM_BYTES = 400_000
SERVE = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as listener:
    print("listening", flush=True)
    connection, _ = listener.accept()
    connection.sendall(bytes(range(256)) * (int(sys.argv[3]) // 256) + bytes(int(sys.argv[3]) % 256))
    connection.close()
"""
FETCH = """
import socket, sys, time
began_s = time.perf_counter()
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as connection:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
data = b"".join(parts)
print(len(data), sum(data), time.perf_counter() - began_s)
"""


def namespaces() -> set[str]:
    listed = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def fetch(link: Link, port: int) -> tuple[int, int, float]:
    """(bytes, their sum, seconds) of a transfer from the source's end to the puller's."""
    serve = [*link.source_prefix, sys.executable, "-c", SERVE, link.source_host, str(port), str(NUM_BYTES)]
    host = link.source_flags[1] if link.source_flags else link.source_host
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as source:
        assert source.stdout is not None
        assert source.stdout.readline() == "listening\n"
        command = [*link.puller_prefix, sys.executable, "-c", FETCH, host, str(port)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    num_bytes, checksum, seconds = done.stdout.split()
    return int(num_bytes), int(checksum), float(seconds)


@pytest.mark.parametrize("has_rights", [True, False])
def test_what_passes_is_whole_and_no_faster_than_the_link(
    has_rights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_rights:
        monkeypatch.setattr(network, "_may_make_namespaces", lambda: False)
    elif not network._may_make_namespaces():
        pytest.skip("needs the rights to make network namespaces")
    port = free_port()
    with shaped_link(data_port=port) as link:
        link.set_rate(16.0)
        num_bytes, checksum, slow_s = fetch(link, port)
        assert num_bytes == NUM_BYTES
        assert checksum == sum(bytes(range(256))) * (NUM_BYTES // 256)
        assert 0.15 < slow_s < 0.6  # 0.2 s at 16 Mbit/s, less the bucket
        link.set_rate(1000.0)
        assert fetch(link, port)[2] < 0.15


def test_no_namespace_is_left_behind() -> None:
    if not network._may_make_namespaces():
        pytest.skip("needs the rights to make network namespaces")
    before = namespaces()

    def fail_inside() -> None:
        with shaped_link(data_port=1):
            assert len(namespaces() - before) == 2
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert namespaces() == before
