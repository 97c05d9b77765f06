"""Connections of a real process, cut from outside."""

import socket
import subprocess
import sys

import pytest

from bench.cutting import cut_connections, may_cut

CLIENT = """
import socket, sys
pair = socket.socketpair()
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    print("connected", flush=True)
    print("ended" if connection.recv(1) == b"" else "data", flush=True)
pair[0].send(b"x")
print("pair lives" if pair[1].recv(1) == b"x" else "pair ended", flush=True)
"""


@pytest.mark.skipif(not may_cut(), reason="sockets of other processes may not be borrowed here")
def test_both_ends_see_the_end_and_what_a_process_keeps_for_itself_stays() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", CLIENT, str(listener.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            with listener.accept()[0] as accepted:
                assert client.stdout.readline() == "connected\n"
                assert cut_connections(client.pid) == 1
                assert accepted.recv(1) == b""
                assert client.stdout.read() == "ended\npair lives\n"


def test_a_process_that_has_gone_is_named() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(ProcessLookupError):
        cut_connections(gone.pid)
