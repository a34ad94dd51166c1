"""Giving a model away: a folder goes to the Hugging Face Hub. What is in it, and its card, is the business of others.

    open_repo("me/bk-tiny")                  before a training: what would stop the upload is better known now
    push(folder, "me/bk-tiny")               after it

The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` keeps. It is in no message.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, OfflineModeIsEnabled, validate_repo_id

from minidistill.errors import InputError
from minidistill.weights.hub import HUB_ERRORS, LOG_IN


def open_repo(repo: str, private: bool = False) -> None:
    """Make the repository owner/name on the Hub if there is none: best before a training, so that it can end in `push`.

    private: seen by its owners alone; of a repository that exists already nothing is changed.

    Raises:
        InputError: it is no such name, there is no token or none with the right to do this, or no connection.
    """
    _check(repo)
    _ask(repo, lambda api: _make(api, repo, private))


def push(folder: str | Path, repo: str, private: bool = False, files: list[str] | None = None) -> str:
    """Upload a folder to the repository owner/name on the Hub, made if there is none. Returns the address of its page.

    Files of the same names are replaced there, others stay.

    Args:
        files: the names of those to upload; all if not given.

    Raises:
        InputError: as in `open_repo`, or the folder is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"nothing to upload to {repo}: there is no folder {folder}")
    _check(repo)

    def upload(api: huggingface_hub.HfApi) -> None:
        _make(api, repo, private)
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=files, commit_message="Upload from minidistill"
        )

    command = ["hf", "upload", repo, str(folder), *(word for name in files or () for word in ("--include", name))]
    _ask(repo, upload, f"; {folder} is whole, to send it by hand: {shlex.join(command)}")
    return f"{constants.ENDPOINT}/{repo}"


def _check(repo: str) -> None:
    """InputError: nothing can be uploaded there, which is known without asking the Hub."""
    try:
        validate_repo_id(repo)
        is_name = repo.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise InputError(f"'{repo}' cannot be a repository on the Hub: write owner/name, as in me/bk-tiny")
    if not huggingface_hub.get_token():
        raise InputError(f"to upload to {repo} a token of the Hub that may write is needed: {LOG_IN}")


def _make(api: huggingface_hub.HfApi, repo: str, private: bool) -> None:
    """Make the repository if there is none; of one that is there ask whether it may be written, as making does not."""
    api.create_repo(repo, private=private, exist_ok=True)
    may = getattr(api, "auth_check", None)
    if may and "write" in inspect.signature(may).parameters:  # older versions cannot ask
        may(repo, write=True)


def _ask(repo: str, call: Callable[[huggingface_hub.HfApi], object], after: str = "") -> None:
    """Let the Hub do something; what goes wrong becomes one line, without the many of the error itself."""
    try:
        call(huggingface_hub.HfApi())
    except HUB_ERRORS as error:
        raise InputError(_refusal(repo, error) + after) from error
    except RuntimeError as error:  # what huggingface_hub makes of any error in the upload of a large file
        if not isinstance(error.__cause__, HUB_ERRORS):
            raise
        raise InputError(_refusal(repo, error.__cause__) + after) from error


def _refusal(repo: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return f"nothing can be uploaded to {repo}: HF_HUB_OFFLINE forbids to ask the Hub; unset that first"
    if status == 401:
        return f"the Hub does not know your token, which {repo} needs: {LOG_IN} anew"
    if status in (403, 404):
        return (
            f"the Hub does not let your token write to {repo} (HTTP {status}): take a repository of your own, or a "
            f"token with the right to write there, from {constants.ENDPOINT}/settings/tokens, and {LOG_IN}"
        )
    if status:
        return f"the Hub did not take {repo} (HTTP {status}): try again later"
    return f"nothing can be uploaded to {repo}: there is no connection to the Hub; connect, and try again"
