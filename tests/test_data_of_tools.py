"""Protects data folders as other tools write them: img2dataset, webdataset, Hugging Face datasets, kohya, Windows."""

import io
import json
import shutil
from unicodedata import normalize

import numpy as np
import pytest
from data_files import encoded, fill, found, image, refusal
from PIL import Image, features

from minidistill import finetune, sensitivity, train_kd
from minidistill.data.folders import ImageFolder
from minidistill.data.listing import find_examples
from minidistill.errors import InputError
from minidistill.miniature.scenes import SIDE, Scenes
from minidistill.training import inputs

# splits, as Hugging Face's imagefolder finds them


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/", "test/"),
        ("data/training set/", "data/eval/"),
        ("Train2017/cats/", "val2017/cats/"),
        ("data/train-00000.tar/", "data/test-00000.tar/"),
        ("windows.tar/train\\", "windows.tar/test\\"),
    ],
)
def test_splits_are_kept_apart_and_named(tmp_path, train, test):
    for folder in (train, test):
        fill(tmp_path, {f"{folder}a.png": encoded(), f"{folder}a.txt": "a", f"{folder}b.png": encoded()})
        fill(tmp_path, {f"{folder}b.txt": "b"})
    fill(tmp_path, {"extra/a.png": encoded(), "extra/a.txt": "a"})
    other = "validation" if "val" in test and "eval" not in test else "test"
    report = find_examples(tmp_path)
    assert list(found(report)) == [f"{train}a.png", f"{train}b.png"]
    assert report.summary().startswith(f"{tmp_path}: 2 captioned images of split train; ")
    assert f"2 of split {other}, left out (--split): {test}a.png, {test}b.png" in report.summary()
    assert "1 of no split, left out (--split): extra/a.png" in report.summary()
    assert list(found(find_examples(tmp_path, other))) == [f"{test}a.png", f"{test}b.png"]
    assert len(find_examples(tmp_path, "all").examples) == 5
    prints = {ImageFolder(tmp_path, 8, split).fingerprint() for split in ("train", other, "all", None)}
    assert len(prints) == 3


def test_splits_count_where_the_metadata_lies_above_them_and_not_where_there_is_only_one(tmp_path):
    names = ["train/a.png", "test/b.png", "cats/trainers.png"]
    fill(tmp_path, {name: encoded() for name in names})
    fill(tmp_path, {"metadata.jsonl": [{"file_name": name, "text": name} for name in names]})
    assert list(found(find_examples(tmp_path))) == ["train/a.png"]
    assert "no images of split validation but test, train: give another --split" in refusal(
        lambda: find_examples(tmp_path, "validation")
    )
    (tmp_path / "train").rename(tmp_path / "dogs")
    fill(tmp_path, {"metadata.jsonl": [{"file_name": name, "text": name} for name in ("dogs/a.png", names[1])]})
    assert "; 1 of split test, used too, as no folder is called train (--split): test/b.png" in (
        find_examples(tmp_path).summary()
    )
    (tmp_path / "dogs").rename(tmp_path / "train")
    fill(tmp_path, {"metadata.jsonl": [{"file_name": name, "text": name} for name in names]})
    shutil.rmtree(tmp_path / "test")
    assert list(found(find_examples(tmp_path))) == ["train/a.png", "cats/trainers.png"]
    assert find_examples(tmp_path, "train").split == "train"


# what has a caption is used or named


@pytest.mark.parametrize("root", ["", "x.tar/"])
def test_no_image_with_a_caption_is_left_out_in_silence(tmp_path, root):
    files = {f"{root}{name}.txt": name for name in "abcde"}
    files |= {f"{root}a.jfif": encoded(kind="jpeg"), f"{root}b.ppm": encoded(kind="ppm"), f"{root}c.heic": b"no"}
    files |= {f"{root}e.png": encoded(), f"{root}e.jpg": encoded(kind="jpeg"), f"{root}e.mask.png": encoded()}
    fill(tmp_path, files)
    report = find_examples(tmp_path)
    assert found(report) == {f"{root}a.jfif": "a", f"{root}b.ppm": "b", f"{root}e.jpg": "e"}
    assert report.remarks == {
        "without caption, skipped": [f"{root}e.mask.png"],
        "of the same name as another image, skipped (a mask?)": [f"{root}e.png ({root}e.jpg is used)"],
        "caption files without an image that Pillow reads": [f"{root}c.txt, not {root}c.heic", f"{root}d.txt"],
    }
    assert [caption for _, caption in ImageFolder(tmp_path, 8)] == ["a", "b", "e"] if root else ["e", "a", "b"]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_pictures_of_stereo_cameras_are_read(tmp_path):
    image().save(tmp_path / "a.mpo", save_all=True, append_images=[image(1)])
    fill(tmp_path, {"a.txt": "a"})
    folder = ImageFolder(tmp_path, 8)
    assert folder[0][1] == "a" and not folder.report.remarks


def test_avif_is_read(tmp_path):
    fill(tmp_path, {"a.avif": encoded(kind="avif"), "a.txt": "a"})
    assert ImageFolder(tmp_path, 8)[0][1] == "a"


def test_kohyas_repeats_and_captions_of_several_lines_are_said(tmp_path):
    fill(tmp_path, {"10_dog/a.png": encoded(), "10_dog/a.txt": "one\ntwo\n"})
    lines = {"captions of several lines, each taken as one (metadata.jsonl takes lists)": ["10_dog/a.png"]}
    assert find_examples(tmp_path).remarks == lines  # all are repeated alike: nothing changes
    fill(tmp_path, {"1_reg/b.png": encoded(), "1_reg/b.txt": "b"})
    said = "folders named as kohya's scripts repeat them; here every image counts once"
    assert find_examples(tmp_path).remarks == {**lines, said: ["10_dog", "1_reg"]}


# img2dataset


def half_white(orientation: int = 1) -> bytes:
    """A JPEG whose upper half, as it is stored, is white."""
    pixels, exif, stream = np.zeros((24, 40, 3), np.uint8), Image.Exif(), io.BytesIO()
    pixels[:12], exif[0x0112] = 255, orientation
    Image.fromarray(pixels).save(stream, "jpeg", exif=exif if orientation > 1 else Image.Exif())
    return stream.getvalue()


@pytest.mark.parametrize("root", ["00000.tar/", "00000/"])
def test_the_original_size_is_that_of_the_upright_image_from_tars_and_from_files(tmp_path, root):
    record = {"caption": "from json", "original_width": 400, "original_height": 300}
    turned = {**record, "exif": json.dumps({"Image Orientation": "Rotated 90 CW", "EXIF ISO": "100"})}
    images = {
        "plain": (half_white(), record),
        "kept": (half_white(6), record),
        "kept and said": (half_white(6), turned),  # with --skip_reencode
        "lost": (half_white(), turned),
        "broken": (half_white(), {**record, "exif": "{oops"}),
    }
    for name, (content, said) in images.items():
        fill(tmp_path, {f"{root}{name}.jpg": content, f"{root}{name}.json": said})
    fill(tmp_path, {"00000.parquet": b"", "00000_stats.json": {}})
    folder = ImageFolder(tmp_path, 8)
    assert not folder.report.remarks and folder.captions(0) == ("from json",)
    samples = {folder.name(i).removeprefix(root): folder.sample(i) for i in range(len(folder))}
    for name in ("plain", "broken"):
        assert samples[f"{name}.jpg"].original == (300, 400)
        assert np.asarray(samples[f"{name}.jpg"].image)[:3].min() > 200  # the upper half is white
    for name in ("kept", "kept and said", "lost"):
        assert samples[f"{name}.jpg"].original == (400, 300)
        assert np.asarray(samples[f"{name}.jpg"].image)[:, -3:].min() > 200  # turned clockwise: the right half


# spellings and formats


def test_names_as_windows_and_macos_spell_them_and_semicolons_are_understood(tmp_path):
    accent = "Käfer"
    fill(tmp_path, {"i/a.png": encoded(), normalize("NFD", f"i/{accent}.png"): encoded()})
    fill(tmp_path, {normalize("NFD", f"{accent}.png"): encoded(), normalize("NFC", f"{accent}.txt"): "beside"})
    fill(tmp_path, {"metadata.csv": f'file_name;text\ni\\a.png;"a; b, c"\n{normalize("NFC", f"i/{accent}.png")};b\n'})
    report = find_examples(tmp_path)
    assert [example.captions for example in report.examples] == [("a; b, c",), ("b",), ("beside",)]
    assert not report.remarks and len(ImageFolder(tmp_path, 8)[1]) == 2


def test_names_that_are_absolute_or_of_other_case_and_spaces_behind_commas_are_understood(tmp_path):
    data, link = tmp_path / "test data", tmp_path / "link"
    fill(data, {name: encoded() for name in ("a.png", "i/b.PNG", "i/c.png")})
    fill(data, {"metadata.jsonl": [{"file_name": str(data / "a.png"), "text": "a"}]})
    fill(data, {"i/metadata.csv": 'file_name, text\nB.png, "b, b"\nc.png, c\n'})
    report, moved = find_examples(data), tmp_path / "moved"
    assert found(report) == {"a.png": "a", "i/b.PNG": "b, b", "i/c.png": "c"} and not report.remarks
    link.symlink_to(data)
    assert found(find_examples(link)) == found(report)
    before = ImageFolder(data, 8).fingerprint()
    data.rename(moved)
    fill(moved, {"metadata.jsonl": [{"file_name": str(moved / "a.png"), "text": "a"}]})
    assert ImageFolder(moved, 8).fingerprint() == before


@pytest.mark.parametrize("root", ["", "x.tar/"])
def test_captions_named_after_the_whole_file_are_of_that_file(tmp_path, root):
    fill(tmp_path, {f"{root}{name}": encoded() for name in ("a.jpg", "a.png", "b.png")})
    fill(tmp_path, {f"{root}a.jpg.txt": "jpg", f"{root}a.png.txt": "png", f"{root}b.txt": "b"})
    fill(tmp_path, {f"{root}b.png.json": {"title": "of Google Takeout"}})
    report = find_examples(tmp_path)
    expected = {f"{root}a.jpg": "jpg", f"{root}a.png": "png", f"{root}b.png": "b"}
    assert found(report) == expected and not report.remarks


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metadata.json", "to_json(orient='records', lines=True)"),
        ("metadata.parquet", "to_json(orient='records', lines=True)"),
        ("train-00000-of-00001.parquet", "save images in it as files"),
        ("images.zip", "packed, not read: unpack: images.zip"),
        ("shard.tar.gz", "packed, not read: unpack: shard.tar.gz"),
        ("metadata.json1", "rename to metadata.jsonl or metadata.csv: metadata.json1"),
        ("Metadata.jsonl", "rename to metadata.jsonl or metadata.csv: Metadata.jsonl"),
        ("x.csv", "rename to metadata.jsonl or metadata.csv: x.csv"),
    ],
)
def test_what_is_not_read_is_named_with_a_way_out(tmp_path, name, said):
    fill(tmp_path, {name: b"[]"})
    assert said in refusal(lambda: find_examples(tmp_path)) and name in refusal(lambda: find_examples(tmp_path))
    fill(tmp_path, {"a.png": encoded(), "a.txt": "a"})
    assert said in find_examples(tmp_path).summary()


@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl", "metadata.csv", "x.tar"])
def test_git_lfs_pointers_are_called_so(tmp_path, name):
    fill(tmp_path, {"a.png": encoded(), "a.txt": "a"})
    fill(tmp_path, {name: "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"})
    said = find_examples(tmp_path).summary() if name == "x.tar" else refusal(lambda: ImageFolder(tmp_path, 8)[0])
    assert "a git-lfs pointer: run git lfs pull" in said and name[1:] in said


# columns


@pytest.mark.parametrize(
    ("header", "values", "advice"),
    [
        (["file_name", "prompt"], ["a.png", "a dog"], "give --caption-column prompt"),
        (["file_name", "instruction", "seed"], ["a.png", "a dog", "17"], "give --caption-column instruction"),
        (["file_name", "en", "fr"], ["a.png", "a dog", "un chien"], "rename or add it"),
        (["image", "text"], ["a.png", "a dog"], "rename or add it"),
    ],
)
def test_another_caption_column_is_offered_where_it_is_the_only_text(tmp_path, header, values, advice):
    fill(tmp_path, {"a.png": encoded(), "metadata.csv": ",".join(header) + "\n" + ",".join(values) + "\n"})
    assert refusal(lambda: find_examples(tmp_path)).endswith(advice)
    if "file_name" in header:
        assert found(find_examples(tmp_path, caption_column=header[1])) == {"a.png": "a dog"}


def test_the_caption_column_is_asked_of_json_files_too_and_a_row_of_too_many_fields_is_refused(tmp_path):
    fill(tmp_path, {"x.tar/a.png": encoded(), "x.tar/a.json": {"caption": "alt", "prompt": ["p", "q"]}})
    assert found(find_examples(tmp_path)) == {"x.tar/a.png": "alt"}
    assert found(find_examples(tmp_path, caption_column="prompt")) == {"x.tar/a.png": "p | q"}
    fill(tmp_path, {"a.png": encoded(), "metadata.csv": "file_name,text\na.png,a dog,,\n"})  # of a spreadsheet
    assert found(find_examples(tmp_path))["a.png"] == "a dog"
    fill(tmp_path, {"a.png": encoded(), "metadata.csv": "file_name,text\na.png,a dog, brown\n"})
    assert "line 2 has more fields than the header: put quotes" in refusal(lambda: find_examples(tmp_path))


# the commands


@pytest.mark.parametrize("command", [train_kd, finetune, sensitivity])
def test_the_commands_hand_split_and_column_to_the_data(tiny_sd1, tmp_path, monkeypatch, command):
    files = {f"data/{split}/a.png": encoded() for split in ("train", "test")}
    rows = [{"file_name": f"{split}/a.png", "prompt": split} for split in ("train", "test")]
    fill(tmp_path, {**files, "data/metadata.jsonl": rows})
    opened = []

    def open_data(*arguments):
        opened.append(usual(*arguments))
        raise InputError("enough")

    usual = inputs.open_data
    monkeypatch.setattr(inputs, "open_data", open_data)
    model = {("model" if command is finetune else "teacher"): str(tiny_sd1)}
    given = {"data": str(tmp_path / "data"), "split": "test", "caption_column": "prompt", "out": str(tmp_path / "out")}
    assert refusal(lambda: command.main(command.Config(**model, **given))) == "enough"
    assert opened[0].captions(0) == ("test",) and len(opened[0]) == 1


def test_split_and_column_are_refused_with_scenes():
    scenes = Scenes("train", length=4)
    assert "give --data a folder" in refusal(lambda: inputs.open_data("scenes", SIDE, scenes, "test"))
    assert "give --data a folder" in refusal(lambda: inputs.open_data("scenes", SIDE, scenes, None, "prompt"))
