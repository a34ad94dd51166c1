"""Files of strangers, damaged at random: each is read, or refused in one line, and nothing else happens.

Every kind of file is read by the function that commands call. A fault is any exception but a refusal, an input that
takes long or much memory, and what a reader has no business doing: writing, starting programs, connecting.

    python tests/test_fuzz.py --count 10000       a table by kind of file, the inputs read in child processes
    python tests/test_fuzz.py --case loras 123    one of them once more
"""

import argparse
import copy
import faulthandler
import io
import json
import multiprocessing
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from strangers import READERS, with_header, write_seeds

from minidistill.errors import InputError

resource = pytest.importorskip("resource", reason="Windows does not say how much memory a process took")

OUTCOMES = ("read", "refused")
LONGEST, LARGEST = 2, 300  # seconds of CPU and MB that no input may take
HANGS, MOST = 10, 8 << 30  # seconds of CPU after which a child process is ended, bytes that it may ask for
HEAVY = ("folder", "sdxl", "pickles", "single", "parts", "loras")  # of models, which take longest: fewer of these

# damage

VALUES = [
    *(None, True, False, -1, 0, 1, 3, 7, 100, 2**31, 2**63, 10**12, 10**30, 0.5, -1.5, 1e-30, 1e300),
    *(float("nan"), float("inf"), "", "x", "../../x", "/etc/hostname", "a\nb\x1b[1m\u2028", "\ud83d", "\0", "x" * 300),
    *([], {}, [[]], {"a": {}}, [1, 2, 3], [None], [10**9] * 2, [["x", {}]], {"": 0}),
    *("F32", "I64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "C64"),
]
SAME_SIZE = {
    "F32": ("I32", "U32"),
    "F16": ("BF16", "I16"),
    "I64": ("F64", "C64"),
    "I32": ("F32",),
    "U8": ("I8", "BOOL"),
}
TAR = {124: (b"7" * 11 + b"\0", b"0" * 12, b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000001000\0")}
TAR |= dict.fromkeys((0, 157, 345), (b"../../x.jpg", b"/x.jpg", b"\xff\n.jpg", b"0.txt", b"a" * 100, b""))
TAR[156] = [bytes([kind]) for kind in b"0123456789xgLKSV\0"]  # of a tar's header, from which byte: size, names, kind


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut off, put in, taken out, repeated, or a number in them replaced by an extreme one."""
    end = rng.choice((16, 256, 2048, len(data)))
    at, length = rng.randrange(min(end, len(data)) + 1), rng.choice((1, 2, 4, 8, 64, 1000))
    number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, rng.randrange(2**16)))
    packed = struct.pack(rng.choice("<>") + "Q", number)[slice(*rng.choice(((0, 8), (0, 4), (4, 8), (0, 2), (6, 8))))]
    return rng.choice((
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        lambda: data[:at] + packed + data[at + len(packed) :],
        lambda: data[:at],
        lambda: data[:at] + rng.randbytes(length) + data[at:],
        lambda: data[:at] + data[at + length :],
        lambda: data[:at] + data[at : at + length] * 3 + data[at + length :],
    ))()  # fmt: skip


def places(content: object) -> list[tuple]:
    """(container, key) of everything in parsed JSON."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else [])
    return [place for key, value in pairs for place in [(content, key), *places(value)]]


def damage_object(rng: random.Random, content: object) -> object:
    """Parsed JSON with one thing replaced, removed, renamed, swapped with another or put into lists."""
    content = copy.deepcopy(content)
    if not (there := places(content)):
        return rng.choice(VALUES)
    within, key = rng.choice(there)
    if isinstance(within[key], str) and within[key][:1] in "{[" and rng.random() < 0.9:  # JSON in JSON, as in headers
        with suppress(ValueError):
            within[key] = json.dumps(damage_object(rng, json.loads(within[key])))
            return content
    other, its_key = rng.choice(there)
    kind = rng.randrange(7)
    if kind == 0:
        del within[key]
    elif kind == 1 and isinstance(within, dict):
        within[str(rng.choice((*VALUES, its_key)))] = within.pop(key)
    elif kind == 2:
        within[key], other[its_key] = copy.deepcopy((other[its_key], within[key]))
    else:
        within[key] = rng.choice(VALUES)
    return content


def damage_json(rng: random.Random, text: bytes) -> bytes:
    """JSON text with a damaged object, nested too deeply, or with a key that comes twice."""
    content = json.loads(text)
    kind = rng.randrange(20)
    if kind == 0:
        return text.rstrip()[:-1] + b"," + json.dumps({rng.choice(list(content)): rng.choice(VALUES)}).encode()[1:]
    if kind == 1:
        return b'{"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return json.dumps(damage_object(rng, content)).encode()


def damage_lines(rng: random.Random, text: bytes) -> bytes:
    *before, last = text.splitlines()[: rng.randrange(1, 20)]
    return b"\n".join([*before, damage_json(rng, last), *text.splitlines()[len(before) + 1 :], b""])


def damage_tensors(rng: random.Random, data: bytes) -> bytes:
    """A .safetensors file with a damaged header, or one in which two tensors have changed places or one its dtype."""

    def change(header: dict) -> object:
        one, other = (rng.choice([name for name in header if name != "__metadata__"]) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0:
            header[one], header[other] = header[other], header[one]
        elif kind == 1:
            header[one]["dtype"] = rng.choice(SAME_SIZE[header[one]["dtype"]])
        elif kind == 2 and header["__metadata__"]:
            header["__metadata__"] = damage_object(rng, header["__metadata__"])
        elif kind == 3:
            header[one]["shape"] = header[one]["shape"][::-1] + [1] * rng.randrange(3)
        else:
            return damage_object(rng, header)
        return header

    return with_header(data, change)


def damage_tar(rng: random.Random, data: bytes) -> bytes:
    """A tar in which a header says another name, kind, size or target, with the checksum that fits."""
    at = rng.choice([i for i in range(0, len(data) - 512, 512) if data[i + 257 : i + 262] == b"ustar"])
    header = bytearray(data[at : at + 512])
    value = rng.choice(TAR[start := rng.choice(list(TAR))])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def damage_png(rng: random.Random, data: bytes) -> bytes:
    """A PNG that states another size, depth or colour type, with the checksum that fits."""
    head = damage_bytes(rng, data[12:29]).ljust(17, b"\0")[:17]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def damage_zip(rng: random.Random, data: bytes) -> bytes:
    """A checkpoint in torch's zip format with damage inside its pickle, perhaps compressed."""
    old, packed = zipfile.ZipFile(io.BytesIO(data)), rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(out := io.BytesIO(), "w") as new:
        for name in old.namelist():
            content = damage_bytes(rng, old.read(name)) if name.endswith("data.pkl") else old.read(name)
            new.writestr(zipfile.ZipInfo(name), content, packed)
    return out.getvalue()


DAMAGES = {".json": damage_json, ".jsonl": damage_lines, ".safetensors": damage_tensors, ".tar": damage_tar}
DAMAGES |= {".png": damage_png, ".bin": damage_zip, ".ckpt": damage_zip}


def damaged(rng: random.Random, suffix: str, data: bytes) -> bytes:
    """The content of a file after one to three damages."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = DAMAGES.get(suffix, damage_bytes) if rng.random() < 0.7 else damage_bytes
        with suppress(Exception):  # of what is damaged already, and no JSON, tar, ... any more
            data = kind(rng, data)
    return data


def watch(event: str, args: tuple) -> None:
    """An audit hook. Readers write nothing; Python itself may write what it has compiled."""
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if DONE is not None and (event in FORBIDDEN or writes) and "__pycache__" not in str(args[0]):
        DONE.append(f"{event} {args[0]!r:.80}")


DONE: list[str] | None = None  # what a reader did that it must not, while one is watched
FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.mkdir"}
FORBIDDEN |= {"os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
sys.addaudithook(watch)


def peak() -> int:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def read_one(kind: str, number: int) -> str:
    """Damage a seed of this kind, read it, and put it back: "read", "refused", or what is wrong."""
    global DONE
    rng = random.Random(f"{kind} {number}")
    path = rng.choice(sorted(path for path in Path(kind).rglob("*") if path.is_file()))
    whole = path.read_bytes()
    path.write_bytes(damaged(rng, path.suffix, whole))
    before, start, DONE = peak(), time.process_time(), []
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[kind](path)
        found = "read"
    except InputError as error:
        found = "refused" if str(error).isprintable() else f"not one line: {error!r:.200}"
    except OSError as error:  # of a path that the system refuses: commands end in one line then
        found = "refused" if error.filename else f"{error!r:.200}"
    except Exception as error:
        found = f"{error!r:.150}, {' '.join(traceback.format_exc(limit=-3).split()):.500}"
    finally:
        did, DONE = DONE, None
        path.write_bytes(whole)
    took, grown = time.process_time() - start, peak() - before
    if found in OUTCOMES and (did or took > LONGEST or grown > LARGEST):
        found = f"it took {took:.1f} s and {grown} MB, and did {did}"
    return found if found in OUTCOMES else f"{found} ({path})"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("fuzz"))
        write_seeds()
    return folder


@pytest.mark.parametrize("kind", READERS)
def test_whole_files_are_read_and_damaged_ones_are_read_or_refused_in_one_line(kind, seeds, monkeypatch):
    monkeypatch.chdir(seeds)
    for path in sorted(path for path in Path(kind).rglob("*") if path.is_file())[:4]:
        READERS[kind](path)
    found = {f"{kind} {number}": read_one(kind, number) for number in range(8 if kind in HEAVY else 24)}
    assert {*found.values()} <= {*OUTCOMES}, found


def read_in_child(kind: str, numbers: range, results: Connection) -> None:
    """Send (number, seconds of CPU, what came of it) of inputs; the process is ended where one hangs."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    faulthandler.register(signal.SIGPROF, chain=True)  # says where it hangs, then ends the process
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, HANGS)
        start = time.process_time()
        found = read_one(kind, number)
        results.send((number, time.process_time() - start, found))


def read_many(kind: str, count: int) -> list[tuple[int, float, str]]:
    """What came of inputs, read by a child process, and by another one after each that dies."""
    done: list[tuple[int, float, str]] = []
    while len(done) < count:
        results, its_end = multiprocessing.Pipe(duplex=False)
        numbers = range(len(done), count)
        process = multiprocessing.get_context("fork").Process(target=read_in_child, args=(kind, numbers, its_end))
        process.start()
        its_end.close()
        with suppress(EOFError):
            while True:
                done.append(results.recv())
        process.join()
        if len(done) < count:
            done.append((len(done), HANGS, f"the process ended with {process.exitcode}"))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs, of all kinds together")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "NUMBER"), help="read one, in this process")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_seeds()
        if asked.case:
            return print(read_one(asked.case[0], int(asked.case[1])))
        share = -(-asked.count // (9 * len(READERS) - 8 * len(HEAVY)))
        print(f"{'files':10}{'inputs':>8}{'read':>8}{'refused':>9}{'slowest':>11}")
        for kind in READERS:
            found = read_many(kind, share if kind in HEAVY else 9 * share)
            read, refused = (sum(what == outcome for *_, what in found) for outcome in OUTCOMES)
            slowest = max(seconds for _, seconds, _ in found)
            print(f"{kind:10}{len(found):8}{read:8}{refused:9}{slowest:9.2f} s", flush=True)
            for number, _, what in found:
                if what not in OUTCOMES:
                    print(f"    --case {kind} {number}: {what}", flush=True)


if __name__ == "__main__":
    main()
