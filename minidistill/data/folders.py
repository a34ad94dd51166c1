"""Folders of captioned images, as images for training: decoded, cropped to a square, resized.

`listing.py` says how captions are given. Opening a folder decodes nothing; broken files are found when they are read,
another example stands in for each, and they are named. A file that is deleted or damaged after that ends the command: a
run must be the same when it is resumed.
"""

import io
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from minidistill.data.listing import find_examples, fingerprint, image_formats, some
from minidistill.errors import InputError, Stopped, printable

MOST_UNREADABLE = 0.1  # more than this and something else is wrong: a failed copy, a wrong folder
MOST_PIXELS = 2**28 // 3  # that are decoded of one image, 360 MB: where Pillow begins to suspect a bomb
MARGIN = 2  # JPEGs may be decoded at a fraction of their size down to this many times the resolution
ON_ITS_SIDE = (5, 6, 7, 8)  # values of EXIF's orientation
BACK = "put it back, or an empty file for which another image stands in"
UNREADABLE = "unreadable: another image stands in for each until it is removed"


class Sample(NamedTuple):
    """One example, as read: what a latent cache has to know."""

    image: Image.Image  # RGB, square
    captions: tuple[str, ...]  # the first is the caption; training draws one
    name: str = "an image"
    number: int = 0  # which example this is: another one than asked for, if that cannot be read
    original: tuple[int, int] = (0, 0)  # height and width, before anything was done to it
    crop: tuple[int, int] = (0, 0)  # rows above and columns left of the square, in pixels of the resized image


class Loaded(NamedTuple):
    """An image, upright and RGB, perhaps decoded at a fraction of its size."""

    image: Image.Image
    size: tuple[int, int]  # width and height of the file's image, upright
    original: tuple[int, int]  # height and width before anything was done to it


class ImageFolder:
    """The captioned images of a folder as (RGB PIL image resolution x resolution, caption).

    The largest square in the middle of each image is resized with Lanczos. Instead of a file that cannot be read one
    gets the next that can. `report` is what was found. InputError: as `find_examples`, or when more than 10 % of the
    images turn out to be unreadable. Stopped: an unreadable one was deleted or changed since the folder was opened.
    """

    def __init__(
        self, path: str | Path, resolution: int, split: str | None = None, caption_column: str | None = None
    ) -> None:
        """split, caption_column: as in `find_examples`."""
        if resolution < 1:
            raise InputError(f"resolution must be at least 1 pixel, got {resolution}")
        self.resolution = resolution
        self._opened = time.time()
        self.report = find_examples(path, split, caption_column)
        self._broken: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.report.examples)

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
                    self._refuse_changed(j, error)
                    self._note_broken(j, _reason(error))
        raise InputError(f"{self.report.path}: no image can be read")

    def summary(self) -> str:
        """What was found, in one paragraph for people."""
        return self.report.summary()

    def fingerprint(self) -> str:
        """Which examples these are, in a few words: their files' names in the folder and captions, in order.

        Not their pixels (nothing is read), and neither where the folder is nor when it was changed.
        """
        return fingerprint(len(self), ((self.name(i), self.captions(i)) for i in range(len(self))))

    def name(self, i: int) -> str:
        """Example i's file, relative to the folder."""
        return printable(self.report.examples[i].name)

    def captions(self, i: int) -> tuple[str, ...]:
        """All captions of example i."""
        return self.report.examples[i].captions

    def read_bytes(self, i: int) -> bytes:
        """The content of example i's file. OSError if it cannot be had."""
        return self.report.read(self.report.examples[i].place)

    def stat(self, i: int) -> tuple[int, int]:
        """(bytes, time of the last change in ns) of example i's file; the time is that of its tar. -1: removed."""
        place = self.report.examples[i].place
        try:
            status = os.stat(os.path.join(self.report.path, place.file))
        except OSError:
            return -1, -1
        return status.st_size if place.size < 0 else place.size, status.st_mtime_ns

    def load(self, i: int) -> Loaded:
        """Example i's image. JPEGs are decoded at 1/2, 1/4 or 1/8 if twice the resolution is left."""
        example = self.report.examples[i]
        with Image.open(io.BytesIO(self.read_bytes(i)), formats=image_formats()) as stored:
            orientation = stored.getexif().setdefault(ExifTags.Base.Orientation, example.orientation)
            size, least = stored.size, MARGIN * self.resolution
            if orientation == 1 or not any(length % 8 for length in size):  # else a cut edge may become the first
                stored.draft(None, (least, least))
            image = to_rgb(stored)
        width, height = size[::-1] if orientation in ON_ITS_SIDE else size
        if not example.original:
            return Loaded(image, (width, height), (height, width))
        # What is known of it is of the image as it was stored, which may have been on its side.
        original = example.original[::-1] if orientation in ON_ITS_SIDE else example.original
        return Loaded(image, (width, height), original)

    def _read(self, i: int) -> Sample:
        image, size, original = self.load(i)
        side = min(size)
        left, top = (round((length - side) / 2 * self.resolution / side) for length in size)
        square = to_square(image, self.resolution, size)
        return Sample(square, self.captions(i), self.name(i), i, original, (top, left))

    def _refuse_changed(self, i: int, error: Exception) -> None:
        """Stopped if example i's file could not be read for what was done to it since the folder was opened."""
        path = os.path.join(self.report.path, self.report.examples[i].place.file)
        is_gone, changed = not os.path.lexists(path), self.stat(i)[1] / 1e9  # seconds
        if is_gone or changed > self._opened:
            what = "was deleted" if is_gone else f"was changed, and cannot be read now ({_reason(error)})"
            raise Stopped(f"{path} {what} since the command began: {BACK}") from error

    def _note_broken(self, i: int, reason: str) -> None:
        """Remember and name an unreadable file. InputError if there are too many for it to be chance."""
        with self._lock:
            if i in self._broken:
                return
            self._broken.add(i)
            self.report.remark(UNREADABLE, f"{self.name(i)} ({reason})")
            named, total = self.report.remarks[UNREADABLE], len(self)
            if len(named) > MOST_UNREADABLE * total:
                found = f"{len(named)} of {total} images cannot be read"
                raise InputError(f"{self.report.path}: {found}: repair or remove {some(named)}")
            print(f"note: {named[-1]} cannot be read, the next image stands in for it", flush=True)


Item, Read = TypeVar("Item"), TypeVar("Read")


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], ahead: int) -> Iterator[Read]:
    """read(item) for each item, in order, while threads read the next `ahead` ones."""
    queue: deque = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for item in items:
            queue.append(pool.submit(read, item))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: turned upright, transparency flattened on white, 16-bit grey scaled to 8 bits.

    Of an animation, the first frame. Raises whatever the decoder raises on broken files, and ValueError for pixels
    without an agreed range, or more of them than MOST_PIXELS.
    """
    if math.prod(image.size) > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS / 1e6:.0f} million")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip: everything above 255 of 65535 would be white
        grey = np.asarray(image).astype(np.float64) / 257
        if grey.min() < 0 or grey.max() > 255:
            raise ValueError("32-bit and signed pixels have no agreed range")
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def to_square(image: Image.Image, resolution: int, size: tuple[int, int] | None = None) -> Image.Image:
    """The largest square in the middle, resized with Lanczos.

    The same as resizing the short side and then cropping, without the huge image that a panorama would become.

    size: width and height of the image before it was decoded at a fraction of them; the last pixels may be cut.
    """
    width, height = size or image.size
    side, fraction = min(width, height), round(max(width, height) / max(image.size))
    left, top = (width - side) / 2, (height - side) / 2
    box = tuple(edge / fraction for edge in (left, top, left + side, top + side))
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
