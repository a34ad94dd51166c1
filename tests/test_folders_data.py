"""Protects reading image folders: every way to give captions, odd images, and what is said of mistakes."""

import os
import shutil
import sys

import numpy as np
import pytest
from data_files import encoded, fill, found, image, refusal, rows, truncate
from PIL import EpsImagePlugin, ExifTags, Image

from minidistill.data import folders, listing
from minidistill.data.folders import UNREADABLE, ImageFolder, to_rgb, to_square
from minidistill.data.listing import find_examples

TWENTY = [f"{i:02}.jpg" for i in range(20)]


def twenty(folder, size: tuple[int, int] = (16, 16)) -> None:
    fill(folder, {name: encoded(i, size, "jpeg") for i, name in enumerate(TWENTY)})
    fill(folder, {"metadata.jsonl": rows(*TWENTY)})


def unreadable(folder: ImageFolder) -> list[str]:
    """What is said of the files that cannot be read, once all have been."""
    for i in range(len(folder)):
        folder.sample(i)
    return folder.report.remarks.get(UNREADABLE, [])


# where captions come from


def test_jsonl_with_subfolders_and_caption_lists(tmp_path):
    fill(tmp_path, {name: encoded() for name in ("a.png", "cats/b.JPG", "cats/deep/c.webp")})
    lines = [
        {"file_name": "cats/b.JPG", "text": ["first", "second"]},
        {"file_name": "a.png", "text": " ein Käfer \n", "extra": 1},
        {"file_name": "./cats/deep/c.webp", "text": "c"},
    ]
    fill(tmp_path, {"metadata.jsonl": lines})
    report = find_examples(tmp_path)
    expected = [("cats/b.JPG", "first | second"), ("a.png", "ein Käfer"), ("cats/deep/c.webp", "c")]
    assert list(found(report).items()) == expected
    assert report.summary() == f"{tmp_path}: 3 captioned images."


def test_csv_with_quotes_a_byte_order_mark_and_repeated_images(tmp_path):
    text = 'text,file_name\r\n"red, ""big"" one",a.png\r\nagain,a.png\r\n'
    fill(tmp_path, {"a.png": encoded(), "metadata.csv": b"\xef\xbb\xbf" + text.encode()})
    assert [example.captions for example in find_examples(tmp_path).examples] == [('red, "big" one',), ("again",)]


def test_caption_files_beside_the_images_in_all_spellings(tmp_path):
    fill(tmp_path, {name: encoded() for name in ("a.jpg", "sub/b.png", "c.png", "d.png", "E.PNG")})
    fill(tmp_path, {"a.txt": "an a\n", "sub/b.Caption": "a b", "c.txt": "  \n", "E.TXT": "an e"})
    report = find_examples(tmp_path)
    assert found(report) == {"E.PNG": "an e", "a.jpg": "an a", "sub/b.png": "a b"}
    assert report.summary().endswith("; 2 without caption, skipped: c.png, d.png.")


def test_rows_are_relative_to_their_file_outrank_caption_files_and_leave_other_images_to_them(tmp_path):
    fill(tmp_path, {name: encoded() for name in ("train/x.png", "train/y.png", "more/x.png")})
    fill(tmp_path, {"train/x.txt": "ignored", "train/y.txt": "beside", "train/metadata.jsonl": rows("x.png")})
    fill(tmp_path, {"more/metadata.csv": "file_name,text\nx.png,from csv\n"})
    report = find_examples(tmp_path)
    expected = [("more/x.png", "from csv"), ("train/x.png", "caption of x.png"), ("train/y.png", "beside")]
    assert list(found(report).items()) == expected and not report.remarks


def test_links_are_followed_but_not_in_circles_and_hidden_files_are_not_seen(tmp_path):
    fill(tmp_path, {"elsewhere/a.png": encoded(), "elsewhere/a.txt": "a"})
    fill(tmp_path, {"data/.cache/thumb.png": encoded(), "data/._a.png": encoded()})
    for name, target in (("link", "elsewhere"), ("loop", "data")):
        (tmp_path / "data" / name).symlink_to(tmp_path / target, target_is_directory=True)
    report = find_examples(tmp_path / "data")
    assert found(report) == {"link/a.png": "a"} and not report.remarks


# what is left out, and said


def test_rows_of_absent_files_and_without_caption_are_named(tmp_path):
    fill(tmp_path, {name: encoded() for name in ("a.png", "b.png", "c.png")})
    more = [{"file_name": "b.png", "text": None}, {"file_name": "c.png", "text": []}]
    fill(tmp_path, {"metadata.jsonl": [*rows("a.png", "gone.png"), *more]})
    report = find_examples(tmp_path)
    assert found(report) == {"a.png": "caption of a.png"}
    assert report.remarks == {
        "in the metadata but not on the disk, skipped": ["gone.png"],
        "without caption, skipped": ["b.png", "c.png"],
    }


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    fill(tmp_path, {"a.png": encoded(), "a.txt": "a", "closed/b.png": encoded(), "closed/b.txt": "b"})
    listed = os.scandir

    def scandir(path):  # which chmod does not do to root
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    report = find_examples(tmp_path)
    assert found(report) == {"a.png": "a"}
    assert report.remarks == {"folders not read (Permission denied)": ["closed"]}


def test_a_caption_file_that_cannot_be_read_is_why_its_image_is_without(tmp_path):
    fill(tmp_path, {name: encoded() for name in ("a.png", "b.png", "c.png")})
    fill(tmp_path, {"a.txt": b"caf\xe9", "c.txt": "good"})
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    without = ["a.png (its .txt is not UTF-8)", "b.png (its .txt: No such file or directory)"]
    assert find_examples(tmp_path).remarks == {"without caption, skipped": without}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncation_is_noticed_in_every_format(tmp_path, suffix):
    twenty(tmp_path)
    fill(tmp_path, {f"x.{suffix}": encoded(0, (64, 64), Image.registered_extensions()[f".{suffix}"])})
    fill(tmp_path, {"x.txt": "x"})
    truncate(tmp_path / f"x.{suffix}")
    assert [text.split()[0] for text in unreadable(ImageFolder(tmp_path, 8))] == [f"x.{suffix}"]


def test_the_next_readable_example_stands_in_for_a_broken_one_which_is_named_once(tmp_path, capsys):
    twenty(tmp_path)
    (tmp_path / "04.jpg").write_bytes(b"<html>404</html>")
    truncate(tmp_path / "19.jpg")
    folder = ImageFolder(tmp_path, 8)
    for asked, shown in ((4, 5), (19, 0), (4, 5), (-1, 0)):
        sample = folder.sample(asked)
        assert sample.number == shown and sample.name == f"{shown:02}.jpg"
        assert sample.captions == (f"caption of {shown:02}.jpg",) == (folder[asked][1],)
        assert np.array_equal(sample.image, folder[shown][0])
    said = capsys.readouterr().out
    assert said.count("04.jpg (not an image)") == said.count("19.jpg (") == 1 and said.count("\n") == 2
    assert "; 2 unreadable: another image stands in for each until it is removed: 04.jpg (" in folder.summary()
    truncate(tmp_path / "10.jpg")
    os.utime(tmp_path / "10.jpg", (1, 1))  # as if it had been so all along
    message = refusal(lambda: folder[10])  # now more than a tenth
    assert "3 of 20 images cannot be read" in message and "10.jpg (" in message


@pytest.mark.parametrize("place", ["03.jpg", "a.tar"])
def test_what_is_deleted_or_damaged_after_the_folder_was_opened_has_no_stand_in(tmp_path, place):
    twenty(tmp_path)
    fill(tmp_path, {"a.tar/0.png": encoded(), "a.tar/0.txt": "x"})
    folder = ImageFolder(tmp_path, 8)
    number = next(i for i in range(len(folder)) if folder.name(i).startswith(place))
    content = (tmp_path / place).read_bytes()
    (tmp_path / place).write_bytes(content[: len(content) // 8])
    os.utime(tmp_path / place, (folder._opened + 1, folder._opened + 1))
    way = "since the command began: put it back, or an empty file for which another image stands in"
    message = refusal(lambda: folder[number])
    assert message.startswith(f"{tmp_path / place} was changed, and cannot be read now (") and message.endswith(way)
    (tmp_path / place).unlink()
    assert refusal(lambda: folder[number]) == f"{tmp_path / place} was deleted {way}"
    (tmp_path / place).write_bytes(content)
    assert folder.sample(number).number == number, "which is forgotten once it is back"


def test_an_image_that_is_a_program_or_would_fill_the_memory_is_not_decoded(tmp_path, monkeypatch, capsys):
    def run(*_, **__):
        raise SystemExit("Ghostscript is started, which runs PostScript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    twenty(tmp_path)
    (tmp_path / "04.jpg").write_bytes(encoded(kind="eps"))
    assert ImageFolder(tmp_path, 8).sample(4).number == 5
    assert "04.jpg (not an image)" in capsys.readouterr().out
    (tmp_path / "04.jpg").write_bytes(encoded(size=(2000, 600)))
    monkeypatch.setattr(folders, "MOST_PIXELS", 1_000_000)
    assert ImageFolder(tmp_path, 8).sample(4).number == 5
    assert "04.jpg (2000 x 600 pixels are more than 1 million)" in capsys.readouterr().out
    (tmp_path / "04.jpg").write_bytes(encoded(size=(2000, 600), kind="jpeg"))  # decoded at a fraction of that
    assert ImageFolder(tmp_path, 8).sample(4).number == 4


def test_a_link_to_nothing_is_unreadable(tmp_path):
    twenty(tmp_path)
    (tmp_path / "zz.png").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "zz.txt").write_text("zz")
    folder = ImageFolder(tmp_path, 8)
    assert folder.sample(20).number == 0 and folder.stat(20) == (-1, -1)
    assert unreadable(folder) == ["zz.png (No such file or directory)"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are always Unicode")
def test_a_file_name_that_is_not_utf8_is_named_in_ascii(tmp_path):
    twenty(tmp_path)
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(tmp_path / "00.jpg", tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("a café", encoding="utf-8")
    folder = ImageFolder(tmp_path, 8)
    assert folder.name(20) == r"caf\udce9.png" and folder[20][1] == "a café"
    truncate(tmp_path / name)
    assert [text.split()[0] for text in unreadable(ImageFolder(tmp_path, 8))] == [r"caf\udce9.png"]


# what is refused


def test_no_folder_no_images_no_captions(tmp_path):
    assert "does not exist" in refusal(lambda: find_examples(tmp_path / "nowhere"))
    fill(tmp_path, {"a.png": encoded()})
    assert "is not a folder" in refusal(lambda: find_examples(tmp_path / "a.png"))
    message = refusal(lambda: find_examples(tmp_path))
    assert "0 captioned images; 1 without caption, skipped: a.png; captions come from metadata.jsonl" in message
    assert "resolution" in refusal(lambda: ImageFolder(tmp_path, 0))


def test_a_path_prefixed_twice_is_explained(tmp_path):
    fill(tmp_path, {"train/a.png": encoded(), "train/metadata.jsonl": rows("train/a.png")})
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
        ("metadata.csv", b"image,text\na.png,a\n", "line 2 has no 'file_name' but 'image', 'text'"),
        ("metadata.csv", b"file_name,text\n,a\n", "line 2: file_name must be the name"),
    ],
)
def test_metadata_that_cannot_be_understood_is_refused_with_its_line(tmp_path, name, content, said):
    fill(tmp_path, {"a.png": encoded(), name: content})
    message = refusal(lambda: find_examples(tmp_path))
    assert said in message and name in message


def test_metadata_that_cannot_be_opened_and_two_in_one_folder_are_refused(tmp_path):
    fill(tmp_path, {"a.png": encoded()})
    (tmp_path / "metadata.csv").symlink_to(tmp_path / "nowhere")
    said = f"cannot read {tmp_path / 'metadata.csv'}: No such file or directory; repair"
    assert said in refusal(lambda: find_examples(tmp_path))
    fill(tmp_path, {"metadata.jsonl": rows("a.png")})
    assert "keep one" in refusal(lambda: find_examples(tmp_path))


# pixels


@pytest.mark.parametrize(("here", "path"), [("", "."), ("train", ".."), ("", "train/..")])
def test_a_relative_path_names_the_same_files(tmp_path, monkeypatch, here, path):
    fill(tmp_path, {"train/a.png": encoded(), "b.png": encoded(), "b.txt": "b"})
    fill(tmp_path, {"metadata.jsonl": rows("train/a.png")})
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
    fill(tmp_path, {"b/more.png": b"", "b/more.txt": "more"})
    assert ImageFolder(tmp_path / "b", 8).fingerprint().startswith("21 images, ")
    text = (tmp_path / "a/metadata.jsonl").read_text()
    (tmp_path / "a/metadata.jsonl").write_text(text.replace("caption of 07", "another of 07"))
    after = ImageFolder(tmp_path / "a", 8).fingerprint()
    assert after.startswith("20 images, ") and after != before


def test_original_size_and_crop_are_known(tmp_path):
    fill(tmp_path, {"wide.png": encoded(0, (120, 60)), "tall.png": encoded(0, (50, 80))})
    fill(tmp_path, {"metadata.jsonl": rows("wide.png", "tall.png")})
    folder = ImageFolder(tmp_path, 20)
    assert folder.sample(0).original == (60, 120) and folder.sample(0).crop == (0, 10)  # resized to 40 x 20
    assert folder.sample(1).original == (80, 50) and folder.sample(1).crop == (6, 0)  # resized to 20 x 32
    assert folder[0][0].mode == "RGB" and folder[0][0].size == folder[1][0].size == (20, 20)
    assert np.array_equal(folder[-1][0], ImageFolder(tmp_path, 20)[1][0])
    with pytest.raises(IndexError):
        folder[2]


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("size", [(403, 301), (640, 520), (96, 515), (64, 40)])
def test_large_jpegs_are_decoded_at_a_fraction_of_their_size_to_nearly_the_same_pixels(tmp_path, size, turned):
    x, y = np.meshgrid(*(np.linspace(0, 3, length) for length in size))
    waves = np.stack([np.sin(2 * x + y), np.cos(3 * y), np.sin(x * y)], axis=-1)
    whole, exif = Image.fromarray((127.5 * (1 + waves)).astype(np.uint8)), Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    whole.save(tmp_path / "a.jpg", quality=95, exif=exif)
    (tmp_path / "a.txt").write_text("waves")
    folder = ImageFolder(tmp_path, 32)
    loaded, upright = folder.load(0), to_rgb(Image.open(tmp_path / "a.jpg"))
    assert loaded.size == upright.size and loaded.original == upright.size[::-1]
    fraction = {403: 4 if turned == 1 else 1, 640: 8}.get(size[0], 1)
    assert loaded.image.size == tuple(-(-length // fraction) for length in upright.size)
    sample, exact = folder.sample(0), to_square(upright, 32)
    error = np.asarray(sample.image, float) - np.asarray(exact, float)
    assert np.abs(error).max() <= 6 and np.abs(error.mean()) < 0.5
    side = min(upright.size)
    assert sample.crop == tuple(round((length - side) / 2 * 32 / side) for length in upright.size)[::-1]


def test_to_square_is_resize_then_centre_crop():
    wide = image(size=(120, 60))
    usual = wide.resize((64, 32), Image.Resampling.LANCZOS).crop((16, 0, 48, 32))
    assert np.abs(np.asarray(usual, float) - np.asarray(to_square(wide, 32), float)).max() <= 2
    exact = image(size=(64, 32))
    assert np.array_equal(to_square(exact, 32), exact.crop((16, 0, 48, 32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    clear = Image.new("RGBA", (8, 4), (200, 200, 200, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 4, 4))
    if mode == "P":
        clear = Image.new("P", (8, 4), 1)
        clear.putpalette([0, 0, 0, 200, 200, 200])
        clear.paste(0, (0, 0, 4, 4))
        clear.save(tmp_path / "a.png", transparency=0)
    else:
        clear.convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(to_rgb(Image.open(tmp_path / "a.png")))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 200).all()
    mixed = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0))
    assert mixed == pytest.approx((127,) * 3, abs=1)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_keeps_its_shades(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    pixels = np.asarray(to_rgb(Image.open(tmp_path / f"a.{suffix}")))
    assert np.array_equal(pixels[..., 0].ravel(), np.arange(256)) and (pixels[..., 0] == pixels[..., 2]).all()


def test_plain_palette_grey_bilevel_and_cmyk_images_become_rgb_and_floating_point_ones_do_not(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "one.png")
    colours = {"p.png": (255, 0, 0), "cmyk.jpg": (255, 0, 0), "l.png": (77,) * 3, "one.png": (255,) * 3}
    for name, colour in colours.items():
        shown = to_rgb(Image.open(tmp_path / name))
        assert shown.mode == "RGB" and shown.getpixel((4, 4)) == pytest.approx(colour, abs=3), name
    for pixels in (np.ones((8, 8), np.float32), np.full((8, 8), 65536, np.int32), np.full((8, 8), -1, np.int32)):
        with pytest.raises(ValueError, match="no agreed range"):
            to_rgb(Image.fromarray(pixels))
