"""Files: written ones come back exactly, broken and foreign ones get one clear line, none is loaded in part."""

import errno
import io
import json
import random
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from minidistill.errors import InputError, Stopped
from minidistill.weights import files
from minidistill.weights.files import (
    atomic_path,
    cannot_write,
    read_json,
    read_metadata,
    read_safetensors,
    read_tensors,
    torn_files,
    write_json,
    write_safetensors,
    writing,
)
from minidistill.weights.loading import load_into


def refused(call, *args) -> str:
    """The message of the InputError that a call ends in; it must be one line."""
    with pytest.raises(InputError) as info:
        call(*args)
    message = str(info.value)
    assert "\n" not in message
    return message


def some_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 5, generator=g), "b": torch.randn(7, generator=g).half(), "n": torch.arange(4)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def damaged(data: bytes, seed: int) -> bytes:
    """The same file with three of its bytes changed."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(3):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def test_written_tensors_come_back_with_values_types_and_metadata(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    write_safetensors(path, some_tensors(), {"base": "sd15"})
    old = read_safetensors(path)
    assert_same(old, some_tensors())
    assert read_metadata(path) == {"format": "pt", "base": "sd15"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "it is for whoever can read any new file"
    write_safetensors(path, {name: tensor * 2 for name, tensor in old.items()})  # while the old tensors are in use
    assert_same(old, some_tensors())
    assert_same(read_safetensors(path), {name: tensor * 2 for name, tensor in some_tensors().items()})


def test_tensors_with_other_strides_or_shared_memory_are_written_as_what_they_hold(tmp_path):
    x = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"transposed": x.transpose(0, 2), "whole": x, "tied": x, "part": x[1, 1:], "overlap": x.flatten()[3:20]}
    tensors["channels_last"] = torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "trained": nn.Parameter(torch.ones(2))}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert_same(read_safetensors(tmp_path / "x.safetensors"), {name: t.detach() for name, t in tensors.items()})


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path, old = tmp_path / "x.json", {"z": "Füchse", "a": [1, None, True], "m": {"x": 1e-6}}
    write_json(path, old)
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text('{"half')
        raise ZeroDivisionError
    assert list(read_json(path).items()) == list(old.items()), "letters and order are kept too"
    assert "cannot write" in refused(write_json, path / "y.json", {})
    (tmp_path / "folder.json").mkdir()
    assert "folder.json" in refused(write_json, tmp_path / "folder.json", {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.json", "x.json"]


def test_a_full_disk_is_told_apart_and_what_a_killed_process_left_is_found(tmp_path):
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, "No space left on device"), rust):
        told = pytest.raises(Stopped, match=f"^cannot write {tmp_path / 'x'}: No space left on device; make room$")
        with told, writing(tmp_path / "x"):
            raise error
    for error in (PermissionError(errno.EACCES, "Permission denied"), SafetensorError("no room (os error 13)")):
        message = str(cannot_write(tmp_path / "x", error))
        assert message == f"cannot write {tmp_path / 'x'}: Permission denied"
    torn = [tmp_path / name for name in (".12.x.json", "student/.3.README.md", "student/unet/.45.x.safetensors")]
    for path in (*torn, *(tmp_path / name for name in (".x.json", ".12", "12.x", "samples/.DS_Store", "a/b/c/.1.x"))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sorted(torn_files(tmp_path)) == sorted(torn)


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_state_dicts_are_read_and_other_pickles_refused(tmp_path, legacy):
    path = tmp_path / "pytorch_model.bin"
    for content in (some_tensors(), {"epoch": 3, "a": torch.ones(2)}, torch.ones(2), {0: torch.ones(1)}):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        if isinstance(content, dict) and "b" in content:
            assert_same(read_tensors(path), some_tensors())
        else:
            assert "is not a state dict" in refused(read_tensors, path)


class RunsCode:
    """Unpickling this makes a file: what a hostile checkpoint would do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("place", ["state_dict", "callbacks"])
def test_a_pickle_that_would_run_code_is_refused_unrun_wherever_the_code_is(tmp_path, place):
    content = {"state_dict": {"a": torch.ones(2)}, "callbacks": {}}
    content[place]["x"] = RunsCode(tmp_path / "it_ran")
    torch.save(content, tmp_path / "x.ckpt")
    message = refused(read_tensors, tmp_path / "x.ckpt")
    assert "x.ckpt" in message and "run code" in message and "safetensors" in message
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(
    "values", [torch.ones(1).expand(10**6, 10), torch.eye(3).to_sparse(), torch.ones(2, device="meta")]
)
def test_tensors_that_a_file_only_promises_are_refused(tmp_path, values):
    torch.save({"a": torch.ones(2), "b": values}, tmp_path / "x.ckpt")
    assert "is not a state dict" in refused(read_tensors, tmp_path / "x.ckpt")
    tied = torch.ones(4)
    torch.save({"a": tied, "b": tied, "c": tied[1:]}, tmp_path / "x.ckpt")
    assert_same(read_tensors(tmp_path / "x.ckpt"), {"a": tied, "b": tied, "c": tied[1:]})


def test_a_compressed_checkpoint_which_may_unpack_to_any_size_is_refused(tmp_path):
    torch.save(some_tensors(), whole := tmp_path / "whole.ckpt")
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "are compressed" in refused(read_tensors, tmp_path / "x.ckpt")


def test_more_or_longer_names_than_a_model_has_are_refused(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "x.safetensors", {"a." * 300: torch.ones(1)})
    assert "as no model does" in refused(read_tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(files, "MOST_TENSORS", 2)
    write_safetensors(tmp_path / "x.safetensors", some_tensors())
    assert "more than 2 tensors" in refused(read_tensors, tmp_path / "x.safetensors")


def test_a_message_is_one_line_whatever_a_file_calls_its_tensors(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a\nb\x1b[1m\u2028c": torch.ones(1)})
    message = refused(load_into, small_net(), read_tensors(tmp_path / "x.safetensors"), "x")
    assert r"a\nb\x1b[1m\u2028c" in message and message.isprintable()


class Callback:
    """As Lightning's, of a package that is not installed where the file is read."""

    def __init__(self):
        self.best, self.path = np.float64(0.5), Path("x")


class Settings(dict):
    """As Lightning's hyperparameters: a mapping with a name of its own."""


def test_a_checkpoint_with_a_training_programs_objects_is_read_without_them(tmp_path, monkeypatch):
    beside = {"callbacks": {Callback: Callback()}, "loss": np.float32(3), "best": np.zeros(2), "hparams": Settings(a=1)}
    beside["defaults"] = defaultdict(list, x=[1])
    for class_ in (Callback, Settings):
        monkeypatch.setattr(class_, "__module__", "not_installed")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "not_installed", sys.modules[__name__])
        torch.save({"state_dict": some_tensors(), **beside}, tmp_path / "x.ckpt")
    assert_same(read_tensors(tmp_path / "x.ckpt"), some_tensors())
    torch.save({"state_dict": some_tensors() | {"a": np.float64(1)}}, tmp_path / "x.ckpt")
    assert "is not a state dict" in refused(read_tensors, tmp_path / "x.ckpt")


def lying(dtype: str, shape: list[int], end: int) -> bytes:
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 16


def pickled() -> bytes:
    torch.save(some_tensors(), content := io.BytesIO())
    return content.getvalue()


GOOD, ZIP = save({"a": torch.ones(4, 4)}), pickled()
HTML = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"
DAMAGED = "damaged or cut short"
BROKEN = {  # file: {its content: what is said}
    "model.safetensors": {
        **dict.fromkeys((b"abc", GOOD[:-7], GOOD[:20], GOOD + b"more", GOOD[:8] + b"}" + GOOD[9:]), DAMAGED),
        (1 << 40).to_bytes(8, "little") + GOOD[8:]: DAMAGED,  # the length of the header
        **dict.fromkeys((lying("F32", [2, 2], 12), lying("F32", [9, 2], 72), lying("F99", [2, 2], 16)), DAMAGED),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "git-lfs",
        ZIP: "torch pickle",
    },
    "model.bin": dict.fromkeys((ZIP[: len(ZIP) // 2], bytes(range(256))), DAMAGED),
    "config.json": {
        b"[1]": "list",
        # the last: deeper than Python can follow
        **dict.fromkeys((b"{'a': 1}", b'{"a": 1%s}' % (b"0" * 5000), b"[" * 100_000), "not valid json"),
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_the_reason(tmp_path, name):
    path = tmp_path / name
    for content, reason in {None: "no such file", b"": "empty", HTML: "web page", **BROKEN[name]}.items():
        if content is not None:
            path.write_bytes(content)
        message = refused(read_json if path.suffix == ".json" else read_tensors, path)
        assert str(path) in message and reason in message and "weights_only" not in message
    assert f"no folder {tmp_path / 'unet'})" in refused(read_json, tmp_path / "unet" / "deeper" / "config.json")


def small_net() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return net.train()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return small_net()


def test_a_model_on_meta_takes_every_value_and_only_floats_change_type():
    source = small_net()
    assert load_into(on_meta(), small_net().half().state_dict(), "x", None)[0].weight.dtype == torch.float16
    net = load_into(on_meta(), source.state_dict(), "x", torch.bfloat16)
    assert net[0].weight.dtype == torch.bfloat16 and net[1].num_batches_tracked.dtype == torch.int64
    for name, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[name], value.to(net.state_dict()[name].dtype))
    assert not net.training and net[0].weight.requires_grad and isinstance(net[0].weight, nn.Parameter)


def test_a_model_is_the_mapped_file_without_a_second_copy_and_what_it_learns_stays_out_of_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, small_net().state_dict())
    before = path.read_bytes()
    tensors = read_safetensors(path)
    net = load_into(on_meta(), tensors, "x")
    assert all(value.data_ptr() == tensors[name].data_ptr() for name, value in net.state_dict().items())
    with torch.no_grad():
        net[0].weight.zero_()
    assert path.read_bytes() == before
    assert read_safetensors(path)["0.weight"].abs().sum() > 0


def test_what_does_not_fit_is_counted_and_named():
    tensors = small_net().state_dict()
    tensors["0.weight"] = torch.zeros(3, 5)
    del tensors["2.bias"]
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    net = on_meta()
    message = refused(load_into, net, tensors, "unet/x.safetensors")
    for part in (
        "unet/x.safetensors",
        "1 of 9 tensors are missing (2.bias)",
        "5 of 13 tensors are not expected (extra.0, extra.1, extra.2 and 2 more)",
        "1 of 9 tensors have another shape (0.weight is (3, 5) in the file, (3, 4) by the config)",
    ):
        assert part in message
    assert net[0].weight.is_meta, "nothing may be loaded from a file that does not fit"
    tensors = small_net().state_dict()
    tensors["0.weight"] = tensors["0.weight"][:, :, None, None]  # a convolution in place of a linear layer
    assert "0.weight is (3, 4, 1, 1)" in refused(load_into, net, tensors, "x")
    tensors = small_net().state_dict()
    tensors["0.weight"] = tensors["0.weight"].int()
    assert "1 of 9 tensors are of another type (0.weight is torch.int32)" in refused(load_into, net, tensors, "x")
    net.register_buffer("mask", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="mask"):  # outside of the state dict it cannot pass unfilled
        load_into(net, small_net().state_dict(), "x")


class TextLike(nn.Module):
    """The names of a CLIP text encoder, as far as they matter here."""

    def __init__(self):
        super().__init__()
        self.text_model = nn.ModuleDict({"embeddings": nn.Linear(2, 2, bias=False), "final": nn.LayerNorm(2)})


def test_text_encoder_files_of_every_age_and_wrapper_load():
    torch.manual_seed(0)
    old = TextLike().state_dict()
    with_ids = old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    flat = {name.removeprefix("text_model."): tensor for name, tensor in with_ids.items()}
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in old.items()}
    for spelling in (old, with_ids, flat, wrapped):
        assert_same(load_into(TextLike(), spelling, "x").state_dict(), old)
    bare = nn.ModuleDict({"embeddings": nn.Linear(2, 2, bias=False), "final": nn.LayerNorm(2)})
    assert_same(load_into(bare, old, "x").state_dict(), {n.removeprefix("text_model."): t for n, t in old.items()})
    assert "text_model.ids" in refused(load_into, TextLike(), old | {"text_model.ids": torch.arange(3)}, "x")
    assert "two spellings" in refused(load_into, TextLike(), old | flat, "x")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_is_read_or_refused_whatever_its_bytes_make_the_reader_do(tmp_path):
    """Some of these damages of the old format end in TypeError, KeyError, IndexError or AssertionError inside torch."""
    path, refusals = tmp_path / "x.bin", 0
    torch.save(some_tensors(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for seed in range(300):
        path.write_bytes(damaged(whole, seed))
        try:
            read_tensors(path)
        except InputError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert 50 < refusals < 300
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        refused(read_tensors, path)
