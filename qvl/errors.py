"""Errors that are the user's to mend: printed as one message, without a traceback; and how other errors are quoted."""

import re


class UserError(ValueError):
    """Something in the command line, the configuration or the data has to be changed by the user.

    The message says what is wrong, where (file, line, key or row) and what to do about it.
    """


class HubError(UserError):
    """A hub, or its local cache, does not give what was asked for; a dry run goes on without it."""


class StoreError(UserError):
    """The MLflow store cannot be read or written; the same run may go well when it answers again."""


class FailedCheckError(UserError):
    """An invariant does not hold, so a result cannot be trusted; the process exits with 1."""


class Terminated(SystemExit):
    """SIGTERM was received: what is open is saved and closed, then the process exits with 143 (128 + 15)."""

    def __init__(self) -> None:
        super().__init__(143)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name if it has none."""
    return re.split(r"[\r\n]", str(error).strip(), maxsplit=1)[0] or type(error).__name__
