"""A stand-in for the processes of a cluster that follows their protocol with the launcher, started as a script:

    python fake_process.py control CONFIG REPLICA | worker SOCKET BEHAVIOUR

It writes JSON log lines, serves /ready (control) or a Unix socket (worker), and ends on SIGTERM.
"""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from control_plane.config import load_config, replica_port


def say(event: str, **fields: object) -> None:
    print(json.dumps({"level": "info", "event": event, **fields}), flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"status": "ok"}'
        self.send_response(200 if self.path == "/ready" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def control(config_path: str, replica: str) -> None:
    gateway = load_config(Path(config_path)).gateway
    address = (gateway.host, replica_port(gateway.port, int(replica)))
    server = http.server.ThreadingHTTPServer(address, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say("ready")


def worker(socket_path: str, behaviour: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    say("loading_weights", progress=0.5)
    if behaviour == "fails":
        say("load_failed", level="error", reason="no such checkpoint")
        sys.exit(2)
    if behaviour == "ends at once when started again" and '"ready"' in Path("/proc/self/fd/1").read_text():
        sys.exit(0)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(socket_path)
    if behaviour == "never ready":
        signal.pause()
    if behaviour == "has a child":
        child = subprocess.Popen(["sleep", "600"])
        say("child_started", pid=child.pid)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    say("ready", cores=cores, omp_num_threads=os.environ["OMP_NUM_THREADS"])
    if behaviour in ("ignores SIGTERM", "has a child"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pause()


if __name__ == "__main__":
    {"control": control, "worker": worker}[sys.argv[1]](*sys.argv[2:])
    signal.pause()
