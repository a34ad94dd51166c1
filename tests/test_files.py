"""Files: what is written comes back exactly, and nothing is ever half written.

A broken or foreign file gets one clear line. A file whose tensors do not fit the model is refused by name,
never loaded in part.
"""

import json
import random
import stat

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from minidistill.errors import InputError
from minidistill.weights.files import (
    atomic_path,
    load_into,
    read_json,
    read_metadata,
    read_safetensors,
    read_tensors,
    write_json,
    write_safetensors,
)


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


# writing and reading back


def test_written_tensors_come_back_with_values_types_and_metadata(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    write_safetensors(path, some_tensors(), {"base": "sd15"})
    assert_same(read_safetensors(path), some_tensors())
    assert read_metadata(path) == {"format": "pt", "base": "sd15"}


def test_tensors_with_other_strides_or_shared_memory_are_written_as_what_they_hold(tmp_path):
    x = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"transposed": x.transpose(0, 2), "whole": x, "tied": x, "part": x[1, 1:], "overlap": x.flatten()[3:20]}
    tensors["channels_last"] = torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "trained": nn.Parameter(torch.ones(2))}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert_same(read_safetensors(tmp_path / "x.safetensors"), {name: t.detach() for name, t in tensors.items()})


def test_a_file_can_be_rewritten_while_its_tensors_are_in_use(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, some_tensors())
    old = read_safetensors(path)
    write_safetensors(path, {name: tensor * 2 for name, tensor in old.items()})
    assert_same(old, some_tensors())
    assert_same(read_safetensors(path), {name: tensor * 2 for name, tensor in some_tensors().items()})


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path, old = tmp_path / "x.json", {"z": "Füchse", "a": [1, None, True], "m": {"x": 1e-6}}
    write_json(path, old)
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text('{"half')
        raise ZeroDivisionError
    assert list(read_json(path).items()) == list(old.items()), "letters and order are kept too"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_written_weights_can_be_read_by_whoever_can_read_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "x.safetensors", some_tensors())
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x.safetensors")}
    assert len(modes) == 1


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refused(write_json, tmp_path / "file" / "x.json", {})
    (tmp_path / "folder.json").mkdir()
    assert "folder.json" in refused(write_json, tmp_path / "folder.json", {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.json"]


# reading what others wrote


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_state_dicts_are_read(tmp_path, legacy):
    path = tmp_path / "pytorch_model.bin"
    torch.save(some_tensors(), path, _use_new_zipfile_serialization=not legacy)
    assert_same(read_tensors(path), some_tensors())


class RunsCode:
    """Unpickling this makes a file: what a hostile checkpoint would do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    torch.save({"a": torch.ones(2), "b": RunsCode(tmp_path / "it_ran")}, tmp_path / "x.bin")
    message = refused(read_tensors, tmp_path / "x.bin")
    assert "x.bin" in message and "safetensors" in message
    assert not (tmp_path / "it_ran").exists()


def test_a_pickle_of_something_else_than_named_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3, "a": torch.ones(2)}, tmp_path / "x.bin")
    assert "state dict" in refused(read_tensors, tmp_path / "x.bin")
    for content in (torch.ones(2), {0: torch.ones(1)}):
        torch.save(content, tmp_path / "y.ckpt")
        assert "state dict" in refused(read_tensors, tmp_path / "y.ckpt")


def lying(dtype: str, shape: list[int], end: int) -> bytes:
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 16


GOOD = save({"a": torch.ones(4, 4)})
HTML = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"
BROKEN = {
    "missing": (None, "no such file"),
    "empty": (b"", "empty"),
    "a few bytes": (b"abc", "damaged or cut short"),
    "cut in the data": (GOOD[:-7], "damaged or cut short"),
    "cut in the header": (GOOD[:20], "damaged or cut short"),
    "too long": (GOOD + b"more", "damaged or cut short"),
    "HTML": (HTML, "web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    "header length": ((1 << 40).to_bytes(8, "little") + GOOD[8:], "damaged or cut short"),
    "header not json": (GOOD[:8] + b"}" + GOOD[9:], "damaged or cut short"),
    "size": (lying("F32", [2, 2], 12), "damaged or cut short"),
    "offset": (lying("F32", [9, 2], 72), "damaged or cut short"),
    "dtype": (lying("F99", [2, 2], 16), "damaged or cut short"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_safetensors_file_is_refused_with_its_name_and_the_reason(tmp_path, case):
    content, reason = BROKEN[case]
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    message = refused(read_safetensors, path)
    assert str(path) in message and reason in message


def test_a_pickle_named_safetensors_is_called_one(tmp_path):
    torch.save(some_tensors(), tmp_path / "x.safetensors")
    assert "pickle" in refused(read_tensors, tmp_path / "x.safetensors")


@pytest.mark.parametrize("case", ["missing", "empty", "HTML", "cut", "noise"])
def test_a_broken_bin_file_is_refused_with_its_name_and_the_reason(tmp_path, case):
    path = tmp_path / "model.bin"
    torch.save(some_tensors(), path)
    good = path.read_bytes()
    path.unlink()
    content = {"empty": b"", "HTML": HTML, "cut": good[: len(good) // 2], "noise": bytes(range(256))}.get(case)
    if content is not None:
        path.write_bytes(content)
    reason = {"missing": "no such file", "empty": "empty", "HTML": "web page"}.get(case, "damaged or cut short")
    message = refused(read_tensors, path)
    assert str(path) in message and reason in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (HTML, "web page"),
        (b"{'a': 1}", "not valid json"),
        (b'{"a": 1%s}' % (b"0" * 5000), "not valid json"),
        (b"[1]", "list"),
        (b"[" * 100_000, "not valid json"),  # deeper than Python can follow
    ],
)
def test_a_broken_json_file_is_refused_with_its_name_and_the_reason(tmp_path, content, reason):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    message = refused(read_json, path)
    assert str(path) in message and reason in message


def test_a_missing_folder_is_named(tmp_path):
    assert f"no folder {tmp_path / 'unet'})" in refused(read_json, tmp_path / "unet" / "deeper" / "config.json")


# into a model


def small_net() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return net.train()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return small_net()


def test_a_model_on_meta_takes_every_value_and_only_floats_change_type():
    source = small_net()
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


def test_the_files_own_precision_is_kept_on_request(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: tensor.half() for name, tensor in small_net().state_dict().items()})
    assert load_into(on_meta(), read_safetensors(path), "x", None)[0].weight.dtype == torch.float16
    assert load_into(on_meta(), read_safetensors(path), "x")[0].weight.dtype == torch.float32


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
        "5 of 13 tensors are not expected (extra.0, extra.1, extra.2, ...)",
        "1 of 9 tensors have another shape (0.weight is (3, 5) in the file, (3, 4) by the config)",
    ):
        assert part in message
    assert net[0].weight.is_meta, "nothing may be loaded from a file that does not fit"


def test_a_buffer_outside_of_the_state_dict_cannot_pass_unfilled():
    net = on_meta()
    net.register_buffer("mask", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="mask"):
        load_into(net, small_net().state_dict(), "x")


# other spellings


class TextLike(nn.Module):
    """The names of a CLIP text encoder, as far as they matter here."""

    def __init__(self):
        super().__init__()
        self.text_model = nn.ModuleDict({"embeddings": nn.Linear(2, 2, bias=False), "final": nn.LayerNorm(2)})


def test_text_encoder_files_of_every_age_load():
    torch.manual_seed(0)
    old = TextLike().state_dict()
    with_ids = old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    flat = {name.removeprefix("text_model."): tensor for name, tensor in with_ids.items()}
    for spelling in (old, with_ids, flat):
        assert_same(load_into(TextLike(), spelling, "x").state_dict(), old)
    bare = nn.ModuleDict({"embeddings": nn.Linear(2, 2, bias=False), "final": nn.LayerNorm(2)})
    assert_same(load_into(bare, old, "x").state_dict(), {n.removeprefix("text_model."): t for n, t in old.items()})


def test_only_position_ids_are_dropped():
    tensors = TextLike().state_dict() | {"text_model.other_ids": torch.arange(3)}
    assert "text_model.other_ids" in refused(load_into, TextLike(), tensors, "x")


def test_two_spellings_of_one_tensor_are_refused():
    tensors = TextLike().state_dict()
    tensors |= {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    assert "two spellings" in refused(load_into, TextLike(), tensors, "x")


def test_names_left_by_wrappers_are_read_through():
    net = small_net()
    tensors = {f"module._orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}
    assert_same(load_into(on_meta(), tensors, "x").state_dict(), net.state_dict())


class VAELike(nn.Module):
    """The names of the VAE's attention."""

    def __init__(self):
        super().__init__()
        attention = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("to_q", "to_k", "to_v")})
        attention["to_out"] = nn.ModuleList([nn.Linear(3, 3)])
        self.decoder = nn.ModuleDict({"mid_block": nn.ModuleDict({"attentions": nn.ModuleList([attention])})})
        self.query = nn.Linear(2, 2)  # a bystander whose own name is one of the old ones


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_vae_attention_names_and_shapes_load(as_convolutions):
    torch.manual_seed(0)
    expected = VAELike().state_dict()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in expected.items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")  # noqa: PLW2901
        is_matrix = as_convolutions and "attentions" in name and tensor.ndim == 2
        tensors[name] = tensor[:, :, None, None] if is_matrix else tensor
    assert any("proj_attn" in name for name in tensors)
    assert_same(load_into(VAELike(), tensors, "x").state_dict(), expected)


def test_a_convolution_in_place_of_another_linear_layer_is_refused(tmp_path):
    tensors = small_net().state_dict()
    tensors["0.weight"] = tensors["0.weight"][:, :, None, None]
    save_file(tensors, tmp_path / "x.safetensors")
    assert "0.weight is (3, 4, 1, 1)" in refused(load_into, on_meta(), read_tensors(tmp_path / "x.safetensors"), "x")


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
