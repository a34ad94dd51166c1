"""Protects reading image folders: every way to give captions, odd images, and what is said of mistakes."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from minidistill.data import listing
from minidistill.data.folders import SCAN_NAME, ImageFolder, scan, to_rgb, to_square
from minidistill.data.listing import FolderReport, find_examples
from minidistill.errors import InputError


def image(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path, seed: int = 0, size: tuple[int, int] = (40, 24), caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(seed, size).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_jsonl(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows(*names: str) -> list[dict]:
    return [{"file_name": name, "text": f"caption of {name}"} for name in names]


def found(report: FolderReport) -> dict[str, tuple[str, ...]]:
    return {example.name: example.captions for example in report.examples}


def refusal(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# where captions come from


def test_jsonl_with_subfolders_and_caption_lists(tmp_path):
    for i, name in enumerate(("a.png", "cats/b.JPG", "cats/deep/c.webp")):
        save(tmp_path / name, i)
    write_jsonl(
        tmp_path / "metadata.jsonl",
        [
            {"file_name": "cats/b.JPG", "text": ["first", "second"]},
            {"file_name": "a.png", "text": " ein Käfer \n", "extra": 1},
            {"file_name": "./cats/deep/c.webp", "text": "c"},
        ],
    )
    report = find_examples(tmp_path)
    assert list(found(report).items()) == [
        ("cats/b.JPG", ("first", "second")),
        ("a.png", ("ein Käfer",)),
        ("cats/deep/c.webp", ("c",)),
    ]
    assert report.summary() == f"{tmp_path}: 3 captioned images."


def test_csv_with_quotes_a_byte_order_mark_and_repeated_images(tmp_path):
    save(tmp_path / "a.png")
    text = 'text,file_name\r\n"red, ""big"" one",a.png\r\nagain,a.png\r\n'
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [example.captions for example in find_examples(tmp_path).examples] == [('red, "big" one',), ("again",)]


def test_caption_files_beside_the_images_in_all_spellings(tmp_path):
    for i, name in enumerate(("a.jpg", "sub/b.png", "c.png", "d.png", "E.PNG")):
        save(tmp_path / name, i)
    (tmp_path / "a.txt").write_text("an a\n")
    (tmp_path / "sub/b.Caption").write_text("a b")
    (tmp_path / "c.txt").write_text("  \n")  # empty: none
    (tmp_path / "E.TXT").write_text("an e")
    report = find_examples(tmp_path)
    assert found(report) == {"E.PNG": ("an e",), "a.jpg": ("an a",), "sub/b.png": ("a b",)}
    assert report.summary().endswith("; 2 without caption, skipped: c.png, d.png.")


def test_rows_are_relative_to_their_file_outrank_caption_files_and_leave_other_images_to_them(tmp_path):
    save(tmp_path / "train/x.png", caption="ignored")
    save(tmp_path / "train/y.png", caption="beside")
    save(tmp_path / "more/x.png", 1)
    write_jsonl(tmp_path / "train/metadata.jsonl", rows("x.png"))
    (tmp_path / "more/metadata.csv").write_text("file_name,text\nx.png,from csv\n")
    report = find_examples(tmp_path)
    assert list(found(report).items()) == [
        ("more/x.png", ("from csv",)),
        ("train/x.png", ("caption of x.png",)),
        ("train/y.png", ("beside",)),
    ]
    assert not report.remarks


def test_links_are_followed_but_not_in_circles_and_hidden_files_are_not_seen(tmp_path):
    save(tmp_path / "elsewhere/a.png", caption="a")
    save(tmp_path / "data/.cache/thumb.png")
    save(tmp_path / "data/._a.png")
    for name, target in (("link", "elsewhere"), ("loop", "data")):
        (tmp_path / "data" / name).symlink_to(tmp_path / target, target_is_directory=True)
    report = find_examples(tmp_path / "data")
    assert found(report) == {"link/a.png": ("a",)} and not report.remarks


def test_half_a_surrogate_pair_in_a_caption_becomes_a_question_mark(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(r'{"file_name": "a.png", "text": ["cat \ud83d", "\ud83d\ude00"]}')
    assert ImageFolder(tmp_path, 8).captions(0) == ("cat ?", "\N{GRINNING FACE}")


# what is left out, and said


def twenty(tmp_path) -> None:
    names = [f"{i:02}.jpg" for i in range(20)]
    for i, name in enumerate(names):
        save(tmp_path / name, i, (64, 64))
    write_jsonl(tmp_path / "metadata.jsonl", rows(*names))


def truncate(path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])


def unreadable(report: FolderReport) -> list[str]:
    return next((names for what, names in report.remarks.items() if what.startswith("unreadable")), [])


def test_a_scan_counts_and_names_every_broken_file_and_writes_the_list(tmp_path):
    twenty(tmp_path)
    truncate(tmp_path / "03.jpg")
    Image.open(tmp_path / "03.jpg").close()  # it opens well: only decoding tells
    (tmp_path / "07.jpg").write_bytes(b"<html>404</html>")
    save(tmp_path / "bare.png")
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(rows("gone.png")[0]) + "\n")
    report = scan(tmp_path, 65)
    broken, other = unreadable(report)
    assert broken.startswith("03.jpg (") and "truncated" in broken and other == "07.jpg (not an image)"
    written = json.loads((tmp_path / SCAN_NAME).read_text())
    assert written == {"images": 20, "examples": 20, **report.remarks}
    assert written["without caption, skipped"] == ["bare.png"]
    assert written["in the metadata but not on the disk, skipped"] == ["gone.png"]
    assert len(written["smaller than 65 pixels, enlarged"]) == 18
    assert ": 00.jpg, 01.jpg, 02.jpg, 04.jpg, 05.jpg and 13 more" in report.summary()
    assert not any("smaller" in what for what in scan(tmp_path, 64).remarks)


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "bmp", "tiff"])
def test_truncation_is_noticed_in_every_format(tmp_path, suffix):
    twenty(tmp_path)
    save(tmp_path / f"x.{suffix}", size=(64, 64), caption="x")
    truncate(tmp_path / f"x.{suffix}")
    assert [text.split()[0] for text in unreadable(scan(tmp_path))] == [f"x.{suffix}"]


def test_more_than_a_tenth_unreadable_is_refused_after_the_list_is_written(tmp_path):
    twenty(tmp_path)
    for i in (1, 5, 9):
        truncate(tmp_path / f"{i:02}.jpg")
    message = refusal(lambda: scan(tmp_path))
    assert "3 of 20 images cannot be read" in message and "01.jpg" in message and "09.jpg" in message
    assert any(len(names) == 3 for names in json.loads((tmp_path / SCAN_NAME).read_text()).values() if names != 20)


def test_a_link_to_nothing_is_unreadable(tmp_path):
    twenty(tmp_path)
    (tmp_path / "zz.png").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "zz.txt").write_text("zz")
    folder = ImageFolder(tmp_path, 8)
    assert folder.sample(20).number == 0 and folder.stat(20) == (-1, -1)
    assert unreadable(scan(tmp_path)) == ["zz.png (No such file or directory)"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are always Unicode")
def test_a_file_name_that_is_not_utf8_is_named_in_ascii(tmp_path):
    twenty(tmp_path)
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(tmp_path / "00.jpg", tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("a café", encoding="utf-8")
    folder = ImageFolder(tmp_path, 8)
    assert folder.name(20) == r"caf\udce9.png" and folder[20][1] == "a café"
    truncate(tmp_path / name)
    assert [text.split()[0] for text in unreadable(scan(tmp_path))] == [r"caf\udce9.png"]


def test_rows_of_absent_files_and_without_caption_are_named(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    more = [{"file_name": "b.png", "text": None}, {"file_name": "c.png", "text": []}]
    write_jsonl(tmp_path / "metadata.jsonl", [*rows("a.png", "gone.png"), *more])
    report = find_examples(tmp_path)
    assert found(report) == {"a.png": ("caption of a.png",)}
    assert report.remarks == {
        "in the metadata but not on the disk, skipped": ["gone.png"],
        "without caption, skipped": ["b.png", "c.png"],
    }


def test_a_caption_file_that_cannot_be_read_is_why_its_image_is_without(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name, caption="good")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    without = ["a.png (its .txt is not UTF-8)", "b.png (its .txt: No such file or directory)"]
    assert find_examples(tmp_path).remarks == {"without caption, skipped": without}


# what is refused


def test_no_folder_no_images_no_captions(tmp_path):
    assert "does not exist" in refusal(lambda: find_examples(tmp_path / "nowhere"))
    save(tmp_path / "a.png")
    assert "is not a folder" in refusal(lambda: find_examples(tmp_path / "a.png"))
    message = refusal(lambda: find_examples(tmp_path))
    assert "0 captioned images; 1 without caption, skipped: a.png; captions come from metadata.jsonl" in message
    assert "resolution" in refusal(lambda: ImageFolder(tmp_path, 0))


@pytest.mark.parametrize("name", ["metadata.json1", "Metadata.jsonl", "meta_data.jsonl", "x.csv"])
def test_a_metadata_file_with_another_name_is_pointed_at(tmp_path, name):
    save(tmp_path / "a.png")
    write_jsonl(tmp_path / name, rows("a.png"))
    said = f"1 not read: rename to metadata.jsonl or metadata.csv: {name}"
    assert said in refusal(lambda: find_examples(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert said in find_examples(tmp_path).summary()


def test_a_path_prefixed_twice_is_explained(tmp_path):
    save(tmp_path / "train/a.png")
    write_jsonl(tmp_path / "train/metadata.jsonl", rows("train/a.png"))
    message = refusal(lambda: find_examples(tmp_path))
    assert "train/train/a.png" in message and "relative to the folder of that file" in message


GOOD = b'{"file_name": "a.png", "text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", GOOD + b"{oops\n", "line 2 is not one JSON object"),
        ("metadata.jsonl", b'["a.png", "a"]\n', "line 1 is not a JSON object with file_name and text"),
        ("metadata.jsonl", b'{"file_name": "a.png", "caption": "a"}', "has no 'text' but 'file_name', 'caption'"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 3}', "line 1: text must be a string"),
        ("metadata.jsonl", b'{"file_name": 7, "text": "a"}', "line 1: file_name must be the name"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\xff"}', "is not UTF-8"),
        ("metadata.jsonl", GOOD + b'{"id": ' + b"1" * 5000 + b"}", "line 2 is not one JSON object: Exceeds the limit"),
        ("metadata.csv", b"image,text\na.png,a\n", "line 2 has no 'file_name' but 'image', 'text'"),
        ("metadata.csv", b"file_name,text\n,a\n", "line 2: file_name must be the name"),
    ],
)
def test_metadata_that_cannot_be_understood_is_refused_with_its_line(tmp_path, name, content, said):
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    message = refusal(lambda: find_examples(tmp_path))
    assert said in message and name in message


def test_metadata_that_cannot_be_opened_and_two_in_one_folder_are_refused(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").symlink_to(tmp_path / "nowhere")
    said = f"cannot read {tmp_path / 'metadata.csv'}: No such file or directory; repair"
    assert said in refusal(lambda: find_examples(tmp_path))
    write_jsonl(tmp_path / "metadata.jsonl", rows("a.png"))
    assert "keep one" in refusal(lambda: find_examples(tmp_path))


# pixels


def test_items_are_rgb_squares_and_always_the_same(tmp_path):
    twenty(tmp_path)
    save(tmp_path / "wide.png", 5, (90, 31), caption="wide")
    folder, again = ImageFolder(tmp_path, 20), ImageFolder(tmp_path, 20)
    for i in (20, 0, 20):
        image, _ = folder[i]
        assert image.mode == "RGB" and image.size == (20, 20)
        assert np.array_equal(image, again[i][0])
    assert np.array_equal(folder[-1][0], folder[20][0])
    with pytest.raises(IndexError):
        folder[21]


def test_the_next_readable_example_stands_in_for_a_broken_one_which_is_named_once(tmp_path, capsys):
    twenty(tmp_path)
    for name in ("04.jpg", "19.jpg"):
        truncate(tmp_path / name)
    folder = ImageFolder(tmp_path, 8)
    for asked, shown in ((4, 5), (19, 0), (4, 5), (-1, 0)):
        sample = folder.sample(asked)
        assert sample.number == shown and sample.name == f"{shown:02}.jpg"
        assert sample.captions == (f"caption of {shown:02}.jpg",) == (folder[asked][1],)
        assert np.array_equal(sample.image, folder[shown][0])
    said = capsys.readouterr().out
    assert said.count("04.jpg (") == said.count("19.jpg (") == 1 and said.count("\n") == 2
    (tmp_path / "10.jpg").unlink()
    message = refusal(lambda: folder[10])
    assert "3 of 20 images cannot be read" in message and "10.jpg (No such file" in message


@pytest.mark.parametrize(("here", "path"), [("", "."), ("train", ".."), ("", "train/..")])
def test_a_relative_path_names_the_same_files(tmp_path, monkeypatch, here, path):
    save(tmp_path / "train/a.png")
    save(tmp_path / "b.png", caption="b")
    write_jsonl(tmp_path / "metadata.jsonl", rows("train/a.png"))
    monkeypatch.chdir(tmp_path / here)
    folder = ImageFolder(path, 8)
    assert [folder.name(i) for i in range(len(folder))] == ["train/a.png", "b.png"]
    assert not folder.report.remarks and folder.sample(0).number == 0


def test_a_fingerprint_tells_what_a_folder_holds_and_not_where_it_is(tmp_path, monkeypatch):
    twenty(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = ImageFolder(tmp_path / "a", 8).fingerprint()
    assert before.startswith("20 images, ") and len(before) == len("20 images, 3f2a91c0")
    os.utime(tmp_path / "b/03.jpg", ns=(1, 1))
    monkeypatch.setattr(Image, "open", None)  # opening reads no pixels,
    monkeypatch.setattr(listing.os.path, "isfile", None)  # and asks the disk about no file that it has listed
    monkeypatch.chdir(tmp_path / "b")
    for path in (tmp_path / "b", f"{tmp_path}/a/", ".", "../b/"):
        assert ImageFolder(path, 64).fingerprint() == before
    save(tmp_path / "b/more.png", caption="more")
    assert ImageFolder(tmp_path / "b", 8).fingerprint().startswith("21 images, ")
    text = (tmp_path / "a/metadata.jsonl").read_text()
    (tmp_path / "a/metadata.jsonl").write_text(text.replace("caption of 07", "another of 07"))
    after = ImageFolder(tmp_path / "a", 8).fingerprint()
    assert after.startswith("20 images, ") and after != before


def test_original_size_and_crop_are_known(tmp_path):
    save(tmp_path / "wide.png", size=(120, 60))
    save(tmp_path / "tall.png", size=(50, 80))
    write_jsonl(tmp_path / "metadata.jsonl", rows("wide.png", "tall.png"))
    folder = ImageFolder(tmp_path, 20)
    assert folder.sample(0).original == (60, 120) and folder.sample(0).crop == (0, 10)  # resized to 40 x 20
    assert folder.sample(1).original == (80, 50) and folder.sample(1).crop == (6, 0)  # resized to 20 x 32


def test_to_square_is_resize_then_centre_crop():
    wide = image(size=(120, 60))
    usual = wide.resize((64, 32), Image.Resampling.LANCZOS).crop((16, 0, 48, 32))
    assert np.abs(np.asarray(usual, float) - np.asarray(to_square(wide, 32), float)).max() <= 2
    exact = image(size=(64, 32))
    assert np.array_equal(to_square(exact, 32), exact.crop((16, 0, 48, 32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 4), (200, 200, 200, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 4))
    if mode == "P":
        image = Image.new("P", (8, 4), 1)
        image.putpalette([0, 0, 0, 200, 200, 200])
        image.paste(0, (0, 0, 4, 4))
        image.save(tmp_path / "a.png", transparency=0)
    else:
        image.convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(to_rgb(Image.open(tmp_path / "a.png")))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 200).all()


def test_half_transparent_pixels_are_mixed_with_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == pytest.approx((127,) * 3, abs=1)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_keeps_its_shades(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    pixels = np.asarray(to_rgb(Image.open(tmp_path / f"a.{suffix}")))
    assert np.array_equal(pixels[..., 0].ravel(), np.arange(256)) and (pixels[..., 0] == pixels[..., 2]).all()


def test_plain_palette_grey_bilevel_and_cmyk_images_become_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "one.png")
    for name, colour in (
        ("p.png", (255, 0, 0)),
        ("cmyk.jpg", (255, 0, 0)),
        ("l.png", (77,) * 3),
        ("one.png", (255,) * 3),
    ):
        image = to_rgb(Image.open(tmp_path / name))
        assert image.mode == "RGB" and image.getpixel((4, 4)) == pytest.approx(colour, abs=3), name


def test_floating_point_pixels_count_as_unreadable(tmp_path):
    twenty(tmp_path)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "f.tiff")
    (tmp_path / "f.txt").write_text("f")
    assert unreadable(scan(tmp_path)) == ["f.tiff (floating-point pixels have no agreed range)"]
