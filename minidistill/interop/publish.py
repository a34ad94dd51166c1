"""Uploading a model: a folder is sent to the Hugging Face Hub. `model_card` writes the card in it.

    open_repo("me/bk-tiny")                  before training: what would stop the upload is better known now
    push(folder, "me/bk-tiny")               after it

The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` keeps. It is in no message.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from minidistill.errors import InputError
from minidistill.weights.hub import HUB_ERRORS, LOG_IN, is_repo_id, status_of


def open_repo(repo: str, private: bool = False) -> None:
    """Make the repository owner/name on the Hub if there is none, and ask whether it may be written.

    private: visible to its owners only; of a repository that exists already nothing is changed.
    InputError: it is no such name, there is no token or none with the right to do this, or no connection.
    """
    if not is_repo_id(repo):
        raise InputError(f"'{repo}' cannot be a repository on the Hub: write owner/name, as in me/bk-tiny")
    if not huggingface_hub.get_token():
        raise InputError(f"to upload to {repo} a token of the Hub that may write is needed: {LOG_IN}")
    api = huggingface_hub.HfApi()
    with _in_one_line(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if "write" in inspect.signature(api.auth_check).parameters:  # older versions cannot ask
            api.auth_check(repo, write=True)


def push(folder: str | Path, repo: str, private: bool = False, files: list[str] | None = None) -> str:
    """Upload a folder to the repository owner/name on the Hub, made if there is none. Returns the address of its page.

    Files of the same names are replaced there, others stay. files: the names of those to upload; all if not given.
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
    except (RuntimeError, *HUB_ERRORS) as error:
        # huggingface_hub makes a RuntimeError of any error in the upload of a large file
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if not isinstance(cause, HUB_ERRORS):
            raise
        reason, status = "there is no connection to the Hub; connect, and try again", status_of(cause)
        if isinstance(cause, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set; unset it first"
        elif status in (401, 403, 404):
            page = f"{constants.ENDPOINT}/settings/tokens"
            reason = f"the Hub refuses your token (HTTP {status}): take one that may write there, from {page}, {LOG_IN}"
        elif status:
            reason = f"the Hub did not take it (HTTP {status}); try again later"
        raise InputError(f"nothing can be uploaded to {repo}: {reason}") from error
