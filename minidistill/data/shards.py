"""The files inside a .tar archive, as img2dataset and webdataset write them, located without unpacking.

An archive is a row of (header of 512 bytes, content). One pass over the headers tells where each content begins; from
then on any file is one seek and one read away. Only plain tars: a compressed one has to be read from its beginning.
"""

import errno
import os
import tarfile
from typing import BinaryIO

END = bytes(tarfile.BLOCKSIZE)  # what a whole archive ends with
DAMAGED = "cut short or damaged; its whole files are used"
POINTER, WHAT_POINTER = b"version https://git-lfs", "a git-lfs pointer: run git lfs pull where it is from"


def list_tar(path: str) -> tuple[dict[str, tuple[int, int]], str]:
    """({name: (offset, bytes)} of the whole files of a tar, in its order; what is wrong with it, "" if nothing)."""
    members: dict[str, tuple[int, int]] = {}
    try:
        total = os.path.getsize(path)
        with open(path, "rb") as file:
            read_part(file, 0, len(POINTER))
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else it keeps 1 kB for each
                stated = member.offset_data + member.size if member.isreg() else tar.offset  # of sparse files more
                if not member.offset_data <= tar.offset <= total or stated > total:  # tarfile believes any size
                    return members, DAMAGED
                if member.isreg():
                    members[member.name.removeprefix("./")] = (member.offset_data, member.size)
            tar.fileobj.seek(tar.offset)  # a torn header looks like the end to tarfile
            return members, "" if tar.fileobj.read(len(END)) == END else DAMAGED
    except OSError as error:
        return members, error.strerror or str(error)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        return members, DAMAGED if members else f"not a plain tar: {error}"


def read_part(file: BinaryIO, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes of an opened file, -1: to its end. OSError: they are a pointer, which git-lfs puts in its place."""
    file.seek(offset)
    content = file.read(size)
    if content.startswith(POINTER):
        raise OSError(errno.EIO, WHAT_POINTER)
    return content
