"""Which captioned images a folder holds. Nothing is decoded and no file's size asked for: it is quick for 200,000.

Four ways to say which caption belongs to which image, in one tree of folders, sub-folders included:

    metadata.jsonl      {"file_name": "cats/0001.jpg", "text": "a cat"}      one JSON object a line
    metadata.csv        file_name,text                                       a header, then one row per image
    0001.jpg 0001.txt   the caption in the text file (or 0001.jpg.txt, 0001.caption, or `caption` in 0001.json)
    00000.tar           any of these in an archive

`file_name` is relative to the folder of the metadata file. A caption may be a list: training draws one of them,
everything else takes the first. An empty caption is none. Two rows for one image are two examples. A row outranks a
text file. 0001.json may also say what img2dataset's does: `original_width`, `original_height` and `exif`. Folders (or
tars) called train, validation or test, in the spellings of Hugging Face `datasets`, are kept apart. What is left out is
counted and named in the report.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from huggingface_hub.utils import tqdm
from PIL import Image

from minidistill.data.shards import list_tar, read_part
from minidistill.errors import InputError, printable

CAPTION_SUFFIXES = (".txt", ".caption")
TEXT_SUFFIXES = (*CAPTION_SUFFIXES, ".json")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
HOW_TO_CAPTION = (
    "captions come from metadata.jsonl or metadata.csv (file_name, relative to the folder of that file; text), from "
    "x.txt beside x.jpg, or from .tar files of these"
)
SPLITS = {  # names of folders -> split, as in Hugging Face `datasets`
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
SPLIT_CHOICES = (*SPLITS, "all")
SPLIT_HELP = "part of --data, by the names of its folders or tars (default: train, where there are several parts)"
CAPTION_COLUMN_HELP = "column of the metadata of --data that holds the captions (default: text)"
ORIENTATIONS = {  # EXIF's, in the words that img2dataset has from exifread
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}
NOT_READ = {  # pattern of a name in lower case (img2dataset's 00000.parquet is no loss) -> what to do
    r".*\.(zip|7z|rar|gz|tgz|bz2|xz|zst)": "packed, not read: unpack",
    r"meta.*\.json|(?!\d{5}\.).*\.(parquet|arrow)": "not read: save images in it as files; turn rows with file_name "
    "into metadata.jsonl, as pandas' read_parquet or read_json and then to_json(orient='records', lines=True) do",
    r"metadata.*|.*\.(jsonl|csv|tsv)": "not read: rename to metadata.jsonl or metadata.csv",
}


class Place(NamedTuple):
    """Where the content of a file is."""

    file: str  # relative to the data folder, with forward slashes
    offset: int = 0
    size: int = -1  # bytes; -1: all of the file


class Example(NamedTuple):
    """One captioned image."""

    name: str  # its file relative to the data folder, with forward slashes; TAR/MEMBER in an archive
    place: Place
    captions: tuple[str, ...]
    original: tuple[int, int] | None = None  # height and width before it was scaled down for the data set, if known
    orientation: int = 1  # EXIF's, of an image that has lost its own


@dataclass
class FolderReport:
    """What a data folder holds, and what was left out of it: `remarks` are {what is the matter: names of files}."""

    path: str
    examples: list[Example] = field(default_factory=list, repr=False)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    split: str = ""  # the one that the examples are of, where there are several

    def remark(self, what: str, name: str) -> None:
        """Note that this is the matter with a file."""
        self.remarks.setdefault(what, []).append(printable(name))

    def summary(self) -> str:
        """One paragraph for people: how many examples, and what was left out, by name."""
        count = f"{self.path}: {len(self.examples)} captioned images" + f" of split {self.split}" * bool(self.split)
        return "; ".join([count, *(f"{len(n)} {what}: {some(n)}" for what, n in self.remarks.items())]) + "."

    def read(self, place: Place) -> bytes:
        """The content of a file, or of a member of an archive. OSError if it cannot be had."""
        with open(os.path.join(self.path, place.file), "rb") as file:
            return read_part(file, place.offset, place.size)


def find_examples(path: str | Path, split: str | None = None, caption_column: str | None = None) -> FolderReport:
    """List the captioned images under `path`, reading names, captions and the tars' headers only.

    Examples of metadata files come first, then those of caption files, then those of tars.

    split: "train", "validation", "test" or "all"; None: train, if there are several.
    caption_column: of metadata, and of .json files beside images; None: text (in .json files caption, else text).

    InputError: no such folder, no captioned images, or metadata that cannot be understood (file and line are named).
    """
    root = Path(path)
    if not root.is_dir():
        why = "is not a folder" if root.exists() else "does not exist (a data set of the Hub: save it as image files)"
        raise InputError(f"data folder {root} {why}")
    report = FolderReport(str(root))
    files = {name: Place(name) for name in _walk(report)}
    _take_examples(report, files, caption_column)
    _remark_repeats(report)
    for tar in tqdm([name for name in files if name.lower().endswith(".tar")], "tars", disable=None, leave=False):
        members, problem = list_tar(os.path.join(root, tar))
        _take_examples(report, {f"{tar}/{name}": Place(tar, *where) for name, where in members.items()}, caption_column)
        if problem:
            report.remark("damaged tars", f"{tar} ({problem})")
    for name in files:
        base = posixpath.basename(name)
        what = next((what for pattern, what in NOT_READ.items() if re.fullmatch(pattern, base.lower())), None)
        if what and base not in METADATA_NAMES:
            report.remark(what, name)
    if not report.examples:
        raise InputError(f"{report.summary()[:-1]}; {HOW_TO_CAPTION}")
    _keep_split(report, split)
    return report


def some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def fingerprint(count: int, content: Iterable[object]) -> str:
    """A data set in a few words, "20 images, 3f2a91c0": the hexadecimals are of the SHA-256 of `content`, as JSON."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(json.dumps(part).encode())
    return f"{count} images, {digest.hexdigest()[:8]}"


def _walk(report: FolderReport) -> Iterator[str]:
    """The names of all files in a data folder, relative to it, none hidden: those of a folder, then those below it."""
    visited, root = set(), report.path

    def remark(error: OSError) -> None:
        report.remark(f"folders not read ({error.strerror})", os.path.relpath(error.filename, root))

    for folder, subfolders, names in os.walk(root, onerror=remark, followlinks=True):
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in visited
        )
        prefix = os.path.relpath(folder, root).replace(os.sep, "/")
        yield from (posixpath.normpath(f"{prefix}/{name}") for name in sorted(names) if not name.startswith("."))


@cache
def image_formats() -> tuple[str, ...]:
    """The formats that are read: all of Pillow's but EPS, which it hands to Ghostscript, which runs what is in it."""
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind != "EPS")


@cache
def _image_suffixes() -> frozenset[str]:
    """Of all formats that Pillow reads, here and now."""
    kinds = {*image_formats(), "MPO"}  # opened as JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


def _key(name: str) -> str:
    """One spelling for names that Windows (backslashes) and macOS (decomposed accents) spell otherwise."""
    return normalize("NFC", name.replace("\\", "/"))


def _take(report: FolderReport, example: Example, why_not: str = "") -> None:
    if example.captions:
        report.examples.append(example)
    else:
        report.remark("without caption, skipped", example.name + f" ({why_not})" * bool(why_not))


def _take_examples(report: FolderReport, files: Mapping[str, Place], caption_column: str | None) -> None:
    """Add the captioned images among these files, those of the disk or of one tar, to the report."""
    in_rows = _take_rows(report, files, caption_column or "text")
    _take_pairs(report, files, caption_column, in_rows)


def _take_rows(report: FolderReport, files: Mapping[str, Place], caption_column: str) -> set[str]:
    """Add the examples of all metadata files to the report; the files that the rows speak of."""
    spoken_of = set()
    metadata = [name for name in files if posixpath.basename(name) in METADATA_NAMES]
    spellings = {_key(name).casefold(): name for name in files} if metadata else {}
    roots = [f"{place(report.path)}/".replace(os.sep, "/") for place in (os.path.abspath, os.path.realpath)]
    for source in metadata:
        folder = posixpath.dirname(source)
        if all(posixpath.join(folder, name) in files for name in METADATA_NAMES):
            raise InputError(f"{os.path.join(report.path, folder)} holds both {' and '.join(METADATA_NAMES)}: keep one")
        for file_name, captions in _rows(report, source, files[source], caption_column):
            name = posixpath.normpath(posixpath.join(folder, file_name))
            for root in roots:  # of names that are absolute
                name = name.removeprefix(root)
            if name not in files:
                name = spellings.get(posixpath.normpath(_key(name)).casefold(), name)
            spoken_of.add(name)
            # The disk is asked only about what the walk did not meet.
            if name in files or os.path.isfile(os.path.join(report.path, name)):
                _take(report, Example(name, files.get(name, Place(name)), captions))
            else:
                report.remark("in the metadata but not on the disk, skipped", name)
    return spoken_of


def _rows(report: FolderReport, name: str, place: Place, caption_column: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(file_name, captions) of each row of a metadata file."""
    source, number = os.path.join(report.path, name), 1
    try:
        # Spreadsheets put a byte-order mark in front.
        lines = io.TextIOWrapper(io.BytesIO(report.read(place)), "utf-8-sig", newline="")
        if source.endswith(".csv"):
            first = lines.readline()
            delimiter = max(",;\t", key=first.count)
            reader = csv.DictReader(chain([first], lines), delimiter=delimiter, skipinitialspace=True)
            for row in reader:
                number = reader.line_num
                yield _row(row, f"{source} line {number}", caption_column)
        else:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(json.loads(line), f"{source} line {number}", caption_column)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}; repair or remove it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text: save it as UTF-8") from error
    except (csv.Error, ValueError, RecursionError) as error:  # also a number with too many digits for Python
        kind = "CSV" if source.endswith(".csv") else "one JSON object"
        raise InputError(f"{source} line {number} is not {kind}: {error}") from error


def _row(row: object, where: str, caption_column: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object with file_name and {caption_column}")
    if any(row.pop(None, None) or ()):  # what csv keeps of fields beyond the header's
        raise InputError(f"{where} has more fields than the header: put quotes around captions with commas")
    for key in ("file_name", caption_column):
        if key not in row:
            texts = [k for k, v in row.items() if isinstance(v, str) and re.search(r"[^\W\d]", v) and k != "file_name"]
            lone = key == caption_column and len(texts) == 1
            advice = f"give --caption-column {texts[0]}" if lone else "rename or add it"
            raise InputError(f"{where} has no {key!r} but {', '.join(map(repr, row))}: {advice}")
    file_name, caption = row["file_name"], row[caption_column]
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where}: file_name must be the name of a file, got {file_name!r}")
    several = caption if isinstance(caption, list) else [caption or ""]
    if not all(isinstance(text, str) for text in several):
        raise InputError(f"{where}: {caption_column} must be a string or a list of strings, got {caption!r}")
    return file_name, _captions(several)


def _captions(texts: Iterable[object]) -> tuple[str, ...]:
    """The captions among these texts, without space around them, and "?" for half a surrogate pair.

    JSON can spell one ("\\ud83d"), of an emoji that was cut in two; nothing can encode it.
    """
    clean = (text.strip().encode("utf-8", "replace").decode() for text in texts if isinstance(text, str))
    return tuple(filter(None, clean))


def _take_pairs(
    report: FolderReport, files: Mapping[str, Place], caption_column: str | None, in_rows: Collection[str]
) -> None:
    """Add the images among these files to the report, with the caption that lies beside each.

    Images `in_rows` have theirs. Of several with one caption file, such as an image and its mask, one is taken.
    """
    images: dict[str, list[str]] = defaultdict(list)  # name without suffix -> its images, of those that have no row
    beside: dict[str, dict[str, str]] = defaultdict(dict)  # name without suffix -> suffix -> any other file
    for name in files:
        stem, suffix = os.path.splitext(_key(name))
        if posixpath.basename(name).startswith("."):
            continue
        if suffix.lower() in _image_suffixes():
            has_own = any(name + text in files for text in CAPTION_SUFFIXES)  # x.jpg.txt
            images[_key(name) if has_own else stem] += [] if name in in_rows else [name]
        else:
            beside[stem][suffix.lower()] = name
    for stem, names in images.items():
        texts = {suffix: files[name] for suffix, name in beside.pop(stem, {}).items() if suffix in TEXT_SUFFIXES}
        if not names:
            continue
        facts, why_not = _facts(report, texts, caption_column)
        if facts["captions"]:
            names.sort(key=lambda name: (not name.lower().endswith((".jpg", ".jpeg")), name))  # masks are no JPEGs
            for other in names[1:]:
                report.remark("of the same name as another image, skipped (a mask?)", f"{other} ({names[0]} is used)")
            del names[1:]
        if "\n" in "".join(facts["captions"]):
            report.remark("captions of several lines, each taken as one (metadata.jsonl takes lists)", names[0])
        for name in names:
            _take(report, Example(name, files[name], **facts), why_not)
    for others in beside.values():
        for text in [others[suffix] for suffix in CAPTION_SUFFIXES if suffix in others]:
            strange = [name for suffix, name in others.items() if suffix not in TEXT_SUFFIXES]
            report.remark("caption files without an image that Pillow reads", ", not ".join([text, *strange]))


def _facts(report: FolderReport, texts: Mapping[str, Place], caption_column: str | None) -> tuple[dict[str, Any], str]:
    """What the files beside an image, suffix -> place, say: (fields of an Example, what could not be read)."""
    found, problem = {}, ""
    for suffix, place in texts.items():
        try:
            found[suffix] = report.read(place).decode("utf-8-sig")
        except OSError as error:
            problem = f"its {suffix}: {error.strerror}"
        except UnicodeDecodeError:
            problem = f"its {suffix} is not UTF-8"
    record = _object(found.get(".json"))
    columns = [caption_column] if caption_column else ["caption", "text"]
    caption = next((found[suffix] for suffix in CAPTION_SUFFIXES if suffix in found), None)
    if caption is None:
        caption = next(filter(None, map(record.get, columns)), None)
    facts: dict[str, Any] = {"captions": _captions(caption if isinstance(caption, list) else [caption])}
    height, width = (record.get(key) for key in ("original_height", "original_width"))
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        facts["original"] = (height, width)
    facts["orientation"] = ORIENTATIONS.get(str(_object(record.get("exif")).get("Image Orientation")), 1)
    return facts, problem


def _object(text: object) -> dict[str, Any]:
    """The object that a text is in JSON; {} if it is none."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _remark_repeats(report: FolderReport) -> None:
    """Say that folders called 10_name and 1_name, of which kohya's scripts repeat images so often, are not repeated."""
    folders = {posixpath.dirname(example.name) for example in report.examples}
    repeats = {folder: re.match(r"(\d{1,9})_", posixpath.basename(folder)) for folder in folders}
    if len({found and int(found[1]) for found in repeats.values()}) > 1:
        for folder in sorted(folder for folder, found in repeats.items() if found):
            report.remark("folders named as kohya's scripts repeat them; here every image counts once", folder)


def _keep_split(report: FolderReport, split: str | None) -> None:
    """Keep the examples of one split, by the names of folders and tars; where there are no two, all of them."""
    splits = [_split_of(posixpath.dirname(_key(example.name))) for example in report.examples]
    if split == "all" or (split is None and len({*splits} - {""}) < 2):
        for example, found in zip(report.examples, splits, strict=True):
            if split is None and "" in splits and found in ("validation", "test"):
                report.remark(f"of split {found}, used too, as no folder is called train (--split)", example.name)
        return
    report.split = split or "train"
    if report.split not in splits:
        there = ", ".join(sorted({*splits} - {""})) or "no folders called train, validation or test"
        raise InputError(f"{report.path} has no images of split {report.split} but {there}: give another --split")
    for example, found in zip(report.examples, splits, strict=True):
        if found != report.split:
            report.remark(f"of {f'split {found}' if found else 'no split'}, left out (--split)", example.name)
    report.examples = [e for e, found in zip(report.examples, splits, strict=True) if found == report.split]


@cache
def _split_of(folder: str) -> str:
    """The split that a folder (or tar) is of, "" if its name says none."""
    for part in folder.lower().split("/"):
        for split, words in SPLITS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", part):
                return split
    return ""
