"""A Ray head of a test's own, as a user starts one; ended by its process group, never by `ray stop`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
_START_SECONDS = 120
# Ray's workers give way to every other process unless told otherwise: beside other tests they would starve. A token
# that another Ray has left in the home folder would be asked for by every port.
QUICK = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "150",
    "RAY_worker_niceness": "0",
}


@dataclass
class Head:
    """Attributes: addresses of its GCS (for drivers) and of its dashboard (for jobs); its temporary folder."""

    address: str
    dashboard: str
    scratch: Path

    def environment(self) -> dict[str, str]:
        """What `ray job submit` and drivers find it by."""
        return {**clean_environment(), "RAY_ADDRESS": self.dashboard}


def clean_environment() -> dict[str, str]:
    """This process's, with the project's interpreter first and without what would lead to another Ray or MLflow."""
    left_out = ("RAY_", "MLFLOW_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**variables, **QUICK, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens at now."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def local_head(num_gpus: int, folder: Path = ROOT) -> Iterator[Head]:
    """Starts `ray start --head` in a folder, with GPUs that need not exist."""
    # Ray's sockets lie in it, and their paths may have 107 characters.
    scratch = tempfile.mkdtemp(prefix="qvl-ray-", dir="/tmp")
    port, dashboard, client, agent = free_ports(4)
    words = f"--port {port} --dashboard-host 127.0.0.1 --dashboard-port {dashboard} --node-ip-address 127.0.0.1"
    words += f" --ray-client-server-port {client} --dashboard-agent-listen-port {agent} --num-cpus 4"
    words += f" --num-gpus {num_gpus} --temp-dir {scratch} --object-store-memory 100000000 --block"
    with open(Path(scratch, "start.log"), "wb") as log:
        process = subprocess.Popen(
            [str(BIN / "ray"), "start", "--head", *words.split()],
            cwd=folder,
            env=clean_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        log = Path(scratch, "start.log")
        _wait_for(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", process, log)
        _wait_for(f"http://127.0.0.1:{dashboard}/api/version", process, log)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", Path(scratch))
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Returns when the node's agent, which starts the jobs, or the dashboard, which takes them, answers."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            urllib.request.urlopen(address, timeout=2).read()
            return
        time.sleep(0.3)
    raise TimeoutError(f"Ray did not start: {log.read_text()[-3000:]}")
