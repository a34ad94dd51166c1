"""Protects reading images out of tars in place: what belongs together, what is said of damaged archives."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from minidistill.data.folders import ImageFolder, scan
from minidistill.data.listing import find_examples
from minidistill.errors import InputError


def image(seed: int = 0, size: tuple[int, int] = (40, 24), kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_tar(path, members: dict[str, bytes | str], format: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, text in members.items():
            content = text.encode() if isinstance(text, str) else text
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_shard(path, count: int = 3) -> None:
    members = {}
    for i in range(count):
        members |= {f"{i:09d}.jpg": image(i, kind="jpeg"), f"{i:09d}.txt": f"caption {i}", f"{i:09d}.json": "{}"}
    write_tar(path, members)


def test_a_folder_of_tars_is_a_data_set_and_nothing_is_unpacked(tmp_path):
    write_shard(tmp_path / "00000.tar")
    write_shard(tmp_path / "00001.tar", 2)
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / name).write_bytes(b"of no interest")
    folder = ImageFolder(tmp_path, 24)
    assert folder.summary() == f"{tmp_path}: 5 captioned images."
    assert [folder.name(i) for i in (0, 4)] == ["00000.tar/000000000.jpg", "00001.tar/000000001.jpg"]
    assert [caption for _, caption in folder] == ["caption 0", "caption 1", "caption 2", "caption 0", "caption 1"]
    for i, seed in enumerate((0, 1, 2, 0, 1)):
        expected = Image.open(io.BytesIO(image(seed, kind="jpeg"))).crop((8, 0, 32, 24))
        assert np.array_equal(folder[i][0], expected)
    assert len(list(tmp_path.iterdir())) == 4


def test_tars_and_files_share_a_folder(tmp_path):
    write_shard(tmp_path / "more/x.tar", 1)
    (tmp_path / "a.png").write_bytes(image(7))
    (tmp_path / "a.txt").write_text("a file")
    folder = ImageFolder(tmp_path, 8)
    assert [folder.name(i) for i in range(2)] == ["a.png", "more/x.tar/000000000.jpg"]
    assert [folder.captions(i) for i in range(2)] == [("a file",), ("caption 0",)]
    assert folder.sample(0).original == folder.sample(1).original == (24, 40)


def test_what_belongs_together_is_told_by_name_wherever_it_is(tmp_path):
    record = {"caption": " from json ", "original_width": 640, "original_height": 480}
    members = {
        "late.txt": "before its image\n",
        "./a/same.WEBP": image(kind="webp"),
        "b/same.png": image(1),
        "b/same.txt": "b",
        "a/same.caption": "a",
        "late.jpg": image(2, kind="jpeg"),
        "j.json": json.dumps(record),
        "j.png": image(3),
        "half.json": r'{"caption": "cat \ud83d"}',
        "half.png": image(3),
        "none.png": image(4),
        "empty.png": image(4),
        "empty.txt": " ",
        "broken.png": image(4),
        "broken.json": "{oops",
        "latin.png": image(4),
        "latin.txt": b"caf\xe9",
        "._j.png": b"a Mac's",
    }
    write_tar(tmp_path / "a.tar", members)
    folder = ImageFolder(tmp_path, 8)
    assert {folder.name(i): folder.captions(i) for i in range(len(folder))} == {
        "a.tar/a/same.WEBP": ("a",),
        "a.tar/b/same.png": ("b",),
        "a.tar/late.jpg": ("before its image",),
        "a.tar/j.png": ("from json",),
        "a.tar/half.png": ("cat ?",),
    }
    without = [f"a.tar/{name}" for name in ("none.png", "empty.png", "broken.png", "latin.png (its .txt is not UTF-8)")]
    assert folder.report.remarks == {"without caption, skipped": without}
    assert folder.read_bytes(3) == image(3) and folder.stat(3)[0] == len(image(3))
    assert folder.sample(3).original == (480, 640)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read_in_both_spellings(tmp_path, format):
    stem = "x" * 150 + "ä"
    write_tar(tmp_path / "a.tar", {stem + ".png": image(), stem + ".txt": "long"}, format)
    (example,) = find_examples(tmp_path).examples
    assert example.name == f"a.tar/{stem}.png" and example.captions == ("long",)


@pytest.mark.parametrize("cut", ["in an image", "in a header", "before the end mark"])
def test_of_a_truncated_tar_the_whole_members_are_used_and_it_is_named(tmp_path, cut):
    write_shard(tmp_path / "00000.tar", 4)
    write_shard(tmp_path / "00001.tar", 4)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = {member.name: member for member in tar}
    last, final = members["000000003.jpg"], members["000000003.json"]
    length = {
        "in an image": last.offset_data + 100,
        "in a header": last.offset + 100,
        "before the end mark": final.offset_data + 512,
    }[cut]
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[:length])
    folder = ImageFolder(tmp_path, 8)
    assert len(folder) == (8 if cut == "before the end mark" else 7)
    assert "1 damaged tars: 00000.tar (cut short or damaged; its whole files are used)" in folder.summary()
    assert all(folder.sample(i).number == i for i in range(len(folder)))


@pytest.mark.parametrize(
    ("size", "kind"), [(2**80, tarfile.REGTYPE), (-512, tarfile.REGTYPE), (2**62, tarfile.XHDTYPE), (-1024, b"L")]
)
def test_of_a_tar_with_an_absurd_size_in_a_header_the_members_before_it_are_used(tmp_path, size, kind):
    write_shard(tmp_path / "a.tar", 2)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        header = tarfile.TarInfo.frombuf(content[(at := tar.getmember("000000001.jpg").offset) : at + 512], "utf-8", "")
    header.size, header.type = size, kind
    content[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(content)
    report = find_examples(tmp_path)
    assert [example.captions for example in report.examples] == [("caption 0",)]
    assert report.remarks == {"damaged tars": ["a.tar (cut short or damaged; its whole files are used)"]}


def test_what_is_no_plain_tar_is_named(tmp_path):
    write_shard(tmp_path / "good.tar")
    (tmp_path / "packed.tar").write_bytes(gzip.compress((tmp_path / "good.tar").read_bytes()))
    (tmp_path / "empty.tar").write_bytes(b"")
    summary = ImageFolder(tmp_path, 8).summary()
    assert "empty.tar (not a plain tar: " in summary and "packed.tar (not a plain tar: " in summary
    (tmp_path / "good.tar").unlink()
    with pytest.raises(InputError, match=r"0 captioned images; 2 damaged tars: empty\.tar"):
        ImageFolder(tmp_path, 8)


def test_broken_images_in_tars_have_a_stand_in_and_are_found_by_a_scan(tmp_path):
    members = {}
    for i in range(12):
        members |= {f"{i}.png": image(i), f"{i}.txt": str(i)}
    write_tar(tmp_path / "a.tar", members | {"5.png": image(5)[:-50]})
    assert ImageFolder(tmp_path, 8).sample(5).number == 6
    ((what, names),) = scan(tmp_path).remarks.items()
    assert what.startswith("unreadable") and len(names) == 1 and names[0].startswith("a.tar/5.png (")
