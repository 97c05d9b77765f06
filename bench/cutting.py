"""Cuts every connection of another process, from outside: both ends see it end, and nobody is asked.

A socket of another process can be borrowed by its descriptor (Linux 5.6, for descendants) and shut down.
"""

import contextlib
import ctypes
import errno
import os
import socket
import subprocess
from pathlib import Path

_PIDFD_GETFD = 438  # the number of the system call on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def may_cut() -> bool:
    """Whether a socket of a child may be borrowed here: containers and Yama forbid it to some."""
    with (
        socket.socket() as ours,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[ours.fileno()]) as child,
    ):
        try:
            process = os.pidfd_open(child.pid)
            try:
                os.close(_borrow(process, ours.fileno()))
            finally:
                os.close(process)
        except OSError:
            return False
        finally:
            child.kill()
    return True


def cut_connections(pid: int) -> int:
    """How many there were. Listening sockets stay, and pairs that a process made for itself.

    Raises ProcessLookupError if it has gone, PermissionError if its sockets may not be borrowed.
    """
    num_cut = 0
    process = os.pidfd_open(pid)
    try:
        for entry in _descriptors(pid):
            with contextlib.suppress(FileNotFoundError, _Closed):  # closed by its owner meanwhile
                if os.readlink(entry).startswith("socket:"):
                    with socket.socket(fileno=_borrow(process, int(entry.name))) as borrowed:
                        num_cut += _cut(borrowed)
    finally:
        os.close(process)
    return num_cut


def _descriptors(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has gone") from error


class _Closed(Exception):
    """The descriptor is none any more."""


def _borrow(process: int, descriptor: int) -> int:
    borrowed = int(_libc.syscall(_PIDFD_GETFD, process, descriptor, 0))
    if borrowed >= 0:
        return borrowed
    error = ctypes.get_errno()
    if error == errno.EBADF:
        raise _Closed
    raise OSError(error, os.strerror(error))


def _cut(borrowed: socket.socket) -> bool:
    try:
        is_pair = borrowed.family == socket.AF_UNIX and not (borrowed.getsockname() or borrowed.getpeername())
        if is_pair:
            return False
        borrowed.getpeername()
        borrowed.shutdown(socket.SHUT_RDWR)
    except OSError:  # it listens, or has ended already
        return False
    return True
