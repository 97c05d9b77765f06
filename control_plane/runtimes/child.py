"""Becomes another program after two settings that must be made inside the new process. Run as a script:

    python -I child.py PARENT_PID CORES PROGRAM [ARGUMENT ...]

The kernel kills the process when the launcher ends, however it ends (prctl(2), PR_SET_PDEATHSIG, which
survives execve); and it stays on CORES ("0,1"; "" for any). A script of its own and not `preexec_fn`, which is unsafe
in a process with threads. Imports nothing of ours, so that it costs little.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent_pid, cores, *command = arguments
    # SIGKILL, for a process that hangs while it loads would not hear anything milder.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent_pid):
        sys.exit(f"the launcher, process {parent_pid}, has ended already")
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    try:
        os.execvp(command[0], command)
    except OSError as e:
        sys.exit(f"cannot run {command[0]}: {e.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
