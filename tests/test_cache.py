"""Protects the cache on disk: it trains as the images do, to the bit; is refused when stale; survives a kill."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CAPTIONS
from data_files import encoded, fill, refusal
from PIL import ImageOps
from tiny import save_tiny_sd1

from minidistill import cache as command
from minidistill.cache import CacheConfig
from minidistill.cli import run_command
from minidistill.data import cache as module
from minidistill.data.cache import LatentCache
from minidistill.data.folders import ImageFolder
from minidistill.metrics.cost import MemoryCount
from minidistill.models.vae import AutoencoderKL
from minidistill.pipeline import load_pipeline
from minidistill.training import inputs
from minidistill.training.batches import Batches, to_pixels
from minidistill.training.run_folder import RunFolder
from minidistill.weights.files import read_safetensors, write_json, write_safetensors

SIDE = 32


KEY = {"resolution": SIDE, "split": None, "caption_column": None, "flip": False, "store": "fp32", "precision": "fp32"}
KEY |= {"shard": 4, "vae": "x"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline with the smallest U-Net."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_sd1(folder, stages=2, layers=1, side=SIDE)
    return folder


@pytest.fixture(scope="module")
def pipe(model):
    return load_pipeline(model)


@pytest.fixture
def data(tmp_path):
    """Eleven images; the last has three captions."""
    captions = [*CAPTIONS, ["one", "two", "three"]]
    fill(tmp_path, {f"data/{i:02}.png": encoded(i, (40 + i, 36)) for i in range(11)})
    fill(tmp_path, {"data/metadata.jsonl": [{"file_name": f"{i:02}.png", "text": c} for i, c in enumerate(captions)]})
    return tmp_path / "data"


def rows_of(data) -> list[dict]:
    return [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]


def write_rows(data, rows) -> None:
    fill(data, {"metadata.jsonl": rows})


def open_data(path, resolution=SIDE, *more):
    return inputs.open_data(path, resolution, None, *more)


def make(model, data, out=None, **options):
    """A cache beside the data, small shards."""
    out = out or data.parent / "cache"
    options = {"shard": 4, "batch_size": 4, **options}
    command.main(CacheConfig(model=str(model), data=str(data), out=str(out), **options))
    return out


def in_memory(folder, pipe, **options) -> Batches:
    return Batches(folder, pipe, batch_size=6, seed=0, cache=True, **options)


def from_disk(path, pipe, **options) -> Batches:
    return Batches(LatentCache(path), pipe, batch_size=6, seed=0, **options)


def assert_same(a: Batches, b: Batches) -> None:
    for k in range(8):
        for left, right in zip(a[k], b[k], strict=True):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


# training from it


@pytest.mark.parametrize("flip", [False, True])
def test_batches_from_the_cache_are_those_from_the_images_to_the_bit(model, pipe, data, flip):
    out = make(model, data, flip=flip, shard=32, batch_size=8)  # batches of 8, as in memory
    options = {"caption_dropout": 0.3, "flip": flip}
    expected = in_memory(ImageFolder(data, SIDE), pipe, **options)
    assert_same(from_disk(out, pipe, **options), expected)
    assert {caption for k in range(30) for caption in expected[k].captions} == {*CAPTIONS, None, "one", "two", "three"}


def test_shards_and_batches_change_no_more_than_last_bits_and_images_read_one_by_one_neither(model, pipe, data):
    out = make(model, data, flip=True)
    assert len(list(out.glob("latents-*"))) == 3
    direct = Batches(ImageFolder(data, SIDE), pipe, batch_size=6, seed=0, cache=False, flip=True)
    cached = from_disk(out, pipe, flip=True)
    for k in (0, 5, -1):
        a, b = direct[k], cached[k]
        torch.testing.assert_close(a.x0, b.x0, rtol=1e-4, atol=1e-5)
        assert torch.equal(a.t, b.t) and torch.equal(a.eps, b.eps) and a.captions == b.captions
    assert direct.captions(3) == cached.captions(3) == CAPTIONS[:3]
    assert direct.size == cached.size == (SIDE, SIDE)
    latents, folder = LatentCache(out), ImageFolder(data, SIDE)
    for i, flip in ((0, False), (3, True), (10, True)):
        shown = ImageOps.mirror(folder[i][0]) if flip else folder[i][0]
        with torch.no_grad():
            mean, logvar = pipe.vae.encode(to_pixels([shown]))
        found = latents.latents([i], [flip])
        torch.testing.assert_close(found, (mean, (logvar / 2).exp()), rtol=1e-4, atol=1e-5)
    assert latents.origin(10) == (36, 50, 0, 6)  # 36 x 50 becomes 32 x 44
    assert latents.captions(10) == ("one", "two", "three")
    assert len(latents) == 11 and latents.names[10] == "10.png"


def test_every_other_sample_is_flipped_and_every_caption_of_several_drawn(model, pipe, data):
    out = make(model, data, flip=True)
    plain, flipped = (Batches(LatentCache(out), pipe, batch_size=220, seed=0, flip=flip)[0] for flip in (False, True))
    same = (plain.x0 == flipped.x0).flatten(1).all(1)
    assert 80 < same.sum() < 140 and plain.captions == flipped.captions
    assert torch.equal(plain.t, flipped.t) and torch.equal(plain.eps, flipped.eps)
    counts = [plain.captions.count(caption) for caption in ("one", "two", "three")]
    assert sum(counts) == 20 and min(counts) >= 2


def test_text_states_are_added_to_a_cache_and_are_those_of_the_text_encoder(model, pipe, data):
    out = make(model, data)
    make(model, data, text_states=True)
    latents = LatentCache(out)
    assert len(list(out.glob("text-*"))) == 4  # no caption, the empty one, and 13 others
    assert "text states" in latents.summary()
    captions = [CAPTIONS[0], None, "", "three"]
    torch.testing.assert_close(latents.text.text_states(captions).context, pipe.encode_prompts(captions).context)
    assert Batches(latents, pipe, batch_size=2, seed=0).idle == [pipe.vae, *pipe.text_encoders]
    batch = Batches(latents, pipe, batch_size=4, seed=0, caption_dropout=0.5)[0]
    torch.testing.assert_close(batch.context, pipe.encode_prompts(batch.captions).context, rtol=1e-4, atol=1e-5)
    other = load_pipeline(model)
    with torch.no_grad():
        other.text_encoders[0].text_model.final_layer_norm.weight += 1
    assert "text states of other text encoders" in refusal(lambda: Batches(latents, other, batch_size=2, seed=0))


@pytest.mark.skipif(sys.platform != "linux", reason="where a mapped file may not be seen to change")
@pytest.mark.parametrize("store", ["fp32", "fp16"])
def test_shards_are_the_mapped_files_and_what_is_taken_of_them_is_copied_once(model, data, store):
    out = make(model, data, store=store, text_states=True)
    latents = LatentCache(out)
    mapped = [tensor for shard in (*latents._shards, *latents.text._shards) for tensor in shard.values()]
    for kind, take in (
        ("latents", lambda: latents.latents([0, 5], [False] * 2)),
        ("text", lambda: latents.text.text_states([None, "three"])[:1]),
    ):
        with MemoryCount(mapped) as count:
            found = take()
        assert count.peak == sum(part.nbytes for part in found)
        for file in out.glob(f"{kind}-*"):
            with file.open("r+b") as shard:
                shard.write(bytes(file.stat().st_size))
        assert all(before.any() and not after.any() for before, after in zip(found, take(), strict=True))


def test_broken_files_have_the_same_stand_ins_with_and_without_the_cache(model, pipe, data, capsys):
    rows = rows_of(data)
    for i in range(11, 32):
        shutil.copyfile(data / "00.png", data / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"number {i}"})
    write_rows(data, rows)
    for name in ("03.png", "04.png", "31.png"):
        (data / name).write_bytes((data / name).read_bytes()[:-1000])
    out = make(model, data, shard=32, batch_size=8)
    said = capsys.readouterr().out
    assert all(said.count(f"note: {name} (") == 1 for name in ("03.png", "04.png", "31.png"))
    latents = LatentCache(out)
    assert latents.captions(3) == latents.captions(4) == (CAPTIONS[5],) and latents.captions(31) == (CAPTIONS[0],)
    assert torch.equal(*(latents.latents([i], [False])[0] for i in (3, 5)))
    assert_same(from_disk(out, pipe), in_memory(ImageFolder(data, SIDE), pipe))


def test_a_fingerprint_tells_images_captions_and_settings_and_half_precision_halves_the_files(model, data):
    whole, half = (make(model, data, data.parent / store, store=store) for store in ("fp32", "fp16"))
    a, b = (LatentCache(path).latents(range(11), [False] * 11) for path in (whole, half))
    assert b[0].dtype == torch.float16
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, check_dtype=False)
    sizes = [sum(file.stat().st_size for file in path.glob("latents-*")) for path in (whole, half)]
    assert abs(sizes[0] - sizes[1] - 11 * 2 * 2 * 4 * 64) < 200  # the headers have padding

    before = LatentCache(whole).fingerprint()
    assert before.startswith("11 images, ") and LatentCache(whole).fingerprint() == before
    assert LatentCache(half).fingerprint() != before
    rows = rows_of(data)
    write_rows(data, [*rows[:4], {**rows[4], "text": "another"}, *rows[5:]])
    after = LatentCache(make(model, data, data.parent / "again")).fingerprint()
    assert after.startswith("11 images, ") and after != before


def test_a_cache_knows_of_which_split_and_column_it_is(model, data):
    (data / "metadata.jsonl").write_text("".join(f'{{"file_name": "{i:02}.png", "prompt": "{i}"}}\n' for i in range(4)))
    data = data.rename(data.parent / "train")
    shutil.copytree(data, data.parent / "test")
    out = make(model, data.parent, data.parent / "cache", split="test", caption_column="prompt")
    latents = open_data(out)  # compared with the folder, opened in the same way
    assert latents.names == [f"test/{i:02}.png" for i in range(4)] and latents.captions(3) == ("3",)
    assert open_data(out, SIDE, "test", "prompt").fingerprint() == latents.fingerprint()
    assert "made with split test, not train" in refusal(lambda: open_data(out, SIDE, "train"))
    assert "made with caption_column prompt, not text" in refusal(lambda: open_data(out, SIDE, None, "text"))


# what is refused


def test_changed_data_are_refused_and_touched_or_absent_ones_are_not(model, data):
    out = make(model, data)
    rows = rows_of(data)
    os.utime(data / "02.png", ns=(1, 1))
    assert len(LatentCache(out)) == 11  # the same content
    content = (data / "06.png").read_bytes()
    shutil.copyfile(data / "05.png", data / "06.png")
    message = refusal(lambda: LatentCache(out))
    assert "06.png has changed" in message and "python -m minidistill.cache" in message
    assert "06.png has changed" in refusal(lambda: make(model, data))
    (data / "06.png").write_bytes(content)
    write_rows(data, [*rows[:4], {**rows[4], "text": "another"}, *rows[5:]])
    assert "another caption for 04.png" in refusal(lambda: LatentCache(out))
    write_rows(data, rows[:-1])
    assert "holds 10 examples, then 11" in refusal(lambda: LatentCache(out))
    write_rows(data, [rows[1], rows[0], *rows[2:]])
    assert "00.png was removed or moved, 01.png is in its place" in refusal(lambda: LatentCache(out))
    write_rows(data, rows)
    assert len(LatentCache(out)) == 11
    data.rename(data.parent / "elsewhere")
    assert len(LatentCache(out)) == 11


def test_the_loss_of_an_image_that_stood_in_for_a_broken_one_is_said(model, data):
    (data / "03.png").write_bytes(b"no")
    out = make(model, data)
    write_rows(data, rows_of(data)[:4])
    assert "it holds 4 examples, then 11" in refusal(lambda: LatentCache(out))


@torch.no_grad()
def test_another_vae_and_other_settings_are_refused(model, pipe, data):
    out = make(model, data)
    latents = open_data(out)
    assert isinstance(latents, LatentCache) and isinstance(open_data(data), ImageFolder)
    assert "was made with resolution 32, not 64" in refusal(lambda: open_data(out, 64))
    assert "holds no mirror images" in refusal(lambda: latents.check(pipe, flip=True))
    for weight, said in ((pipe.vae.encoder.conv_out.weight, "another VAE"), (pipe.vae.decoder.conv_in.weight, "")):
        before = weight.clone()
        weight.add_(1)
        if said:
            assert said in refusal(lambda: latents.check(pipe))
        else:
            latents.check(pipe)  # latents do not depend on it
        weight.copy_(before)
    message = refusal(lambda: make(model, data, resolution=16, flip=True))
    assert "resolution 16 (was 32), flip True (was False)" in message and "take another --out" in message
    assert "must be a multiple of --batch-size" in refusal(lambda: make(model, data, shard=6))
    assert "not a cache" in refusal(lambda: make(model, data, out=data))
    assert "multiple of 4" in refusal(lambda: make(model, data, out=data.parent / "x", resolution=30))
    assert "--out is required" in refusal(lambda: command.main(CacheConfig(model=str(model), data=str(data))))


def test_a_damaged_shard_and_an_unreadable_version_are_refused(model, data):
    out = make(model, data)
    file = module.shard_path(out, 1)
    file.write_bytes(file.read_bytes()[:-5])
    assert "latents-00001.safetensors" in refusal(lambda: LatentCache(out))
    index = json.loads((out / "cache.json").read_text())
    (out / "cache.json").write_text(json.dumps({**index, "format": "minidistill latents, version 0"}))
    assert "not a cache that this version reads" in refusal(lambda: open_data(out))


@pytest.mark.parametrize(
    "change",
    [
        {"count": None},
        {"count": 0},
        {"count": "11"},
        {"data": 5},
        {"complete": 1},
        {"text": {}},
        {"more": 1},
        {"key": 5},
    ]
    + [{"key": {**KEY, name: value}} for name, value in (("shard", 0), ("shard", 4.0), ("flip", "no"), ("store", "x"))],
    ids=str,
)
def test_an_index_that_no_version_writes_is_refused(tmp_path, change):
    index = {"format": module.FORMAT, "key": KEY, "data": "x", "count": 1, "complete": True, "text": None}
    write_json(tmp_path / "cache.json", {name: v for name, v in {**index, **change}.items() if v is not None})
    assert "not a cache that this version reads" in refusal(lambda: open_data(tmp_path))
    write_json(tmp_path / "cache.json", index)
    assert "latents-00000.safetensors" in refusal(lambda: open_data(tmp_path)), "the unchanged index is read"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("latents", {"mean": torch.ones(4, 1, 4, 8)}),
        ("latents", {"mean": torch.ones(4, 1, 4, 8, 8, dtype=torch.int32)}),
        ("latents", {"std": torch.ones(3, 1, 4, 8, 8)}),
        ("latents", {"crop": torch.ones(4, 3, dtype=torch.int32)}),
        ("latents", {"shown": torch.tensor(0)}),
        ("latents", {"text": module.to_json([])}),
        ("latents", {"text": module.to_json({"names": ["a"] * 4, "captions": [["a"], ["a"], ["a"], [5]]})}),
        ("latents", {"text": torch.ones(3)}),
        ("text", {"context": torch.ones(4, 16)}),
        ("text", {"text": module.to_json({"captions": ["a", "b", "c", {}]})}),
    ],
)
def test_a_shard_with_other_tensors_or_texts_is_refused(model, data, kind, changes):
    out = make(model, data, text_states=True)
    file = out / f"{kind}-00001.safetensors"
    write_safetensors(file, read_safetensors(file) | changes)
    message = refusal(lambda: open_data(out))
    assert file.name in message or "has no text states of" in message


def test_latents_that_are_not_finite_are_blamed_on_their_file(model, data, monkeypatch):
    encode = AutoencoderKL.encode

    def overflow(vae, images):
        mean, logvar = encode(vae, images)
        mean[len(mean) // 2] = torch.inf
        return mean, logvar

    monkeypatch.setattr(AutoencoderKL, "encode", overflow)
    assert "latents of 02.png are not finite in torch.float32" in refusal(lambda: make(model, data))


# the run


KILLED = """
import os, signal, sys
from minidistill import cache
from minidistill.weights import files

whole, shards = files.save_file, []

def torn(tensors, path, metadata):
    whole(tensors, path, metadata)
    shards.append(path)
    if len(shards) == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

files.save_file = torn
model, data, out = sys.argv[1:]
cache.main(cache.CacheConfig(model=model, data=data, out=out, shard=2, batch_size=2))
"""


def test_a_cache_whose_making_was_killed_is_refused_then_finished_with_the_same_bytes(model, data, capsys):
    out, straight = data.parent / "killed", make(model, data, data.parent / "straight", shard=2, batch_size=2)
    done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(data), str(out)], check=False)
    assert done.returncode == -9
    assert [file.name for file in sorted(out.glob("latents-*"))] == [f"latents-0000{i}.safetensors" for i in (0, 1)]
    assert len(list(out.glob(".*.safetensors"))) == 1
    message = refusal(lambda: open_data(out))
    assert f"{out}: this cache is not finished" in message
    first = module.shard_path(out, 0)
    os.utime(first, ns=(1, 1))
    make(model, data, out, shard=2, batch_size=2)
    assert "resuming after 4 of 11 examples" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == 1
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in straight.iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked on Windows")
def test_a_second_process_is_kept_out_of_a_cache(model, data, monkeypatch):
    monkeypatch.setattr(RunFolder, "_locks", {})
    make(model, data, out := data.parent / "shared")
    assert list(RunFolder._locks) == [out.resolve()]
    RunFolder._locks.clear()  # which leaves the lock to the file descriptor, as if another process had it
    message = refusal(lambda: make(model, data, out))
    assert message == f"another process is writing {out}: wait for it, or take another --out"


def test_the_command_scans_and_refuses_in_one_line(data, capsys):
    def run(*words):
        with pytest.raises(SystemExit) as done:
            run_command(command.main, CacheConfig, prog="cache", argv=words)
        return done.value.code, capsys.readouterr()

    (data / "10.png").write_bytes(b"no")
    code, said = run("--data", str(data), "--scan-only")
    assert code == 0 and "note: 10.png (not an image) cannot be read" in said.out
    assert "; 1 unreadable: another image stands in for each until it is removed: 10.png (not an image)." in said.out
    code, said = run("--data", "nowhere", "--out", "x")
    way = "(a data set of the Hub: save it as image files)"
    assert code == 2 and said.err == f"error: data folder nowhere does not exist {way}\n"
    code, said = run("--data", "scenes", "--out", "x")
    assert code == 2 and said.err.startswith("error: --data scenes: they are drawn for each training")
