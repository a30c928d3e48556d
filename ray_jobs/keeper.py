"""Keeps a command running until it has saved, also when the Ray worker that started it is gone.

    python -m ray_jobs.keeper LOG COMMAND ARGUMENT...

Ray kills a stopped job's driver after three seconds and then its workers with all their children; a checkpoint takes
longer. So this process leaves its parent (Ray looks for children) and its session. The end of its stdin, which the
worker holds, is the request to stop: the worker closes it, or its death does. What the command prints goes to LOG,
which no death can close; its exit status goes to stdout.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Runs the command to its end."""
    log, *command = sys.argv[1:]
    if os.fork():
        os._exit(0)
    os.setsid()
    # A worker that is gone reads no status.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with open(log, "ab") as file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    threading.Thread(target=_stop_at_end_of_stdin, args=(child,), daemon=True).start()
    status = child.wait()
    with contextlib.suppress(OSError):
        print(status if status >= 0 else 128 - status, flush=True)
    os._exit(0)


def _stop_at_end_of_stdin(child: "subprocess.Popen[bytes]") -> None:
    sys.stdin.buffer.read()
    with contextlib.suppress(ProcessLookupError):
        child.terminate()


if __name__ == "__main__":
    main()
