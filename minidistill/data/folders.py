"""Folders of captioned images, as images for training: decoded, cropped to a square, resized.

`listing.py` says how captions are given. Opening a folder decodes nothing; broken files are found when they are read,
another example stands in for each, and they are named. `scan` decodes everything once and leaves a list of the broken
files in the folder, by which they are left out from then on.
"""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub.utils import tqdm
from PIL import Image, ImageOps, UnidentifiedImageError

from minidistill.data.listing import SCAN_NAME, FolderReport, find_examples, fingerprint, refuse_too_many, relative
from minidistill.data.shards import read_member
from minidistill.errors import InputError
from minidistill.weights.files import read_json, write_json

MOST_NAMED = 20  # broken files named one by one while training


class Sample(NamedTuple):
    """One example, as read: what a latent cache has to know."""

    image: Image.Image  # RGB, square
    captions: tuple[str, ...]  # the first is the caption; training draws one
    name: str = "an image"
    number: int = 0  # which example this is: another one than asked for, if that cannot be read
    original: tuple[int, int] = (0, 0)  # height and width, before anything was done to it
    crop: tuple[int, int] = (0, 0)  # rows above and columns left of the square, in pixels of the resized image


class ImageFolder:
    """The captioned images of a folder as (RGB PIL image resolution x resolution, caption).

    The largest square in the middle of each image is resized with Lanczos. Instead of a file that cannot be read one
    gets the next that can. `report` is what was found. InputError: as `find_examples`, or when more than 10 % of the
    images turn out to be unreadable.
    """

    def __init__(self, path: str | Path, resolution: int) -> None:
        if resolution < 1:
            raise InputError(f"resolution must be at least 1 pixel, got {resolution}")
        self.resolution = resolution
        self.report = find_examples(path)
        _leave_out_scanned(self.report)
        self._broken: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.report.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        sample = self.sample(i)
        return sample.image, sample.captions[0]

    def sample(self, i: int) -> Sample:
        """Example i with all that is known of it, or the next one that can be read. Threads may call it."""
        i = range(len(self))[i]  # as of any sequence: negative ones count from the end, IndexError
        for j in chain(range(i, len(self)), range(i)):
            if j not in self._broken:
                try:
                    return self._read(j)
                except Exception as error:  # decoders raise anything on broken bytes
                    self._note_broken(j, _reason(error))
        raise InputError(f"{self.report.path}: no image can be read")

    def summary(self) -> str:
        """What was found, in one paragraph for people."""
        return self.report.summary()

    def fingerprint(self) -> str:
        """Which files and captions these are, in a few words; nothing is read."""
        return fingerprint(len(self), ((self.name(i), self.captions(i)) for i in range(len(self))))

    def name(self, i: int) -> str:
        """Example i's file, relative to the folder."""
        return self.report.name(i)

    def captions(self, i: int) -> tuple[str, ...]:
        """All captions of example i."""
        caption = self.report.captions[i]
        return (caption,) if isinstance(caption, str) else caption

    def read_bytes(self, i: int) -> bytes:
        """The content of example i's file. OSError if it cannot be had."""
        return _read_bytes(self.report, i)

    def stat(self, i: int) -> tuple[int, int]:
        """(bytes, time of the last change in ns) of example i's file; the time is that of its tar. -1: gone."""
        tar, _, member = self.report.places[i, :3].tolist()
        size, time = _changed(self.report, i)
        return (size if tar < 0 else member), time

    def _read(self, i: int) -> Sample:
        image = _decode(self.read_bytes(i))
        side = min(image.size)
        left, top = (round((length - side) / 2 * self.resolution / side) for length in image.size)
        height, width = self.report.places[i, 3:].tolist()
        original = (height, width) if height > 0 else (image.height, image.width)
        square = to_square(image, self.resolution)
        return Sample(square, self.captions(i), self.name(i), i, original, (top, left))

    def _note_broken(self, i: int, reason: str) -> None:
        """Remember and name an unreadable file. InputError if there are too many."""
        with self._lock:
            if i in self._broken:
                return
            self._broken[i] = f"{self.name(i)} ({reason})"
            count = len(self._broken)
            refuse_too_many(self.report.path, list(self._broken.values()), count, len(self))
            if count <= MOST_NAMED:
                last = "; no more of them will be named, a scan finds them all" if count == MOST_NAMED else ""
                print(f"note: {self._broken[i]} cannot be read, the next image stands in for it{last}", flush=True)


def scan(path: str | Path, resolution: int | None = None) -> FolderReport:
    """Find the captioned images under `path` and decode each once, with a progress bar on terminals.

    What it found is written into the folder, where `ImageFolder` sees which files to leave out. `resolution` only makes
    the report name the images with a shorter side. InputError: as `find_examples`, or more than 10 % of the images
    unreadable.
    """
    report = find_examples(path)
    broken = _try_all(report, resolution)
    where = {file: i for i, file in enumerate(report.files) if file in broken}
    content = {
        "images": len(set(report.files)),
        "examples": len(report.files),
        "unreadable": {
            report.name(i): {"reason": broken[file], "changed": _changed(report, i)} for file, i in where.items()
        },
        "damaged tars": report.damaged,
        "without caption": report.uncaptioned,
        "in the metadata, not on the disk": report.missing,
        f"smaller than {resolution} pixels": report.small,
        "not read, named almost like metadata": report.lookalikes,
    }
    write_json(Path(path) / SCAN_NAME, content)  # before anything is refused: it is the list of what to repair
    report.leave_out(broken)
    return report


def _leave_out_scanned(report: FolderReport) -> None:
    """Leave out what a scan found broken, unless it has changed since."""
    file = Path(report.path) / SCAN_NAME
    if not file.exists():
        return
    known = read_json(file).get("unreadable")
    if not isinstance(known, dict) or not all(isinstance(entry, dict) for entry in known.values()):
        raise InputError(f"{file} is not a scan report: delete it")
    found = {report.name(i): i for i in range(len(report.files))} if known else {}
    broken = {}
    for name, entry in known.items():
        i = found.get(name)
        if i is not None and entry.get("changed") == _changed(report, i):
            broken[report.files[i]] = str(entry.get("reason"))
    if broken:
        report.leave_out(broken)


def _changed(report: FolderReport, i: int) -> list[int]:
    """Size and time of the last change of the file that example i is in; -1 where it is gone, or a link to nothing."""
    tar = int(report.places[i, 0])
    try:
        status = os.stat(report.files[i] if tar < 0 else report.tars[tar])
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _read_bytes(report: FolderReport, i: int) -> bytes:
    tar, offset, size = report.places[i, :3].tolist()
    return Path(report.files[i]).read_bytes() if tar < 0 else read_member(report.tars[tar], offset, size)


def _decode(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return to_rgb(image)


def _try_all(report: FolderReport, resolution: int | None) -> dict[str, str]:
    """Decode every file once: file -> why it cannot be. Adds the small ones to the report."""
    numbers = sorted({file: i for i, file in enumerate(report.files)}.values(), key=lambda i: report.files[i])
    broken: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(numbers), desc="scan", disable=None) as bar:
        for start in range(0, len(numbers), 4096):  # in parts: a queue of millions of files would not be small
            part = numbers[start : start + 4096]
            for i, (reason, short_side) in zip(part, pool.map(lambda i: _try(report, i), part), strict=True):
                bar.update()
                if reason:
                    broken[report.files[i]] = reason
                elif resolution is not None and short_side < resolution:
                    report.small.append(relative(report.files[i], report.path))
    return broken


def _try(report: FolderReport, i: int) -> tuple[str, int]:
    """(why the file cannot be read, "" if it can; its shorter side in pixels)."""
    try:
        with Image.open(io.BytesIO(_read_bytes(report, i))) as image:
            short_side = min(image.size)
            image.draft(image.mode, (64, 64))  # JPEG: read everything, compute an eighth of the pixels
            to_rgb(image)
    except Exception as error:  # decoders raise anything on broken bytes
        return _reason(error), 0
    return "", short_side


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: turned upright, transparency flattened on white, 16-bit grey scaled to 8 bits.

    Of an animation, the first frame. Raises whatever the decoder raises on broken files, and ValueError for pixels
    without an agreed range.
    """
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


def to_square(image: Image.Image, resolution: int) -> Image.Image:
    """The largest square in the middle, resized with Lanczos.

    The same as resizing the short side and then cropping, without the huge image that a image grid would become.
    """
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
