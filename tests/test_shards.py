"""Protects reading images out of tars in place: what belongs together, what is said of damaged archives."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from data_files import encoded, fill, found, image, refusal
from PIL import Image

from minidistill.data.folders import ImageFolder
from minidistill.data.listing import find_examples

DAMAGED = "cut short or damaged; its whole files are used"


def write_shard(path, count: int = 3) -> None:
    """A tar as img2dataset writes it."""
    for i in range(count):
        members = {"jpg": encoded(i, kind="jpeg"), "txt": f"caption {i}", "json": "{}"}
        fill(path.parent, {f"{path.name}/{i:09d}.{suffix}": content for suffix, content in members.items()})


def test_a_folder_of_tars_is_a_data_set_and_nothing_is_unpacked(tmp_path):
    write_shard(tmp_path / "00000.tar")
    write_shard(tmp_path / "00001.tar", 2)
    fill(tmp_path, {"00000.parquet": "of no interest", "00000_stats.json": "of no interest"})
    folder = ImageFolder(tmp_path, 24)
    assert folder.summary() == f"{tmp_path}: 5 captioned images."
    assert [folder.name(i) for i in (0, 4)] == ["00000.tar/000000000.jpg", "00001.tar/000000001.jpg"]
    assert [caption for _, caption in folder] == ["caption 0", "caption 1", "caption 2", "caption 0", "caption 1"]
    for i, seed in enumerate((0, 1, 2, 0, 1)):
        expected = Image.open(io.BytesIO(encoded(seed, kind="jpeg"))).crop((8, 0, 32, 24))
        assert np.array_equal(folder[i][0], expected)
    assert len(list(tmp_path.iterdir())) == 4


def test_tars_and_files_share_a_folder(tmp_path):
    write_shard(tmp_path / "more/x.tar", 1)
    fill(tmp_path, {"a.png": encoded(7), "a.txt": "a file"})
    folder = ImageFolder(tmp_path, 8)
    assert [folder.name(i) for i in range(2)] == ["a.png", "more/x.tar/000000000.jpg"]
    assert [folder.captions(i) for i in range(2)] == [("a file",), ("caption 0",)]
    assert folder.sample(0).original == folder.sample(1).original == (24, 40)


def test_metadata_in_a_tar_are_of_its_images(tmp_path):
    fill(tmp_path, {f"x.tar/{name}": encoded(i) for i, name in enumerate(("a.png", "i/b.png", "c.png"))})
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "i/b.png", "text": "b"}]
    fill(tmp_path, {"x.tar/metadata.jsonl": [*rows, {"file_name": "gone.png", "text": ""}], "x.tar/c.txt": "c"})
    folder = ImageFolder(tmp_path, 8)
    assert found(folder.report) == {"x.tar/a.png": "a", "x.tar/i/b.png": "b", "x.tar/c.png": "c"}
    assert folder.report.remarks == {"in the metadata but not on the disk, skipped": ["x.tar/gone.png"]}
    assert folder.load(1).image.tobytes() == image(1).tobytes()
    fill(tmp_path, {"y.tar/metadata.jsonl": "{\n"})
    assert f"{tmp_path}/y.tar/metadata.jsonl line 1 is not one JSON object" in refusal(lambda: find_examples(tmp_path))


def test_what_belongs_together_is_told_by_name_wherever_it_is(tmp_path):
    members = {
        "late.txt": "before its image\n",
        "./a/same.WEBP": encoded(kind="webp"),
        "b/same.png": encoded(1),
        "b/same.txt": "b",
        "a/same.caption": "a",
        "late.jpg": encoded(2, kind="jpeg"),
        "j.json": {"caption": " from json ", "original_width": 640, "original_height": 480},
        "j.png": encoded(3),
        "half.json": r'{"caption": "cat \ud83d"}',
        "half.png": encoded(3),
        "none.png": encoded(4),
        "empty.png": encoded(4),
        "empty.txt": " ",
        "broken.png": encoded(4),
        "broken.json": "{oops",
        "latin.png": encoded(4),
        "latin.txt": b"caf\xe9",
        "._j.png": b"a Mac's",
    }
    fill(tmp_path, {f"a.tar/{name}": content for name, content in members.items()})
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
    assert folder.read_bytes(3) == encoded(3) and folder.stat(3)[0] == len(encoded(3))
    assert folder.sample(3).original == (480, 640)


def test_a_name_with_a_number_that_python_does_not_read_is_a_name(tmp_path):
    stem = f"{'1' * 5000}_x/0"  # as of kohya's folders, which say how often their images repeat
    fill(tmp_path, {f"0.tar/{stem}.jpg": encoded(kind="jpeg"), f"0.tar/{stem}.txt": "a"})
    assert len(find_examples(tmp_path).examples) == 1


def test_a_sparse_member_that_states_more_than_there_is_ends_its_tar(tmp_path):
    write_shard(tmp_path / "0.tar", 1)
    info = tarfile.TarInfo("large.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % 0 * 2  # one part of no bytes, in a file of 2 MB
    header[483:495] = b"00010000000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(bytes(header) + whole)
    write_shard(tmp_path / "1.tar", 1)
    report = find_examples(tmp_path)
    assert [example.name for example in report.examples] == ["1.tar/000000000.jpg"]
    assert list(report.remarks) == ["damaged tars"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read_in_both_spellings(tmp_path, format):
    stem = "x" * 150 + "ä"
    fill(tmp_path, {f"a.tar/{stem}.png": encoded(), f"a.tar/{stem}.txt": "long"}, format)
    (example,) = find_examples(tmp_path).examples
    assert example.name == f"a.tar/{stem}.png" and example.captions == ("long",)


@pytest.mark.parametrize("cut", ["in an image", "in a header", "before the end mark"])
def test_of_a_truncated_tar_the_whole_members_are_used_and_it_is_named(tmp_path, cut):
    for name in ("00000.tar", "00001.tar"):
        write_shard(tmp_path / name, 4)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        last, final = (tar.getmember(f"000000003.{suffix}") for suffix in ("jpg", "json"))
    lengths = {
        "in an image": last.offset_data + 100,
        "in a header": last.offset + 100,
        "before the end mark": final.offset_data + 512,
    }
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: lengths[cut]])
    folder = ImageFolder(tmp_path, 8)
    assert len(folder) == (8 if cut == "before the end mark" else 7)
    assert f"1 damaged tars: 00000.tar ({DAMAGED})" in folder.summary()
    assert all(folder.sample(i).number == i for i in range(len(folder)))


@pytest.mark.parametrize(("size", "kind"), [(2**80, tarfile.REGTYPE), (-512, tarfile.REGTYPE), (-1024, b"L")])
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
    assert report.remarks == {"damaged tars": [f"a.tar ({DAMAGED})"]}


def test_what_is_no_plain_tar_is_named(tmp_path):
    write_shard(tmp_path / "good.tar")
    fill(tmp_path, {"packed.zip": gzip.compress((tmp_path / "good.tar").read_bytes()), "empty.zip": b""})
    for name in ("packed", "empty"):
        (tmp_path / f"{name}.zip").rename(tmp_path / f"{name}.tar")
    summary = ImageFolder(tmp_path, 8).summary()
    assert "empty.tar (not a plain tar: " in summary and "packed.tar (not a plain tar: " in summary
    (tmp_path / "good.tar").unlink()
    assert "0 captioned images; 2 damaged tars: empty.tar" in refusal(lambda: ImageFolder(tmp_path, 8))


def test_broken_images_in_tars_have_a_stand_in_and_are_named(tmp_path, capsys):
    for i in range(12):
        fill(tmp_path, {f"a.tar/{i}.png": encoded(i)[: -50 if i == 5 else None], f"a.tar/{i}.txt": str(i)})
    assert ImageFolder(tmp_path, 8).sample(5).number == 6
    assert "note: a.tar/5.png (" in capsys.readouterr().out
