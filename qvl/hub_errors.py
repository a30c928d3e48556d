"""The many ways a model hub can say no, as one line that helps."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from qvl.errors import HubError, UserError


@contextmanager
def hub_errors_explained(name: str) -> Iterator[None]:
    """Explains what goes wrong while `name` is loaded.

    Args:
        name: hub id or path, for the message.

    Raises:
        HubError: gated, missing, unreachable, not cached, or nothing loadable there.
    """
    try:
        yield
    except UserError:
        raise
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"{name} takes no such --model_init_kwargs: {error}") from error
    except ImportError as error:
        raise UserError(f"{name} cannot be loaded here: {str(error).strip().splitlines()[0]}") from error
    except (OSError, ValueError) as error:
        raise HubError(_explanation(name, error)) from error


def _explanation(name: str, error: Exception) -> str:
    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name} is gated: accept its terms on its page, then `hf auth login` or set HF_TOKEN."
    if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
        return (
            f"{name} is neither a folder here nor a repository you can see. Check the spelling; for a private one "
            "`hf auth login` or set HF_TOKEN."
        )
    offline = any(isinstance(cause, OfflineModeIsEnabled | ConnectionError) for cause in causes)
    if offline or "couldn't connect" in str(error).lower():
        return (
            f"{name} is not in the local cache and the hub cannot be reached. Check the network, set HF_ENDPOINT to a "
            "mirror, or name a local folder; private models also need `hf auth login` or HF_TOKEN."
        )
    first = str(error).strip().splitlines()[0]
    return f"{name} cannot be loaded: {first} (private or gated: `hf auth login` or HF_TOKEN; mirror: HF_ENDPOINT)"
