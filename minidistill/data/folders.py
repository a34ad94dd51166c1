"""Folders of captioned images.

Three ways to say which caption belongs to which image, in one tree of folders, sub-folders included:

    metadata.jsonl      {"file_name": "cats/0001.jpg", "text": "a cat"}      one JSON object a line
    metadata.csv        file_name,text                                       a header, then one row per image
    0001.jpg 0001.txt   the caption in the text file (or 0001.caption)

`file_name` is relative to the folder of the metadata file. A caption may be a list, the first is taken; an
empty caption is none. Two rows for one image are two examples. A row outranks a text file.

`scan` decodes every image once, because truncated files open well and fail late, and says what it left out.
"""

import csv
import difflib
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub.utils import tqdm
from PIL import Image, ImageOps

from minidistill.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MOST_UNREADABLE = 0.1  # more than this and something else is wrong: a failed copy, a wrong folder
HOW_TO_CAPTION = "captions come from metadata.jsonl or metadata.csv (file_name, text), or from x.txt beside x.jpg"


@dataclass
class FolderReport:
    """What a folder holds: `captions[i]` belongs to `files[i]` (a path). The other lists feed the summary."""

    path: str
    files: list[str] = field(repr=False)
    captions: list[str] = field(repr=False)
    unreadable: list[str] = field(default_factory=list)  # "name (reason)"
    uncaptioned: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # named in a metadata file, not on the disk
    small: list[str] = field(default_factory=list)  # kept, but enlarged to the resolution asked for
    lookalikes: list[str] = field(default_factory=list)  # files called almost, but not quite, metadata.jsonl

    def summary(self) -> str:
        """One paragraph for people: how many examples, and what was left out, by name."""
        parts = [f"{self.path}: {len(self.files)} captioned images"]
        for names, what in (
            (self.unreadable, "unreadable, skipped"),
            (self.uncaptioned, "without caption, skipped"),
            (self.missing, "in the metadata but not on the disk, skipped"),
            (self.small, "smaller than the resolution, enlarged"),
            (self.lookalikes, f"not read, though named almost like {' or '.join(METADATA_NAMES)}"),
        ):
            if names:
                parts.append(f"{len(names)} {what}: {_some(names)}")
        return "; ".join(parts) + "."


class ImageFolder:
    """The readable, captioned images of a folder as (RGB PIL image resolution x resolution, caption).

    The largest square of each image is resized with Lanczos: the central one, or without `center_crop` one
    at a random place that depends on the index alone. An index always gives the same pixels. `report` is what
    the scan found. InputError: as `scan`, or a file that has become unreadable since.
    """

    def __init__(self, path: str | Path, resolution: int, center_crop: bool = True) -> None:
        if resolution < 1:
            raise InputError(f"resolution must be at least 1 pixel, got {resolution}")
        self.resolution, self.center_crop = resolution, center_crop
        self.report = scan(path, resolution)

    def __len__(self) -> int:
        return len(self.report.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        file, caption = self.report.files[i], self.report.captions[i]
        place = (0.5, 0.5) if self.center_crop else _random_place(i % len(self))
        try:
            image = to_square(load_rgb(file), self.resolution, place)
        except Exception as error:  # decoders raise anything on broken bytes
            raise InputError(f"{file} could be read when the folder was scanned but not now: {error}") from error
        return image, caption


def scan(path: str | Path, resolution: int | None = None) -> FolderReport:
    """Find the captioned images under `path` and decode each once, with a progress bar on terminals.

    `resolution` only makes the report name the images with a shorter side. InputError: no such folder, no
    images, no captions, metadata that cannot be understood (file and line are named), or more than 10 % of
    the images unreadable.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"data folder {root} {'is not a folder' if root.exists() else 'does not exist'}")
    images, metadata, texts, lookalikes = _walk(root)
    report = FolderReport(path=str(root), files=[], captions=[], lookalikes=[_name(f, root) for f in lookalikes])
    in_rows = _take_rows(metadata, root, report)
    for image in images:
        if image in in_rows:
            continue
        caption = _caption_beside(image, texts)
        if caption:
            report.files.append(image)
            report.captions.append(caption)
        else:
            report.uncaptioned.append(_name(image, root))
    if not report.files:
        raise InputError(_why_nothing(report, bool(images)))
    return _without_unreadable(report, root, resolution)


def load_rgb(file: str | Path) -> Image.Image:
    """Decode an image file completely, upright (EXIF) and as 8-bit RGB; of an animation the first frame.

    Raises whatever the decoder raises on broken files, and ValueError for pixels without an agreed range.
    """
    with Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: turned upright, transparency flattened on white, 16-bit grey scaled to 8 bits."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip: everything above 255 of 65535 would be white
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def to_square(image: Image.Image, resolution: int, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The largest square at `place` (fractions of the room left of and above it), resized with Lanczos.

    The same as resizing the short side and then cropping, without the huge picture that a strip would become.
    """
    side = min(image.size)
    left, top = ((length - side) * fraction for length, fraction in zip(image.size, place, strict=True))
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def _walk(root: Path) -> tuple[list[str], list[str], set[str], list[str]]:
    """(images, metadata files, caption files, files named almost like metadata), sorted, none hidden."""
    images, metadata, texts, lookalikes = [], [], set(), []
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in visited
        )
        for name in sorted(name for name in names if not name.startswith(".")):
            file = os.path.join(folder, name)
            suffix = os.path.splitext(name)[1].lower()
            if name in METADATA_NAMES:
                metadata.append(file)
            elif suffix in IMAGE_SUFFIXES:
                images.append(file)
            elif name.lower().startswith("metadata") or difflib.get_close_matches(name, METADATA_NAMES, cutoff=0.85):
                lookalikes.append(file)
            elif suffix in CAPTION_SUFFIXES:
                texts.add(file)
    return images, metadata, texts, lookalikes


def _take_rows(metadata: list[str], root: Path, report: FolderReport) -> set[str]:
    """Add the examples of all metadata files to the report; the image files that the rows speak of."""
    folders = [os.path.dirname(file) for file in metadata]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InputError(f"{folder} holds both {' and '.join(METADATA_NAMES)}: keep one")
    spoken_of = set()
    for source in metadata:
        for file_name, caption in _rows(source):
            file = os.path.normpath(os.path.join(os.path.dirname(source), file_name))
            spoken_of.add(file)
            if not os.path.isfile(file):
                report.missing.append(_name(file, root))
            elif caption:
                report.files.append(file)
                report.captions.append(caption)
            else:
                report.uncaptioned.append(_name(file, root))
    return spoken_of


def _rows(source: str) -> Iterator[tuple[str, str]]:
    """(file_name, caption) of each row of a metadata file; the caption is "" where the row has none."""
    with open(source, encoding="utf-8-sig", newline="") as lines:  # spreadsheets put a byte-order mark in front
        try:
            if source.endswith(".csv"):
                reader = csv.DictReader(lines)
                for row in reader:
                    yield _row(row, f"{source} line {reader.line_num}")
            else:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _row(json.loads(line), f"{source} line {number}")
        except UnicodeDecodeError as error:
            raise InputError(f"{source} is not UTF-8 text: save it as UTF-8") from error
        except csv.Error as error:
            raise InputError(f"{source} line {reader.line_num} is not CSV: {error}") from error
        except json.JSONDecodeError as error:
            raise InputError(f"{source} line {number} is not one JSON object: {error}") from error


def _row(row: object, where: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object with file_name and text")
    for key in ("file_name", "text"):
        if key not in row:
            raise InputError(f"{where} has no {key!r} but {', '.join(map(repr, row))}: rename or add it")
    file_name, caption = row["file_name"], row["text"]
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where}: file_name must be the name of a file, got {file_name!r}")
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    if caption is not None and not isinstance(caption, str):
        raise InputError(f"{where}: text must be a string or a list of strings, got {caption!r}")
    return file_name, (caption or "").strip()


def _caption_beside(image: str, texts: set[str]) -> str:
    """The caption in x.txt or x.caption beside x.jpg, "" if there is none."""
    for suffix in CAPTION_SUFFIXES:
        file = os.path.splitext(image)[0] + suffix
        if file in texts:
            try:
                return Path(file).read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise InputError(f"{file} is not UTF-8 text: save it as UTF-8") from error
    return ""


def _why_nothing(report: FolderReport, any_images: bool) -> str:
    """The one line to refuse a folder with when it holds no example."""
    if report.missing:
        return (
            f"{report.path}: none of the files in the metadata exists, first {report.missing[0]}: "
            "file_name must be relative to the folder of the metadata file"
        )
    hint = f"; rename {report.lookalikes[0]} to metadata.jsonl or metadata.csv?" if report.lookalikes else ""
    if any_images or report.uncaptioned:
        return f"{report.path}: {len(report.uncaptioned)} images but no captions: {HOW_TO_CAPTION}{hint}"
    return f"{report.path} holds no images ({' '.join(IMAGE_SUFFIXES)}){hint}"


def _without_unreadable(report: FolderReport, root: Path, resolution: int | None) -> FolderReport:
    """Decode every file once; the report without those that cannot be, and with those named."""
    files = sorted(set(report.files))
    broken: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(files), desc="scan", disable=None) as bar:
        for start in range(0, len(files), 4096):  # in parts: a queue of millions of files would not be small
            part = files[start : start + 4096]
            for file, (reason, short_side) in zip(part, pool.map(_try, part), strict=True):
                bar.update()
                if reason:
                    broken[file] = reason
                elif resolution is not None and short_side < resolution:
                    report.small.append(_name(file, root))
    report.unreadable.extend(f"{_name(file, root)} ({reason})" for file, reason in broken.items())
    if len(broken) > MOST_UNREADABLE * len(files):
        raise InputError(
            f"{report.path}: {len(broken)} of {len(files)} images cannot be read: repair or remove "
            f"{_some(report.unreadable)}"
        )
    keep = [i for i, file in enumerate(report.files) if file not in broken]
    report.captions[:] = [report.captions[i] for i in keep]
    report.files[:] = [report.files[i] for i in keep]
    return report


def _try(file: str) -> tuple[str, int]:
    """(why the file cannot be read, "" if it can; its shorter side in pixels)."""
    try:
        with Image.open(file) as image:
            short_side = min(image.size)
            image.draft(image.mode, (64, 64))  # JPEG: read everything, compute an eighth of the pixels
            to_rgb(image)
    except Exception as error:  # decoders raise anything on broken bytes
        return " ".join(str(error).split()) or type(error).__name__, 0
    return "", short_side


def _random_place(i: int) -> tuple[float, float]:
    numbers = random.Random(i)
    return numbers.random(), numbers.random()


def _name(file: str, root: Path) -> str:
    return os.path.relpath(file, root)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
