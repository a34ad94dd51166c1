"""Uploading a model: a folder is sent to the Hugging Face Hub. `model_card` writes the card in it.

    open_repo("me/bk-tiny")                  before training: what would stop the upload is better known now
    push(folder, "me/bk-tiny")               after it

The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` keeps. It is in no message.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, OfflineModeIsEnabled, validate_repo_id

from minidistill.errors import InputError
from minidistill.weights.hub import HUB_ERRORS, LOG_IN


def open_repo(repo: str, private: bool = False) -> None:
    """Make the repository owner/name on the Hub if there is none, and ask whether it may be written.

    private: visible to its owners only; of a repository that exists already nothing is changed.

    Raises:
        InputError: it is no such name, there is no token or none with the right to do this, or no connection.
    """
    try:
        validate_repo_id(repo)
        is_name = repo.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise InputError(f"'{repo}' cannot be a repository on the Hub: write owner/name, as in me/bk-tiny")
    if not huggingface_hub.get_token():
        raise InputError(f"to upload to {repo} a token of the Hub that may write is needed: {LOG_IN}")
    api = huggingface_hub.HfApi()
    with _in_one_line(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if "write" in inspect.signature(getattr(api, "auth_check", print)).parameters:  # older versions cannot ask
            api.auth_check(repo, write=True)


def push(folder: str | Path, repo: str, private: bool = False, files: list[str] | None = None) -> str:
    """Upload a folder to the repository owner/name on the Hub, made if there is none. Returns the address of its page.

    Files of the same names are replaced there, others stay.

    Args:
        files: the names of those to upload; all if not given.

    Raises:
        InputError: as in `open_repo`, or the folder is not there.
    """
    if not Path(folder).is_dir():
        raise InputError(f"nothing to upload to {repo}: there is no folder {folder}")
    open_repo(repo, private)
    with _in_one_line(repo):
        huggingface_hub.HfApi().upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=files, commit_message="Upload from minidistill"
        )
    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def _in_one_line(repo: str) -> Iterator[None]:
    """What goes wrong on the Hub as one line, without the many of the error itself."""
    try:
        yield
    except HUB_ERRORS as error:
        raise InputError(_refusal(repo, error)) from error
    except RuntimeError as error:  # what huggingface_hub makes of any error in the upload of a large file
        if not isinstance(error.__cause__, HUB_ERRORS):
            raise
        raise InputError(_refusal(repo, error.__cause__)) from error


def _refusal(repo: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return f"nothing can be uploaded to {repo}: HF_HUB_OFFLINE is set; unset it first"
    if status in (401, 403, 404):
        what = "know your token" if status == 401 else f"let your token write to {repo} (HTTP {status})"
        page = f"{constants.ENDPOINT}/settings/tokens"
        return f"the Hub does not {what}: take a token that may write to {repo}, from {page}, and {LOG_IN}"
    if status:
        return f"the Hub did not take {repo} (HTTP {status}): try again later"
    return f"nothing can be uploaded to {repo}: there is no connection to the Hub; connect, and try again"
