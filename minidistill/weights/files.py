"""Weights and json on disk: memory-mapped, atomic, and clear about what is wrong with a file."""

import errno
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minidistill.errors import InputError, Stopped

# What torch raises of a damaged file, whose unpickler checks little of what the bytes make it do, and Pillow too.
DAMAGED = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
DAMAGED += (ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile)
# Of Python's own library, what training programs save beside weights.
DATA_MODULES = {"argparse", "collections", "datetime", "pathlib", "typing"}
DATA_TYPES = {f"builtins.{kind.__name__}" for kind in (bool, bytes, dict, float, int, list, object, set, str, tuple)}
# What the system says where there is no room: on the disk, in the user's share of it, for a file of that size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is looked up in names takes for ever with enough of them; SDXL beside its running average has 4,200 tensors.
MOST_TENSORS, LONGEST_NAME = 20_000, 500


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, memory-mapped: bytes are read when first used. InputError: it is broken."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text a .safetensors file carries beside its tensors; {} of other files. InputError: as above."""
    if Path(path).suffix != ".safetensors":
        return {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    path = existing_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {_what_it_is(path, error)}") from error


def read_pickle(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .bin, .pt, .pth or .ckpt state dict, read without running any code hidden in the file.

    Of a training checkpoint its "state_dict" is read, and not what lies beside it (counters, optimizer states, ...).
    Classes that torch does not know are neither imported nor called: `_stand_ins` take their places.
    InputError: the file is missing, broken, holds anything but tensors, or would need code to be run.
    """
    path = existing_file(path)
    try:
        # Only the zip format that torch has written since 1.6 can be memory-mapped.
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip:
            _refuse_compressed(path)
        with torch.serialization.safe_globals(_stand_ins(path) if is_zip else []):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, *DAMAGED) as error:
        # torch says "Weights only load failed" of a forbidden object and of a file that is no pickle.
        if isinstance(error, pickle.UnpicklingError) and re.search("Unsupported (global|class)", str(error)):
            reason = "it holds objects that run code when loaded; use a .safetensors version of it"
            raise InputError(f"refused {path}: {reason}") from error
        raise InputError(f"cannot read {path}: {_what_it_is(path, error)}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    items = content.items() if isinstance(content, dict) else [(None, content)]
    size = path.stat().st_size
    if not all(isinstance(name, str) and _is_plain(value, size) for name, value in items):
        raise InputError(f"{path} is not a state dict: a file that maps names to tensors, nothing else, is needed")
    return dict(content)


def _refuse_compressed(path: Path) -> None:
    """InputError: a zip file whose parts are compressed, so that a small one might fill the memory."""
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise InputError(f"refused {path}: {some(packed, 3)} in it are compressed, which torch never does")


def _is_plain(value: object, size: int) -> bool:
    """Whether this is a dense tensor whose numbers are all there, in a file of `size` bytes; views may repeat one."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return is_dense and not value.is_quantized and value.nbytes <= size


class _Inert:
    """Takes the place of an unknown class or function in a checkpoint: whatever is asked for, an empty mapping."""

    def __new__(cls, *_: object) -> OrderedDict:
        return OrderedDict()  # which takes items and attributes, as most objects want; torch allows no other class to


class _InertArray:
    """The same for NumPy's numbers, arrays and types, whose state is a tuple."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """Inert classes for the names in a checkpoint that torch does not know: callbacks, settings, NumPy's numbers.

    Names of Python's own library but for its plain data are left out, so that torch refuses them: nothing but an attack
    needs them to load weights.
    """
    return [
        (_InertArray if name.startswith("numpy.") else _Inert, name)
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
        or name.rpartition(".")[0] in DATA_MODULES
        or name in DATA_TYPES
    ]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """`read_safetensors` or `read_pickle`, by the file's suffix. InputError: more or longer names than a model has."""
    tensors = read_safetensors(path) if Path(path).suffix == ".safetensors" else read_pickle(path)
    if len(tensors) > MOST_TENSORS or any(len(name) > LONGEST_NAME for name in tensors):
        most = f"{MOST_TENSORS:,} tensors, or one whose name has more than {LONGEST_NAME} letters"
        raise InputError(f"refused {path}: it holds more than {most}, as no model does")
    return tensors


def read_json(path: str | Path) -> dict[str, Any]:
    """A json file whose content is an object, as every configuration is. InputError: missing, not json, no object."""
    path = existing_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of too many digits
        raise InputError(f"cannot read {path}: {_what_it_is(path, error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"cannot read {path}: a json object {{...}} is needed, it holds a {type(content).__name__}")
    return content


def existing_file(path: str | Path) -> Path:
    """The path itself, or an InputError that says how far it leads."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; a file is needed")
    if not path.is_file():
        missing = next((parent for parent in reversed(path.parents) if not parent.exists()), None)
        hint = f" (there is no folder {missing})" if missing else ""
        raise InputError(f"no such file: {path}{hint}")
    return path


def _what_it_is(path: Path, error: Exception) -> str:
    """One line about a file that could not be read, from its first bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512).lstrip()
    except OSError as os_error:
        return os_error.strerror or str(os_error)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if reason.startswith("Weights only load failed"):  # and torch's advice to load it so that it may run code
        reason = "no pickle of tensors"
    for applies, what in (
        (size == 0, "it is empty; download or save it again"),
        (head[:1] == b"<", "it is a web page (HTML), not the file itself; download the file again"),
        (head.startswith(b"version https://git-lfs"), "it is a git-lfs pointer; run git lfs pull where it is from"),
        (path.suffix == ".json", f"it is not valid json ({reason})"),
        (path.suffix == ".safetensors" and head[:2] == b"PK", "it is a torch pickle; rename it to .bin"),
    ):
        if applies:
            return what
    return f"it is damaged or cut short ({size:,} bytes; {reason}); download or save it again"


def some(names: Iterable[str], shown: int = 12) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = sorted(names) if isinstance(names, set) else list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to; after the block it takes the place of `path`, complete and on disk.

    Readers and crashes see the old file or the new one, never a part. The suffix is kept, parents are made.
    InputError: the operating system refuses to write there.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    blocking = next((parent for parent in path.parents if parent.is_file()), None)
    if blocking:
        raise InputError(f"cannot write {path}: {blocking} is a file, not a folder")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # the safetensors package leaves a file that only its owner can read
            to_disk(temporary)
            temporary.replace(path)
            to_disk(path.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


def torn_files(folder: Path) -> list[Path]:
    """The temporary files of `atomic_path` that killed processes left in a folder, or up to two folders below."""
    found = (path for depth in (".*", "*/.*", "*/*/.*") for path in folder.glob(depth))
    return [path for path in found if re.fullmatch(r"\.\d+\..+", path.name) and path.is_file()]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this context, that the operating system refuses to write is an InputError which names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError | SafetensorError) -> InputError:
    """The operating system refused to write there: one line for people."""
    number = getattr(error, "errno", None)
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # all that the safetensors package passes on
        number = int(found[1])
    message = f"cannot write {path}: {os.strerror(number) if number else error}"
    return Stopped(f"{message}; make room") if number in FULL else InputError(message)


def to_disk(path: Path) -> None:
    """Wait until the file, or the folder's list of names, has left the operating system's buffers."""
    if path.is_dir() and os.name == "nt":  # Windows has no such call for folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, from any device and with any strides, and text beside {"format": "pt"}, atomically."""
    with atomic_path(path) as temporary:
        save_file(_separate(tensors), temporary, metadata={"format": "pt", **(metadata or {})})


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them; copied only where needed."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0  # of the memory used by the tensors so far, in order of address
    for name in sorted(ready, key=lambda name: ready[name].data_ptr()):
        start = ready[name].data_ptr()
        if start < end:
            ready[name] = ready[name].clone()
        end = max(end, start + tensors[name].nbytes)
    return ready


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented json, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
