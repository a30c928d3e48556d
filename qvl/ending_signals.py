"""The signals that ask a run to end: SIGTERM, and SIGHUP of a terminal that is gone."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None]


def take_over(handler: Handler) -> dict[int, Any]:
    """Has `handler` called in a process's main thread, which is the one that gets signals.

    Args:
        handler: called with the signal, once nothing is written to a terminal that is gone.

    Returns:
        The handlers before, for `give_back`.
    """
    # A terminal that is gone no longer says that it is one.
    terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _write_to_nowhere(terminals)
        handler(number, frame)

    # Whoever ignores it, as nohup does, wants the run to go on.
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    return {number: signal.signal(number, handle) for number in numbers}


def give_back(previous: dict[int, Any]) -> None:
    """Puts the handlers of `take_over` back."""
    for number, handler in previous.items():
        signal.signal(number, handler or signal.SIG_DFL)


def _write_to_nowhere(terminals: Sequence[int]) -> None:
    """A terminal that is gone refuses every line, in the midst of what is to be saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)
