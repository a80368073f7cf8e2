"""The MLflow UI on the project's store, and links into it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence

from fanin.files import InputError
from fanin.tracking.outbox import Outbox
from fanin.tracking.store import configured_uri, connect, quiet_mlflow, reachable

HOST = "127.0.0.1"
DEFAULT_PORT = 5000
START_SECONDS = 90.0


def compare_link(address: str, experiments: Sequence[str], runs: Sequence[str]) -> str:
    """Address of the page that shows runs side by side."""
    lists = {"runs": list(runs), "experiments": list(experiments)}
    query = urllib.parse.urlencode({name: json.dumps(ids, separators=(",", ":")) for name, ids in lists.items()})
    return f"{address.rstrip('/')}/#/compare-runs?{query}"


def free_port(wanted: int) -> int:
    """`wanted`, or the next port that nothing listens on."""
    for port in range(wanted, wanted + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
                return port
            except OSError:
                continue
    raise InputError(f"--port: {wanted} to {wanted + 49} are all in use; name another one")


def serve(port: int) -> int:
    """Start the UI and print its address; runs until Ctrl-C. With a remote server only its address is printed."""
    outbox = Outbox()
    uri = configured_uri(outbox)
    if uri.startswith(("http://", "https://")):
        print(f"the runs are on {uri}")
        return 0
    quiet_mlflow()
    connect(outbox, uri)  # so that the server finds a migrated database
    try:
        port = free_port(port)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    artifacts = (outbox.root / "mlartifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--artifacts-destination", artifacts]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    log = outbox.folder / "ui.log"
    address = f"http://{HOST}:{port}"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=outbox.root)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must not outlive this process
    try:
        began = time.monotonic()
        while reachable(address) is not None:
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                print(f"error: the UI did not start; its log is {log}", file=sys.stderr)
                return 1
            time.sleep(0.3)
        print(f"{address} shows the runs; Ctrl-C ends it", flush=True)
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
