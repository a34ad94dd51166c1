"""Captioned images in .tar archives, as img2dataset and webdataset write them, read in place.

    000000012.jpg  000000012.txt  000000012.json

What has one name before its suffix belongs together. The caption is KEY.txt or KEY.caption, else `caption` (or `text`)
of KEY.json, which also knows the size the image had before it was scaled down for the archive.

An archive is a row of (header of 512 bytes, content): the headers tell where each content begins, so one pass over them
makes an index, and from then on any image is one seek and one read away. Only plain tars: a compressed one has to be
read from its beginning.
"""

import json
import os
import tarfile
from dataclasses import dataclass, field
from typing import BinaryIO

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")
BLOCK = 512  # bytes; headers and contents start at multiples of it
END = bytes(BLOCK)  # what a whole archive ends with
DAMAGED = "it is cut short or damaged"


@dataclass
class TarIndex:
    """The captioned images of one tar: `places` are (offset, bytes, original height, original width), 0 if unknown."""

    names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int, int]] = field(default_factory=list)
    uncaptioned: list[str] = field(default_factory=list)
    problem: str = ""  # why the archive is not whole; what is whole of it is used


def list_tar(path: str) -> TarIndex:
    """The index of one tar; images are in the archive's order. Of a damaged one, what is whole."""
    try:
        members, problem = _members(path)
        return _index(path, members, problem)
    except OSError as error:
        return TarIndex(problem=error.strerror or str(error))


def read_member(path: str, offset: int, size: int) -> bytes:
    """One member's content."""
    with open(path, "rb") as file:
        return _read(file, offset, size)


def clean_caption(text: str) -> str:
    """A caption as it is used: no space around it, and "?" for half a surrogate pair.

    JSON can spell one ("\\ud83d"), of an emoji that was cut in two; nothing can encode it.
    """
    return text.strip().encode("utf-8", "replace").decode()


def _members(path: str) -> tuple[dict[str, tuple[int, int]], str]:
    """(name, its suffix in lower case -> (offset, bytes) of each whole member; what is wrong with the archive)."""
    members, end, problem = {}, 0, ""
    total = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else it keeps 1 kB for each
                start, end = end, tar.offset
                if member.isreg() and 0 <= member.size <= total - member.offset_data:
                    members["".join(_split(member.name))] = (member.offset_data, member.size)
                if not start < end <= total:  # a size below 0 would lead round and round
                    raise tarfile.ReadError("a member ends outside of it")
    except (tarfile.ReadError, ValueError, OverflowError, MemoryError) as error:  # tarfile believes any size it reads
        problem = DAMAGED if end else f"not a plain tar: {error}"
    if not problem:  # tarfile takes a torn header, or none, for the end
        problem = "" if read_member(path, end, BLOCK) == END else DAMAGED
    return members, problem


def _index(path: str, members: dict[str, tuple[int, int]], problem: str) -> TarIndex:
    index, facts = TarIndex(problem=problem), {}
    with open(path, "rb") as file:
        for name, (offset, size) in members.items():
            stem, suffix = _split(name)
            if suffix not in IMAGE_SUFFIXES or os.path.basename(stem).startswith("."):
                continue
            if stem not in facts:
                facts[stem] = _facts(file, stem, members)
            caption, height, width = facts[stem]
            if caption:
                index.names.append(name)
                index.captions.append(caption)
                index.places.append((offset, size, height, width))
            else:
                index.uncaptioned.append(name)
    return index


def _split(name: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(name.removeprefix("./"))
    return stem, suffix.lower()


def _facts(file: BinaryIO, stem: str, members: dict[str, tuple[int, int]]) -> tuple[str, int, int]:
    """(caption or "", original height, original width or 0) of the images of one stem."""
    record = {}
    if stem + ".json" in members:
        try:
            record = json.loads(_read(file, *members[stem + ".json"]))
        except (ValueError, RecursionError):  # not JSON, not UTF-8: then it says nothing
            record = {}
    record = record if isinstance(record, dict) else {}
    height, width = (record.get(key) for key in ("original_height", "original_width"))
    if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
        height = width = 0
    for suffix in CAPTION_SUFFIXES:
        if stem + suffix in members:
            try:
                return clean_caption(_read(file, *members[stem + suffix]).decode("utf-8-sig")), height, width
            except UnicodeDecodeError:  # nobody edits a text in an archive: the image counts as without caption
                return "", height, width
    caption = record.get("caption") or record.get("text")
    return clean_caption(caption) if isinstance(caption, str) else "", height, width


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
