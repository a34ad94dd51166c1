"""Sources on disk and on the Hub: only what is needed is fetched, once, and what cannot be had is said in one line.

The Hub is a server of this machine, `hub_server.py`; nothing here leaves it.
"""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, HubServer, files_of
from huggingface_hub import constants, file_download

import minidistill
from minidistill.cli import run_command
from minidistill.errors import InputError
from minidistill.generate import GenerateConfig, generate
from minidistill.interop.single_file import write_single_file
from minidistill.interop.single_pipeline import CLIP, load_parts
from minidistill.pipeline import load_pipeline
from minidistill.weights import hub
from minidistill.weights.choice import (
    DIFFUSERS_STEMS,
    TRANSFORMERS_STEMS,
    choose_files,
    missing_files,
    pick_weights,
    shards,
)
from minidistill.weights.folders import MINIATURE, find_weights, load_tokenizer
from minidistill.weights.hub import find_source

HALF, FULL = torch.float16, torch.float32


def refused(call, *args) -> str:
    """The message of the InputError that a call ends in; it must be one line."""
    with pytest.raises(InputError) as info:
        call(*args)
    message = str(info.value)
    assert "\n" not in message
    return message


# file lists as they are on the Hub


def several(stems: str, suffixes: str) -> list[str]:
    return [f"{stem}.{suffix}" for stem in stems.split() for suffix in suffixes.split()]


def tokenizer(folder: str = "tokenizer") -> list[str]:
    names = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    return [f"{folder}/{name}" for name in names]


UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"
ALL_FOUR = "bin fp16.bin fp16.safetensors safetensors"
PARTS = ["model_index.json", "scheduler/scheduler_config.json", *tokenizer()]
PARTS += several("unet/config vae/config text_encoder/config", "json")
COMMON = [".gitattributes", "README.md", "feature_extractor/preprocessor_config.json", *PARTS]
COMMON += ["safety_checker/config.json", *several("safety_checker/model", "safetensors fp16.safetensors")]
SD15 = [
    *COMMON,
    *several("v1-5-pruned v1-5-pruned-emaonly", "ckpt safetensors"),
    "v1-inference.yaml",
    *several(UNET, f"{ALL_FOUR} non_ema.bin non_ema.safetensors"),
    *several(VAE, ALL_FOUR),
    *several(TEXT, "safetensors fp16.safetensors"),
    *several("text_encoder/pytorch_model", "bin fp16.bin"),
]
SD14 = [  # without some of the half-precision files, with a misnamed one
    *COMMON,
    *several(UNET, "bin safetensors"),
    *several(VAE, ALL_FOUR),
    *several(TEXT, "safetensors fp16.safetensors"),
    *several("text_encoder/pytorch_model", "bin fp16.bin fp16.safetensors"),
]
SDXL = [
    *COMMON,
    *several("sd_xl_base_1.0 sd_xl_base_1.0_0.9vae sd_xl_offset_example-lora_1.0", "safetensors"),
    *tokenizer("tokenizer_2"),
    "text_encoder_2/config.json",
    *several("unet/model text_encoder_2/model vae_decoder/model", "onnx"),
    *several("unet/openvino_model text_encoder_2/openvino_model vae_encoder/openvino_model", "bin xml"),
    *several("unet/diffusion_flax_model vae/diffusion_flax_model text_encoder/flax_model", "msgpack"),
    *("unet/model.onnx_data", "vae_decoder/config.json", "vae_1_0/config.json"),
    "vae_1_0/diffusion_pytorch_model.safetensors",
    *several(f"{UNET} {VAE} {TEXT} text_encoder_2/model", "safetensors fp16.safetensors"),
]
TINY_SD = [*COMMON, *several(f"{UNET} {VAE} text_encoder/pytorch_model", "bin")]
TAESD = ["README.md", "config.json", *several("diffusion_pytorch_model", "bin safetensors")]
TAESD += several("taesd_encoder taesd_decoder", "safetensors")
LIGHTNING = [
    "README.md",
    *(f"sdxl_lightning_{n}step_{kind}.safetensors" for n in (2, 4, 8) for kind in ("lora", "unet")),
]

INDEX = {part: ["library", "Class"] for part in ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]}
TWO = [*tokenizer("tokenizer_2"), "text_encoder_2/config.json"]


@pytest.mark.parametrize(
    ("names", "dtype", "expected"),
    [
        (SD15, FULL, [*PARTS, *several(f"{UNET} {VAE} {TEXT}", "safetensors")]),
        (SD15, HALF, [*PARTS, *several(f"{UNET} {TEXT}", "fp16.safetensors"), f"{VAE}.safetensors"]),
        (SD15, torch.bfloat16, [*PARTS, *several(f"{UNET} {VAE} {TEXT}", "safetensors")]),
        (SD14, HALF, [*PARTS, f"{UNET}.safetensors", f"{VAE}.safetensors", f"{TEXT}.fp16.safetensors"]),
        (SDXL, FULL, [*PARTS, *TWO, *several(f"{UNET} {VAE} {TEXT} text_encoder_2/model", "safetensors")]),
        (TINY_SD, FULL, [*PARTS, *several(f"{UNET} {VAE} text_encoder/pytorch_model", "bin")]),
        (TAESD, FULL, ["config.json", "diffusion_pytorch_model.safetensors"]),
    ],
    ids=["sd15", "sd15-half", "sd15-bf16", "sd14-half", "sdxl", "tiny-sd", "taesd"],
)
def test_one_form_of_each_needed_thing_is_chosen_of_official_repositories(names, dtype, expected):
    chosen = choose_files(names, dtype)
    assert sorted(chosen) == sorted(expected) and len(set(chosen)) == len(chosen)
    assert chosen[0] in ("model_index.json", "config.json")
    assert choose_files(list(reversed(names)), dtype) == chosen, "the order of the list must not matter"


def picked(kinds: str, dtype=FULL) -> str:
    """Which of the named kinds is taken: "fp16.bin" for diffusion_pytorch_model.fp16.bin."""
    (name,) = pick_weights(several(DIFFUSERS_STEMS[0], kinds), DIFFUSERS_STEMS, dtype)
    return name.removeprefix(f"{DIFFUSERS_STEMS[0]}.")


def test_precision_comes_before_safety_of_the_format_unless_half_is_enough():
    assert picked("fp16.safetensors bin fp16.bin") == "bin"
    assert picked("fp16.safetensors fp16.bin non_ema.safetensors") == "fp16.safetensors"
    assert picked("bin fp16.bin safetensors", HALF) == "safetensors"
    assert picked("bin fp16.bin non_ema.safetensors", HALF) == "fp16.bin"
    assert picked("non_ema.bin non_ema.safetensors") == "non_ema.safetensors"
    assert pick_weights(["openvino_model.bin", "model.onnx", "flax_model.msgpack"], DIFFUSERS_STEMS) == []


def test_shards_are_taken_with_their_index_in_either_spelling_and_no_others():
    stem = "diffusion_pytorch_model"
    plain = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    before = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    after = [f"{stem}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    index, half_index = f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"
    for half in (before, after):
        names = {*plain, *half, index, half_index, "config.json"}
        assert pick_weights(names, DIFFUSERS_STEMS, FULL) == [index, *plain]
        assert pick_weights(names, DIFFUSERS_STEMS, HALF) == [half_index, *half]
        assert pick_weights({*half, half_index}, DIFFUSERS_STEMS, FULL) == [half_index, *half]
        assert pick_weights({*names, f"{stem}.safetensors"}, DIFFUSERS_STEMS, FULL) == [f"{stem}.safetensors"]
    chosen = choose_files(["model_index.json", "unet/config.json", *(f"unet/{name}" for name in (index, *plain))])
    assert chosen == ["model_index.json", "unet/config.json", *(f"unet/{name}" for name in (index, *plain))]
    pickled = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert pick_weights(pickled, ("model", "pytorch_model")) == pickled[::-1]


@pytest.mark.parametrize("names", [SD15, SD14, SDXL, TINY_SD], ids=["sd15", "sd14", "sdxl", "tiny-sd"])
def test_of_all_files_and_of_the_chosen_ones_a_folder_loads_the_same(tmp_path, names):
    everything = HubServer(tmp_path).add("me/all", names)
    for dtype in (FULL, HALF):
        chosen = HubServer(tmp_path).add(f"me/{dtype}", choose_files(names, dtype))
        for part, stems in (("unet", DIFFUSERS_STEMS), ("text_encoder", TRANSFORMERS_STEMS)):
            (expected,), (found,) = (find_weights(folder / part, stems, dtype) for folder in (everything, chosen))
            assert found.name == expected.name
        assert find_weights(chosen / "vae", DIFFUSERS_STEMS, FULL)[0].name in (
            f"{DIFFUSERS_STEMS[0]}.safetensors",
            f"{DIFFUSERS_STEMS[0]}.bin",
        )


def test_of_a_part_with_no_weights_that_are_read_its_files_are_named():
    names = [name for name in SD15 if not name.startswith("unet/d")] + ["unet/diffusion_flax_model.msgpack"]
    message = refused(choose_files, names, FULL, "me/flax")
    assert "me/flax" in message and "unet" in message and "only diffusion_flax_model.msgpack" in message


def test_repositories_of_single_files():
    assert choose_files(["README.md", "a.safetensors", "a.ckpt"]) == ["a.safetensors"]
    assert choose_files(["README.md", "deep/a.ckpt", "x.yaml"]) == ["deep/a.ckpt"]
    message = refused(choose_files, LIGHTNING, FULL, "ByteDance/SDXL-Lightning")
    for name in LIGHTNING[1:]:
        assert f"ByteDance/SDXL-Lightning/{name}" in message
    message = refused(choose_files, ["README.md", "config.json", "flax_model.msgpack"], FULL, "me/flax")
    assert "me/flax" in message and "flax_model.msgpack" in message and "safetensors" in message
    assert "and 28 more" in refused(choose_files, [f"{i}.safetensors" for i in range(40)])


def test_what_a_folder_lacks_is_named_down_to_the_shard(tmp_path):
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    index["weight_map"]["b"] = "diffusion_pytorch_model-00002-of-00002.safetensors"
    contents = {name: "" for name in choose_files(SDXL, HALF)}
    nothing = {"_class_name": "X", "safety_checker": [None, None], "image_encoder": ["transformers", "Y"]}
    second = {part: ["transformers", "Class"] for part in ("text_encoder_2", "tokenizer_2")}
    contents["model_index.json"] = json.dumps(INDEX | second | nothing)
    contents["unet/diffusion_pytorch_model.safetensors.index.fp16.json"] = json.dumps(index)
    del contents["unet/diffusion_pytorch_model.fp16.safetensors"]
    for name in index["weight_map"].values():
        contents[f"unet/{name}"] = ""
    folder = HubServer(tmp_path).add("me/x", contents)
    assert missing_files(folder, HALF) == missing_files(folder) == []
    assert set(missing_files(folder, FULL)) == {
        f"{part}/weights in float32" for part in ("unet", "text_encoder", "text_encoder_2")
    }
    for name in (
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/config.json",
        "tokenizer_2/vocab.json",
    ):
        (folder / name).unlink()
        assert name in missing_files(folder, HALF)
    (folder / "text_encoder" / "model.fp16.safetensors").unlink()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert {"text_encoder/weights", "scheduler/scheduler_config.json"} < set(missing_files(folder))


def test_an_index_may_not_lead_out_of_its_folder(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    assert "outside" in refused(shards, path)
    path.write_text('{"metadata": {}}')
    assert "weight_map" in refused(shards, path)


# finding


def point_to(url: str, monkeypatch) -> None:
    """Make this the Hub's address, as HF_ENDPOINT would."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # some versions have it in both
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub with repositories in tmp_path/hub, and an empty cache in tmp_path/cache."""
    hub._note_move.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with HubServer(tmp_path / "hub") as server:
        point_to(server.url, monkeypatch)
        yield server


def add_pipeline(server: HubServer, repo: str, names: Collection[str] = SD15) -> None:
    contents = {name: f"{repo} {name}" for name in names}
    server.add(repo, contents | {"model_index.json": json.dumps(INDEX | {"safety_checker": [None, None]})})


def disconnect(monkeypatch) -> None:
    """From now on the Hub is a port where no one listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    point_to(f"http://127.0.0.1:{port}", monkeypatch)


def fetched(server: HubServer, repo: str) -> list[str]:
    return [name.removeprefix(f"{repo}/") for name in server.downloads()]


def test_of_a_pipeline_only_the_needed_files_are_fetched_and_only_once(server, capsys):
    add_pipeline(server, "me/sd15")
    folder = find_source("me/sd15")
    assert fetched(server, "me/sd15") == sorted(choose_files(SD15))
    assert sorted(files_of(folder)) == sorted(choose_files(SD15))
    assert (folder / "unet/config.json").read_text() == "me/sd15 unet/config.json"
    server.requests.clear()
    assert find_source("me/sd15") == folder
    assert find_source("me/sd15", HALF) == folder, "full precision serves where half is enough"
    assert server.requests == []
    assert capsys.readouterr().err == "", "progress bars are for terminals"


def test_a_hub_id_draws_the_image_of_its_folder_and_later_does_so_without_the_hub(server, tmp_path, monkeypatch):
    miniature = Path(minidistill.__file__).parent / "miniature"
    files = {name: path.read_bytes() for name, path in files_of(miniature).items() if not name.startswith("clip/")}
    server.add("me/sd", {**files, "safety_checker/model.safetensors": "never asked for"})
    images = []
    for model, name in ((str(miniature), "folder.png"), ("me/sd", "hub.png"), ("me/sd", "cache.png")):
        with pytest.raises(SystemExit) as exit:
            words = ["--model", model, "--steps", "2", "--guidance", "1", "--device", "cpu", "--out", name]
            run_command(generate, GenerateConfig, prog="generate", argv=words)
        assert exit.value.code == 0
        images.append((tmp_path / name).read_bytes())
        if name == "hub.png":
            assert "unet/diffusion_pytorch_model.safetensors" in fetched(server, "me/sd")
            assert "safety_checker/model.safetensors" not in fetched(server, "me/sd")
            disconnect(monkeypatch)
    assert images[0] == images[1] == images[2]


def test_half_precision_is_replaced_by_full_only_if_the_hub_can_be_asked(server, monkeypatch):
    add_pipeline(server, "me/sd15")
    folder = find_source("me/sd15", HALF)
    assert fetched(server, "me/sd15") == sorted(choose_files(SD15, HALF))
    server.requests.clear()
    assert find_source("me/sd15", HALF) == folder and server.requests == []
    server.trouble["me/sd15"] = "down"
    assert find_source("me/sd15") == folder
    server.trouble.clear()
    server.requests.clear()
    assert find_source("me/sd15") == folder
    assert fetched(server, "me/sd15") == several(f"{TEXT} {UNET}", "safetensors")
    assert find_weights(folder / "unet", DIFFUSERS_STEMS, FULL)[0].name == f"{DIFFUSERS_STEMS[0]}.safetensors"


def test_what_exists_here_is_taken_without_a_look_at_the_hub(server, tmp_path, monkeypatch):
    add_pipeline(server, "models/sd15")
    (tmp_path / "models/sd15").mkdir(parents=True)
    (tmp_path / "models/x.safetensors").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    assert find_source("models/sd15") == Path("models/sd15")
    assert find_source(Path("models/x.safetensors")) == Path("models/x.safetensors")
    assert find_source("~/sd15") == tmp_path / "models/sd15"
    assert server.requests == []


def test_an_interrupted_download_is_completed(server, tmp_path):
    add_pipeline(server, "me/sd15")
    folder = find_source("me/sd15")
    (folder / "vae/diffusion_pytorch_model.safetensors").resolve().unlink()  # a link to nowhere stays
    (folder / "tokenizer/merges.txt").unlink()
    server.requests.clear()
    assert find_source("me/sd15") == folder
    assert "vae/diffusion_pytorch_model.safetensors" in fetched(server, "me/sd15")
    assert missing_files(folder) == [] and not any("text_encoder" in name for name in server.downloads())


def test_a_shard_that_the_cache_lacks_is_fetched(server):
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    add_pipeline(server, "me/sd", [name for name in SD15 if not name.startswith("unet/d")])
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}})
    server.add("me/sd", {f"unet/{name}": name for name in names})
    server.add("me/sd", {"unet/diffusion_pytorch_model.safetensors.index.json": index})
    folder = find_source("me/sd")
    assert [path.name for path in shards(folder / "unet/diffusion_pytorch_model.safetensors.index.json")] == names
    (folder / "unet" / names[1]).resolve().unlink()
    (folder / "unet" / names[1]).unlink()
    server.requests.clear()
    assert find_source("me/sd") == folder and (folder / "unet" / names[1]).read_text() == names[1]
    assert fetched(server, "me/sd") == [f"unet/{names[1]}"]


def test_one_file_of_a_repository(server):
    server.add("ByteDance/SDXL-Lightning", LIGHTNING)
    source = f"ByteDance/SDXL-Lightning/{LIGHTNING[2]}"
    path = find_source(source)
    assert path.read_text() == source and server.downloads() == [source]
    server.requests.clear()
    assert find_source(source) == path and server.requests == []
    assert source in refused(find_source, "ByteDance/SDXL-Lightning")
    message = refused(find_source, "ByteDance/SDXL-Lightning/sdxl_lightning_3step_unet.safetensors")
    assert "3step_unet.safetensors" in message and "sdxl_lightning_4step_unet.safetensors" in message
    assert server.downloads() == []


def test_a_repository_of_one_file_or_of_one_part(server, monkeypatch):
    server.add("me/single", ["README.md", "sd [v2].safetensors", "sd [v2].ckpt"])
    server.add("me/taesd", TAESD)
    single, part = find_source("me/single"), find_source("me/taesd")
    assert single.read_text() == "me/single/sd [v2].safetensors"
    assert sorted(files_of(part)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    server.requests.clear()
    assert find_source("me/taesd") == part and server.requests == []
    disconnect(monkeypatch)
    assert find_source("me/single") == single


@pytest.mark.parametrize("source", ["me/lora", "me/lora/adapter_model.safetensors"])
def test_a_lora_of_peft_comes_with_its_settings_which_hold_its_alpha(server, monkeypatch, source):
    server.add("me/lora", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
    huggingface_hub.hf_hub_download("me/lora", "adapter_model.safetensors")  # without them
    path = find_source(source)
    assert path.name == "adapter_model.safetensors"
    assert path.with_name("adapter_config.json").read_text() == "me/lora/adapter_config.json"
    disconnect(monkeypatch)
    assert find_source(source) == path


def test_a_revision_is_kept_apart(server):
    add_pipeline(server, "me/sd15")
    add_pipeline(server, "me/sd15@fp16")
    server.add("me/sd15@fp16", {"unet/config.json": "another"})
    main, branch = find_source("me/sd15"), find_source("me/sd15@fp16")
    assert (branch / "unet/config.json").read_text() == "another"
    assert (main / "unet/config.json").read_text() != "another"
    server.requests.clear()
    assert (find_source("me/sd15"), find_source("me/sd15@fp16")) == (main, branch)
    assert find_source(f"me/sd15@{branch.name}") == branch, "a commit is a revision"
    assert find_source("me/sd15@fp16/unet/diffusion_pytorch_model.safetensors").is_file()
    assert server.requests == []
    assert "no revision v2" in refused(find_source, "me/sd15@v2")


def test_a_repository_that_moved_is_found_with_one_note(server, capsys):
    old, new = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    add_pipeline(server, new)
    folder = find_source(old)
    assert find_source(old) == folder == find_source(new)
    assert find_source(f"{old}/unet/diffusion_pytorch_model.safetensors").is_relative_to(folder)
    notes = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
    assert len(notes) == 1 and old in notes[0] and new in notes[0]
    assert not any("runwayml" in request for request in server.requests)


def test_a_copy_from_before_a_repository_moved_still_serves(server, capsys, monkeypatch):
    old = "runwayml/stable-diffusion-v1-5"
    add_pipeline(server, old)
    monkeypatch.setattr(hub, "MOVED", {})
    folder = find_source(old)
    monkeypatch.setattr(hub, "MOVED", {old: "stable-diffusion-v1-5/stable-diffusion-v1-5"})
    server.requests.clear()
    assert find_source(old) == folder and server.requests == []
    assert "note:" not in capsys.readouterr().err


# refusing


@pytest.mark.parametrize(
    "source",
    [
        *("", "sd15", "out/run/student", "out/x.safetensors", "./a/b", "../a/b", "/a/b", "a\\b", "a b/c", "a/b/"),
        *("~/a/b", "owner/a--b", "owner/a..b", "owner/name/config.json", "a/b@/x.safetensors"),
    ],
)
def test_what_can_only_be_a_wrong_path_is_refused_without_a_look_at_the_hub(server, source):
    assert refused(find_source, source).startswith(f"no such file or folder: {source} (")
    assert server.requests == []


def test_closed_doors_come_with_the_key(server, monkeypatch):
    add_pipeline(server, "me/gated")
    add_pipeline(server, "me/private")
    add_pipeline(server, "me/denied")
    server.trouble |= {"me/gated": "gated", "me/private": "private", "me/denied": "denied"}
    message = refused(find_source, "models/sd15")
    assert "no such file or folder: models/sd15;" in message and "nor a model on the Hub (not found" in message
    message = refused(find_source, "me/gated")
    assert "licence" in message and f"{server.url}/me/gated" in message and "hf auth login" in message
    assert "not found" in refused(find_source, "me/private") and "HF_TOKEN" in refused(find_source, "me/private")
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    for repo in server.trouble:
        message = refused(find_source, repo)
        assert "HF_TOKEN" in message and "hf_a_secret" not in message
    assert "denies access" in refused(find_source, "me/denied")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert not missing_files(find_source("me/gated")) and not missing_files(find_source("me/private"))


def test_a_hub_that_does_not_work_is_not_taken_for_one_without_the_model(server, monkeypatch):
    add_pipeline(server, "me/sd15")
    server.trouble["me/sd15"] = "down"
    assert "503" in refused(find_source, "me/sd15") and "later" in refused(find_source, "me/sd15")
    server.trouble["me/sd15"] = "login page"
    assert "no connection to the Hub" in refused(find_source, "me/sd15")
    disconnect(monkeypatch)
    for source in ("me/sd15", "me/sd15/x.safetensors"):
        message = refused(find_source, source)
        assert f"no such file or folder: {source}; nor is it in the Hub's cache" in message and "connect" in message


def test_what_is_not_there_to_be_read_is_said_before_anything_is_fetched(server):
    server.add("me/flax", ["model_index.json", "unet/config.json", "unet/diffusion_flax_model.msgpack"])
    assert "me/flax has no weights of its unet" in refused(find_source, "me/flax")
    server.add("me/words", ["README.md"])
    assert "me/words holds no model" in refused(find_source, "me/words")
    assert server.downloads() == []


def test_a_full_disk_and_a_lost_connection_are_told_apart(server, monkeypatch):
    add_pipeline(server, "me/sd15")

    download = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refused(find_source, "me/sd15")
    assert "No space left on device" in message and constants.HF_HUB_CACHE in message
    download.side_effect = OSError("file should be of size 7 but has size 3")
    assert "broke off: run it again" in refused(find_source, "me/sd15")
    download.configure_mock(side_effect=None, return_value=str(server.root))
    assert "not complete" in refused(find_source, "me/sd15")


OFFLINE = """
import sys
from minidistill.errors import InputError
from minidistill.weights.hub import find_source
for source in sys.argv[1:]:
    try:
        print(find_source(source))
    except InputError as error:
        print("refused:", error)
"""


def test_environment_variables_place_the_hub_and_the_cache_and_forbid_the_network(server, tmp_path):
    add_pipeline(server, "me/whole")
    add_pipeline(server, "me/part")
    add_pipeline(server, "me/other")
    server.add("me/single", ["sd.safetensors"])
    folder, single = find_source("me/whole"), find_source("me/single/sd.safetensors")
    (find_source("me/part") / "unet/config.json").unlink()
    server.requests.clear()
    wanted = ["me/whole", "me/single/sd.safetensors", "me/single", "me/part", "me/other", "models/sd15"]
    places = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **places, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OFFLINE, *wanted]  # a process, as huggingface_hub reads its variables but once
    answers = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert answers[:3] == [str(folder), str(single), str(single)]
    for source, message in zip(wanted[3:], answers[3:], strict=True):
        assert f"refused: no such file or folder: {source};" in message and "HF_HUB_OFFLINE" in message
    assert "unet/config.json" in answers[3] and "nor is it in the Hub's cache" in answers[4]
    assert server.requests == []


# the vocabulary that a single file leaves out


@pytest.fixture
def without_vocabulary(tmp_path):
    """A single file that carries no tokenizer, as those of others."""
    parts = load_pipeline("miniature", dtype=None, vae_dtype=None)
    path = tmp_path / "here/model.safetensors"
    path.parent.mkdir()
    write_single_file(path, parts.unet, parts.vae, parts.text_encoders, parts.schedule)
    return path


def test_clips_vocabulary_is_fetched_once(server, without_vocabulary):
    made = load_tokenizer(MINIATURE)
    made.save(server.root / CLIP)
    for requests in (["merges.txt", "vocab.json"], []):
        server.requests.clear()
        [found] = load_parts(without_vocabulary)["tokenizers"]
        assert (found.vocab, found.merges) == (made.vocab, made.merges)
        assert fetched(server, CLIP) == requests and bool(server.requests) == bool(requests)


def test_where_no_vocabulary_can_be_had_the_place_for_one_is_named(server, without_vocabulary, monkeypatch):
    disconnect(monkeypatch)
    message = refused(load_parts, without_vocabulary)
    place = without_vocabulary.parent / "tokenizer"
    assert "put the vocab.json and merges.txt of any Stable Diffusion" in message and f"in {place} (" in message
    load_tokenizer(MINIATURE).save(place)
    assert load_parts(without_vocabulary)["tokenizers"][0].vocab == load_tokenizer(MINIATURE).vocab
    (place / "merges.txt").unlink()
    assert str(place) in refused(load_parts, without_vocabulary)
