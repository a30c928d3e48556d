"""Puts an exported folder on a model hub, and says before the work begins whether that can succeed."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from qvl.errors import HubError, UserError, first_line
from qvl.redaction import redact_known_secrets


def require_hub(repo_id: str) -> None:
    """Stops where an upload cannot succeed.

    Raises:
        UserError: no valid name of a repository.
        HubError: offline by setting, no token, or the hub does not know it or cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repo_id}: {error}") from error
    if "/" not in repo_id:
        raise UserError(f"--push_to_hub {repo_id}: name the owner too, as in someone/{repo_id}.")
    if constants.HF_HUB_OFFLINE:
        raise HubError("--push_to_hub: the environment says HF_HUB_OFFLINE, so nothing can be sent. Unset it.")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise HubError("--push_to_hub: you are not logged in. `hf auth login`, or set HF_TOKEN.") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise HubError(
            f"--push_to_hub: the hub does not let you in: {redact_known_secrets(first_line(error))}"
        ) from error


def push(folder: Path, repo_id: str) -> str:
    """Uploads a folder; a repository that is not there yet is made, and is private.

    Returns:
        Its address.

    Raises:
        HubError: it could not be made or written to; the folder is as it was.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Exported by qvl")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise HubError(
            f"{folder} is complete, but was not uploaded to {repo_id}: {redact_known_secrets(first_line(error))} "
            f"Try again with `hf upload {repo_id} {folder}`."
        ) from error
    return str(url)
