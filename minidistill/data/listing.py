"""Which captioned images a folder holds. Nothing is decoded and no file's size asked for: it is quick for 200,000.

Four ways to say which caption belongs to which image, in one tree of folders, sub-folders included:

    metadata.jsonl      {"file_name": "cats/0001.jpg", "text": "a cat"}      one JSON object a line
    metadata.csv        file_name,text                                       a header, then one row per image
    0001.jpg 0001.txt   the caption in the text file (or 0001.caption)
    00000.tar           0001.jpg and 0001.txt (or .caption, or `caption` in .json) in an archive

`file_name` is relative to the folder of the metadata file. A caption may be a list: training draws one of them,
everything else takes the first. An empty caption is none. Two rows for one image are two examples. A row outranks a
text file. Whatever is left out is counted and named in the report.
"""

import csv
import hashlib
import json
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from huggingface_hub.utils import tqdm

from minidistill.data.shards import list_tar
from minidistill.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
HOW_TO_CAPTION = (
    "captions come from metadata.jsonl or metadata.csv (file_name, text; file_name relative to the folder of the "
    "metadata file), from x.txt beside x.jpg, or from .tar files of these"
)
WITHOUT_CAPTION = "without caption, skipped"


class Place(NamedTuple):
    """Where the content of a file is."""

    file: str  # relative to the data folder, with forward slashes
    offset: int = 0
    size: int = -1  # bytes; -1: all of the file

    def read(self, file: BinaryIO) -> bytes:
        """The content, from the opened file."""
        file.seek(self.offset)
        return file.read(self.size)


class Example(NamedTuple):
    """One captioned image."""

    name: str  # its file relative to the data folder, with forward slashes; TAR/MEMBER in an archive
    captions: tuple[str, ...]
    place: Place
    original: tuple[int, int] | None = None  # height and width before it was scaled down for the archive, if known


@dataclass
class FolderReport:
    """What a data folder holds, and what was left out of it: `remarks` are {what is the matter: names of files}."""

    path: str
    examples: list[Example] = field(default_factory=list, repr=False)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    def remark(self, what: str, name: str) -> None:
        """Note that this is the matter with a file."""
        self.remarks.setdefault(what, []).append(printable(name))

    def summary(self) -> str:
        """One paragraph for people: how many examples, and what was left out, by name."""
        parts = [f"{len(names)} {what}: {some(names)}" for what, names in self.remarks.items()]
        return "; ".join([f"{self.path}: {len(self.examples)} captioned images", *parts]) + "."

    def read(self, place: Place) -> bytes:
        """The content of a file, or of a member of an archive. OSError if it cannot be had."""
        with open(os.path.join(self.path, place.file), "rb") as file:
            return place.read(file)


def find_examples(path: str | Path) -> FolderReport:
    """List the captioned images under `path`, reading names, captions and the tars' headers only.

    Examples of metadata files come first, then those of caption files, then those of tars.

    InputError: no such folder, no captioned images, or metadata that cannot be understood (file and line are named).
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"data folder {root} {'is not a folder' if root.exists() else 'does not exist'}")
    report = FolderReport(str(root))
    files = dict.fromkeys(_walk(root))
    metadata = [name for name in files if posixpath.basename(name) in METADATA_NAMES]
    in_rows = _take_rows(report, metadata, files)
    _take_pairs(report, {name: Place(name) for name in files if name not in in_rows}, report.read)
    for tar in tqdm([name for name in files if name.lower().endswith(".tar")], "tars", disable=None, leave=False):
        _take_tar(report, tar)
    for name in files:
        if name not in metadata and _looks_like_metadata(posixpath.basename(name)):
            report.remark(f"not read, as their name is not {' or '.join(METADATA_NAMES)}", name)
    if not report.examples:
        raise InputError(f"{report.summary()[:-1]}; {HOW_TO_CAPTION}")
    return report


def some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(name: str) -> str:
    """A file's name with the bytes that are no UTF-8 escaped: it can be printed and written down."""
    return name.encode("utf-8", "backslashreplace").decode()


def fingerprint(count: int, content: Iterable[object]) -> str:
    """A data set in a few words, "20 images, 3f2a91c0": the hexadecimals are of the SHA-256 of `content`, as JSON."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(json.dumps(part).encode())
    return f"{count} images, {digest.hexdigest()[:8]}"


def _walk(root: Path) -> Iterator[str]:
    """The names of all files under root, relative to it, none hidden: those of a folder, then those below it."""
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in visited
        )
        prefix = os.path.relpath(folder, root).replace(os.sep, "/")
        yield from (posixpath.normpath(f"{prefix}/{name}") for name in sorted(names) if not name.startswith("."))


def _looks_like_metadata(name: str) -> bool:
    return name.lower().startswith("metadata") or name.lower().endswith((".jsonl", ".csv"))


def _take(report: FolderReport, example: Example, why_not: str = "") -> None:
    if example.captions:
        report.examples.append(example)
    else:
        report.remark(WITHOUT_CAPTION, example.name + (f" ({why_not})" if why_not else ""))


def _take_rows(report: FolderReport, metadata: Iterable[str], files: Collection[str]) -> set[str]:
    """Add the examples of all metadata files to the report; the files that the rows speak of."""
    spoken_of = set()
    for source in metadata:
        folder = posixpath.dirname(source)
        if all(posixpath.join(folder, name) in files for name in METADATA_NAMES):
            raise InputError(f"{os.path.join(report.path, folder)} holds both {' and '.join(METADATA_NAMES)}: keep one")
        for file_name, captions in _rows(os.path.join(report.path, source)):
            name = posixpath.normpath(posixpath.join(folder, file_name))
            spoken_of.add(name)
            # The disk is asked only about what the walk did not meet.
            if name in files or os.path.isfile(os.path.join(report.path, name)):
                _take(report, Example(name, captions, Place(name)))
            else:
                report.remark("in the metadata but not on the disk, skipped", name)
    return spoken_of


def _rows(source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(file_name, captions) of each row of a metadata file."""
    number = 1
    try:
        with open(source, encoding="utf-8-sig", newline="") as lines:  # spreadsheets put a byte-order mark in front
            if source.endswith(".csv"):
                reader = csv.DictReader(lines)
                for row in reader:
                    number = reader.line_num
                    yield _row(row, f"{source} line {number}")
            else:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _row(json.loads(line), f"{source} line {number}")
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}; repair or remove it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text: save it as UTF-8") from error
    except (csv.Error, ValueError, RecursionError) as error:  # also a number with too many digits for Python
        kind = "CSV" if source.endswith(".csv") else "one JSON object"
        raise InputError(f"{source} line {number} is not {kind}: {error}") from error


def _row(row: object, where: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object with file_name and text")
    for key in ("file_name", "text"):
        if key not in row:
            raise InputError(f"{where} has no {key!r} but {', '.join(map(repr, row))}: rename or add it")
    file_name, caption = row["file_name"], row["text"]
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where}: file_name must be the name of a file, got {file_name!r}")
    several = caption if isinstance(caption, list) else [caption or ""]
    if not all(isinstance(text, str) for text in several):
        raise InputError(f"{where}: text must be a string or a list of strings, got {caption!r}")
    return file_name, _captions(several)


def _captions(texts: Iterable[object]) -> tuple[str, ...]:
    """The captions among these texts, without space around them, and "?" for half a surrogate pair.

    JSON can spell one ("\\ud83d"), of an emoji that was cut in two; nothing can encode it.
    """
    clean = (text.strip().encode("utf-8", "replace").decode() for text in texts if isinstance(text, str))
    return tuple(filter(None, clean))


def _take_tar(report: FolderReport, tar: str) -> None:
    """Add the captioned images of one archive, which is opened once, to the report."""
    path = os.path.join(report.path, tar)
    members, problem = list_tar(path)
    if members:
        with open(path, "rb") as file:
            places = {f"{tar}/{name}": Place(tar, *where) for name, where in members.items()}
            _take_pairs(report, places, lambda place: place.read(file))
    if problem:
        report.remark("damaged tars", f"{tar} ({problem})")


def _take_pairs(report: FolderReport, files: Mapping[str, Place], read: Callable[[Place], bytes]) -> None:
    """Add the images among these files to the report, with the caption that lies beside each."""
    beside: dict[str, dict[str, Place]] = defaultdict(dict)  # name without suffix -> suffix -> text or json
    for name, place in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (*CAPTION_SUFFIXES, ".json"):
            beside[stem][suffix.lower()] = place
    for name, place in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES and not posixpath.basename(name).startswith("."):
            captions, original, problem = _facts(beside.get(stem, {}), read)
            _take(report, Example(name, captions, place, original), problem)


def _facts(
    beside: Mapping[str, Place], read: Callable[[Place], bytes]
) -> tuple[tuple[str, ...], tuple[int, int] | None, str]:
    """(captions, original height and width, what could not be read) of the image that these files lie beside."""
    texts, problem = {}, ""
    for suffix, place in beside.items():
        try:
            texts[suffix] = read(place).decode("utf-8-sig")
        except OSError as error:
            problem = f"its {suffix}: {error.strerror}"
        except UnicodeDecodeError:
            problem = f"its {suffix} is not UTF-8"
    try:
        record = json.loads(texts.get(".json", "{}"))
    except (ValueError, RecursionError):  # then it says nothing
        record = {}
    record = record if isinstance(record, dict) else {}
    height, width = (record.get(key) for key in ("original_height", "original_width"))
    known = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    caption = next((texts[suffix] for suffix in CAPTION_SUFFIXES if suffix in texts), None)
    if caption is None:
        caption = record.get("caption") or record.get("text")
    return _captions([caption]), (height, width) if known else None, problem
