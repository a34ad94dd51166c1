"""Sources: from what a user writes to files on disk. The Hugging Face Hub is asked only for what is not here.

    folder, file                  a path that exists is taken as it is
    owner/name                    a model on the Hub: a pipeline, one part of a pipeline, or a single file
    owner/name/file.safetensors   one file of it
    owner/name@revision...        either of the two, at a branch, tag or commit other than main

What the Hub's cache holds is used without asking the Hub whether it is still the newest.
"""

import glob
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import huggingface_hub
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import tqdm, validate_repo_id

from minidistill.errors import InputError
from minidistill.weights.choice import INDEX, SINGLE_FILES, choose_files, missing_files
from minidistill.weights.files import some

WEIGHTS = (*SINGLE_FILES, ".bin", ".pt", ".pth")

# Repositories that their owners took down, and those that keep the same files today.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
for version in ("2", "2-base", "2-1", "2-1-base"):
    MOVED[f"stabilityai/stable-diffusion-{version}"] = f"sd2-community/stable-diffusion-{version}"

# huggingface_hub lets through what its HTTP package raises, which changes with its version: its own error derives from
# the root of theirs. ValueError is json's, of an answer by something else than the Hub, as the login page of a hotel.
HUB_ERRORS = (*errors.HfHubHTTPError.__bases__, OSError, ValueError)

PLACE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?", re.ASCII)
FORMS = "a model on the Hub is written owner/name, a file of it owner/name/file.safetensors"
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class Place(NamedTuple):
    """A repository of the Hub at a revision (None: main), and one file in it ("": the model that it is)."""

    repo: str
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f"/{self.file}" if self.file else "")


def find_source(source: str | Path, dtype: torch.dtype | None = torch.float32) -> Path:
    """The file or folder on this machine that a SOURCE means (other than a shipped model), fetched if it must be.

    Nothing is asked of the network about a path that exists or a model that the Hub's cache holds. Returns a pipeline
    folder, the folder of one part (with config.json), or a single file.

    dtype: float16 fetches the half-precision weights where a repository has them, others the full ones.
    InputError: there is no such thing, it holds nothing that is read here, or it cannot be had now.
    """
    path = os.path.expanduser(source)
    if os.path.exists(path):
        return Path(path)
    place = _place_on_hub(source.as_posix() if isinstance(source, Path) else source)
    found = _in_cache(place, dtype)
    if found is None and place.repo in MOVED:
        warnings.warn(f"{place.repo} is no longer on the Hub; its copy is used: {MOVED[place.repo]}", stacklevel=2)
        place = place._replace(repo=MOVED[place.repo])
        found = _in_cache(place, dtype)
    return found or _fetch(place, dtype)


def fetch_files(repo: str, names: Sequence[str]) -> Path:
    """The folder with these files of a repository, from the cache or else the Hub. InputError: they cannot be had."""
    return _with_files(Place(repo), names) or _download(Place(repo), names)


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub can have this name, owner/name."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name.count("/") == 1


def _place_on_hub(source: str) -> Place:
    """Read `owner/name@revision/file`. InputError: it has not that form, so it can only be a path, and a wrong one."""
    match = PLACE.fullmatch(source)
    place = Place(match["repo"], match["revision"], match["file"] or "") if match else Place("")
    if not is_repo_id(place.repo) or place.repo.endswith(WEIGHTS) or not (place.file or WEIGHTS[0]).endswith(WEIGHTS):
        raise InputError(f"no such file or folder: {source} ({FORMS})")
    return place


def _in_cache(place: Place, dtype: torch.dtype | None, alone: bool = False) -> Path | None:
    """What is meant, if the cache holds all of it. alone: without the Hub, the only single file in it is meant."""
    if place.file:
        folder = _with_files(place, [place.file, *_settings(place.file)])
        return folder / place.file if folder else None
    folder = _snapshot(place, [INDEX], local=True)
    if folder is None or not missing_files(folder, dtype):
        return folder
    singles = [path for path in folder.iterdir() if path.suffix in SINGLE_FILES and path.is_file()]
    return singles[0] if alone and len(singles) == 1 else None


def _with_files(place: Place, names: Sequence[str]) -> Path | None:
    """The folder of a revision in the cache, if it holds all these files."""
    folder = _snapshot(place, names, local=True)
    return folder if folder and all((folder / name).is_file() for name in names) else None


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


def _fetch(place: Place, dtype: torch.dtype | None) -> Path:
    """List the repository's files, choose, and download those of them that the cache lacks."""
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = huggingface_hub.HfApi().model_info(place.repo, revision=place.revision, timeout=timeout)
    except HUB_ERRORS as error:
        if cached := _in_cache(place, None, alone=True):
            return cached
        raise _refusal(place, error) from error
    names = [file.rfilename for file in info.siblings or []]
    root = place._replace(file="")
    if place.file and place.file not in names:
        there = some(name for name in names if name.endswith(WEIGHTS))
        raise InputError(f"no such file or folder: {place}; the weights in {root} on the Hub are {there}")
    files = [place.file] if place.file else choose_files(names, dtype, str(root))
    folder = _download(place, files + [name for name in _settings(files[0]) if name in names])
    return folder if files[0].endswith(".json") else folder / files[0]


def _download(place: Place, names: Sequence[str]) -> Path:
    """The folder with these files of a repository. InputError: they cannot be had."""
    try:
        folder = _snapshot(place, names)
    except HUB_ERRORS as error:
        raise _refusal(place, error) from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:  # without a connection, some versions of huggingface_hub return what there is
        raise InputError(f"the download of {place} is not complete, it lacks {some(absent)}: run it again")
    return folder


def _refusal(place: Place, error: Exception) -> InputError:
    """One line on why there is nothing to load, with the way out. The error's own text, of many lines, is left out."""
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it only says that the cache is no help either
    status, page = status_of(error), f"{constants.ENDPOINT}/{place.repo}"
    if isinstance(error, errors.GatedRepoError):
        reason = f"it is gated: accept its licence on {page}, then log in: {LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"{place.repo} on the Hub has no revision {place.revision}"
    elif status in (401, 404):  # 401: also what strangers are told of private ones
        reason = f"nor a model on the Hub (not found; if it is private or your token is old, {LOG_IN})"
    elif status:
        reason = f"the Hub does not deliver it (HTTP {status}): see {page}, {LOG_IN}, or try again later"
    elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        reason = f"it cannot be saved in {constants.HF_HUB_CACHE} (or where HF_HUB_CACHE says): {error.strerror}"
    else:
        folder = None if place.file else _snapshot(place, [INDEX], local=True)
        cached = f"the Hub's cache lacks {some(missing_files(folder))}" if folder else "nor is it in the Hub's cache"
        way = "there is no connection to the Hub: connect, and try again"
        if isinstance(error, errors.OfflineModeIsEnabled):
            way = "HF_HUB_OFFLINE is set: unset it first"
        reason = f"{cached}, and {way}"
    return InputError(f"no such file or folder: {place}; {reason}")


def status_of(error: Exception) -> int | None:
    """The HTTP status of what the Hub answered; None if it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)
