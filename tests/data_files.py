"""Data folders for tests, written from dictionaries: images, captions, metadata, tars."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from minidistill.data.listing import FolderReport
from minidistill.errors import InputError


def image(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(
    seed: int = 0, size: tuple[int, int] = (40, 24), kind: str = "png", exif: Image.Exif | None = None
) -> bytes:
    """The content of a file with these pixels."""
    stream = io.BytesIO()
    image(seed, size).save(stream, kind)
    return stream.getvalue()


def fill(root, files: dict[str, bytes | str | dict | list], format: int = tarfile.PAX_FORMAT) -> None:
    """Write files: images, texts, JSON objects, and lists as JSON lines. What lies in x.tar/ becomes a tar."""
    for name, given in files.items():
        text = "".join(json.dumps(row) + "\n" for row in given) if isinstance(given, list) else given
        text = json.dumps(text) if isinstance(text, dict) else text
        content = text.encode() if isinstance(text, str) else text
        tar, inside, member = name.partition(".tar/")
        path = root / (f"{tar}.tar" if inside else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not inside:
            path.write_bytes(content)
            continue
        with tarfile.open(path, "a", format=format) as archive:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def rows(*names: str) -> list[dict]:
    """Lines of metadata.jsonl."""
    return [{"file_name": name, "text": f"caption of {name}"} for name in names]


def found(report: FolderReport) -> dict[str, str]:
    """Captions by the name of their image."""
    return {example.name: " | ".join(example.captions) for example in report.examples}


def truncate(path) -> None:
    """Cut off the last third of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


def refusal(call) -> str:
    """The one line of the InputError that a call ends with."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
