"""Which captioned images a folder holds. Nothing is decoded and no file's size asked for: it is quick for 200,000.

Four ways to say which caption belongs to which image, in one tree of folders, sub-folders included:

    metadata.jsonl      {"file_name": "cats/0001.jpg", "text": "a cat"}      one JSON object a line
    metadata.csv        file_name,text                                       a header, then one row per image
    0001.jpg 0001.txt   the caption in the text file (or 0001.caption)
    00000.tar           0001.jpg and 0001.txt (or .caption, or .json) in an archive: shards.py

`file_name` is relative to the folder of the metadata file. A caption may be a list: training draws one of them,
everything else takes the first. An empty caption is none. Two rows for one image are two examples. A row outranks a
text file.
"""

import csv
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub.utils import tqdm

from minidistill.data.shards import CAPTION_SUFFIXES, IMAGE_SUFFIXES, clean_caption, list_tar
from minidistill.errors import InputError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
SCAN_NAME = "minidistill_scan.json"  # what `scan` found, in the data folder
MOST_UNREADABLE = 0.1  # more than this and something else is wrong: a failed copy, a wrong folder
HOW_TO_CAPTION = "captions come from metadata.jsonl or metadata.csv (file_name, text), or from x.txt beside x.jpg"

Caption = str | tuple[str, ...]  # a tuple where there are several


@dataclass
class FolderReport:
    """What a folder holds. `captions[i]` belongs to `files[i]`, a path, or TAR/MEMBER.

    `places[i]` is (number in `tars` or -1 of a file, offset, bytes, original height, original width), the last two
    below 1 where no archive says. The other lists feed the summary.
    """

    path: str
    files: list[str] = field(repr=False)
    captions: list[Caption] = field(repr=False)
    places: np.ndarray = field(repr=False, default_factory=lambda: np.empty((0, 5), np.int64))
    tars: list[str] = field(repr=False, default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # "name (reason)"
    damaged: list[str] = field(default_factory=list)  # tars, "name (reason)"
    uncaptioned: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # named in a metadata file, not on the disk
    small: list[str] = field(default_factory=list)  # kept, but enlarged to the resolution asked for
    lookalikes: list[str] = field(default_factory=list)  # files called almost, but not quite, metadata.jsonl

    def summary(self) -> str:
        """One paragraph for people: how many examples, and what was left out, by name."""
        parts = [f"{self.path}: {len(self.files)} captioned images"]
        for names, what in (
            (self.unreadable, "unreadable, skipped"),
            (self.damaged, "damaged tars, of which the whole images are used"),
            (self.uncaptioned, "without caption, skipped"),
            (self.missing, "in the metadata but not on the disk, skipped"),
            (self.small, "smaller than the resolution, enlarged"),
            (self.lookalikes, f"not read, though named almost like {' or '.join(METADATA_NAMES)}"),
        ):
            if names:
                parts.append(f"{len(names)} {what}: {some(names)}")
        return "; ".join(parts) + "."

    def name(self, i: int) -> str:
        """Example i's file relative to the folder: the same wherever the folder is."""
        return relative(self.files[i], self.path)

    def leave_out(self, broken: dict[str, str]) -> None:
        """Drop the examples of these files (file -> reason), and name them.

        InputError: they are more than MOST_UNREADABLE of all.
        """
        total = len(set(self.files))
        self.unreadable += [f"{relative(file, self.path)} ({reason})" for file, reason in broken.items()]
        refuse_too_many(self.path, self.unreadable, len(broken), total)
        keep = [i for i, file in enumerate(self.files) if file not in broken]
        self.files[:] = [self.files[i] for i in keep]
        self.captions[:] = [self.captions[i] for i in keep]
        self.places = self.places[keep]


def find_examples(path: str | Path) -> FolderReport:
    """List the captioned images under `path`, reading names, captions and the tars' headers only.

    InputError: no such folder, no images, no captions, or metadata that cannot be understood (file and line are named).
    """
    root = Path(path)
    if ".." in root.parts:
        root = root.resolve()  # as rows are: one file must have one name
    if not root.is_dir():
        raise InputError(f"data folder {root} {'is not a folder' if root.exists() else 'does not exist'}")
    images, metadata, texts, tars, lookalikes = _walk(root)
    report = FolderReport(str(root), [], [], tars=tars, lookalikes=[relative(f, root) for f in lookalikes])
    in_rows = _take_rows(metadata, set(images), report)
    for image in images:
        if image not in in_rows:
            _take(report, image, _caption_beside(image, texts))
    report.places = np.full((len(report.files), 5), -1, np.int64)
    _take_tars(report)
    if not report.files:
        raise InputError(_why_nothing(report, bool(images)))
    return report


def some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def relative(file: str, root: str | Path) -> str:
    """A file's name as people, scan reports and caches have it: forward slashes, and bytes that are no UTF-8 escaped.

    Such a name can be printed and written down; the file itself is opened by its path.
    """
    prefix = os.path.join(root, "").removeprefix(os.path.join(".", ""))  # as `_walk` has it
    inside = file.startswith(prefix) if prefix else not os.path.isabs(file)
    name = file[len(prefix) :] if inside else os.path.relpath(file, root)  # which is slow
    return name.replace(os.sep, "/").encode("utf-8", "backslashreplace").decode()


def fingerprint(count: int, content: Iterable[object]) -> str:
    """A data set in a few words, "20 images, 3f2a91c0": the hexadecimals are of the SHA-256 of `content`, as JSON."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(json.dumps(part).encode())
    return f"{count} images, {digest.hexdigest()[:8]}"


def refuse_too_many(path: str, unreadable: list[str], count: int, total: int) -> None:
    """InputError if `count` of `total` is more than can be due to chance."""
    if count > MOST_UNREADABLE * total:
        raise InputError(f"{path}: {count} of {total} images cannot be read: repair or remove {some(unreadable)}")


def _walk(root: Path) -> tuple[list[str], list[str], dict[str, str], list[str], list[str]]:
    """(images, metadata files, caption files, tars, files named almost like metadata), sorted, none hidden.

    Caption files by their name with the suffix in lower case, which is how they are looked for.
    """
    images, metadata, texts, tars, lookalikes = [], [], {}, [], []
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        visited.add(os.path.realpath(folder))
        prefix = os.path.join(folder, "").removeprefix(os.path.join(".", ""))
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in visited
        )
        for name in sorted(name for name in names if not name.startswith(".")):
            file = prefix + name
            stem, suffix = os.path.splitext(file)
            suffix = suffix.lower()
            if name in METADATA_NAMES:
                metadata.append(file)
            elif suffix in IMAGE_SUFFIXES:
                images.append(file)
            elif suffix == ".tar":
                tars.append(file)
            elif _is_lookalike(name):
                lookalikes.append(file)
            elif suffix in CAPTION_SUFFIXES:
                texts[stem + suffix] = file
    return images, metadata, texts, tars, lookalikes


def _is_lookalike(name: str) -> bool:
    lower = name.lower()
    if lower.startswith("metadata"):
        return True
    # The comparison is slow, and there may be a .txt file for each of a million images.
    return set("metadta") <= set(lower) and bool(difflib.get_close_matches(name, METADATA_NAMES, cutoff=0.85))


def _take(report: FolderReport, file: str, caption: Caption) -> None:
    if caption:
        report.files.append(file)
        report.captions.append(caption)
    else:
        report.uncaptioned.append(relative(file, report.path))


def _take_rows(metadata: list[str], images: set[str], report: FolderReport) -> set[str]:
    """Add the examples of all metadata files to the report; the image files that the rows speak of."""
    folders = [os.path.dirname(file) for file in metadata]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InputError(f"{folder} holds both {' and '.join(METADATA_NAMES)}: keep one")
    spoken_of = set()
    for source in metadata:
        folder = os.path.dirname(source)
        for file_name, caption in _rows(source):
            file = os.path.normpath(os.path.join(folder, file_name))
            spoken_of.add(file)
            if file in images or os.path.isfile(file):  # the disk is asked only about what the walk did not meet
                _take(report, file, caption)
            else:
                report.missing.append(relative(file, report.path))
    return spoken_of


def _take_tars(report: FolderReport) -> None:
    """Add the images of all tars to the report, with a progress bar on terminals."""
    places = [report.places]
    for number, file in enumerate(tqdm(report.tars, desc="tars", disable=None, leave=False)):
        tar = list_tar(file)
        report.files += [f"{file}/{name}" for name in tar.names]
        report.captions += tar.captions
        report.uncaptioned += [relative(f"{file}/{name}", report.path) for name in tar.uncaptioned]
        places.append(np.insert(np.array(tar.places, np.int64).reshape(-1, 4), 0, number, axis=1))
        if tar.problem:
            report.damaged.append(f"{relative(file, report.path)} ({tar.problem})")
    report.places = np.concatenate(places)


def _rows(source: str) -> Iterator[tuple[str, Caption]]:
    """(file_name, caption) of each row of a metadata file; the caption is "" where the row has none."""
    try:
        with open(source, encoding="utf-8-sig", newline="") as lines:  # spreadsheets put a byte-order mark in front
            if source.endswith(".csv"):
                reader = csv.DictReader(lines)
                for row in reader:
                    yield _row(row, f"{source} line {reader.line_num}")
            else:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _row(json.loads(line), f"{source} line {number}")
    except OSError as error:
        raise _unreadable(source, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text: save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{source} line {reader.line_num} is not CSV: {error}") from error
    except (ValueError, RecursionError) as error:  # not JSON; a number with too many digits for Python
        raise InputError(f"{source} line {number} is not one JSON object: {error}") from error


def _row(row: object, where: str) -> tuple[str, Caption]:
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
    texts = tuple(filter(None, map(clean_caption, several)))
    return file_name, texts if len(texts) > 1 else "".join(texts)


def _caption_beside(image: str, texts: dict[str, str]) -> str:
    """The caption in x.txt or x.caption beside x.jpg, "" if there is none."""
    for suffix in CAPTION_SUFFIXES:
        if file := texts.get(os.path.splitext(image)[0] + suffix):
            try:
                return clean_caption(Path(file).read_text(encoding="utf-8-sig"))
            except OSError as error:
                raise _unreadable(file, error) from error
            except UnicodeDecodeError as error:
                raise InputError(f"{file} is not UTF-8 text: save it as UTF-8") from error
    return ""


def _unreadable(file: str, error: OSError) -> InputError:
    return InputError(f"cannot read {file}: {error.strerror}; repair or remove it")


def _why_nothing(report: FolderReport, any_images: bool) -> str:
    """The one line to refuse a folder with when it holds no example."""
    if report.missing:
        return (
            f"{report.path}: none of the files in the metadata exists, first {report.missing[0]}: "
            "file_name must be relative to the folder of the metadata file"
        )
    if report.damaged:
        return f"{report.path}: no captioned image is whole: fetch again {some(report.damaged)}"
    hint = f"; rename {report.lookalikes[0]} to metadata.jsonl or metadata.csv?" if report.lookalikes else ""
    if any_images or report.uncaptioned:
        return f"{report.path}: {len(report.uncaptioned)} images but no captions: {HOW_TO_CAPTION}{hint}"
    return f"{report.path} holds no images ({' '.join(IMAGE_SUFFIXES)}) and no .tar{hint}"
