"""The signals that ask a run to end: SIGTERM, and SIGHUP of a terminal that is closed."""

import errno
import io
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None]


def take_over(handler: Handler) -> dict[int, Any]:
    """Has `handler` called in a process's main thread, which is the one that gets signals.

    Returns:
        The handlers before, for `give_back`.
    """
    # Whoever ignores it, as nohup does, wants the run to go on.
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    return {number: signal.signal(number, handler) for number in numbers}


def give_back(previous: dict[int, Any]) -> None:
    """Puts the handlers of `take_over` back."""
    for number, handler in previous.items():
        signal.signal(number, handler or signal.SIG_DFL)


class _Terminal(io.FileIO):
    """A terminal that takes every line when it is gone, where it would refuse them."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def outlive_terminal() -> None:
    """Lets this process write to a terminal that is closed, in the midst of what is to be saved."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            stream.flush()
            lines = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            text = io.TextIOWrapper(lines, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
            setattr(sys, name, text)
