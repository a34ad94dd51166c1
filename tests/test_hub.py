"""Sources on disk and on the Hub (`hub_server.py`): only what is needed is fetched, once; the rest is a clear line."""

import errno
import json
import socket
from collections.abc import Collection
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, HubServer, files_of
from huggingface_hub import constants, file_download
from test_files import refused

from minidistill.interop.replace import CLIP, load_parts
from minidistill.interop.single_file import write_single_file
from minidistill.pipeline import load_pipeline
from minidistill.weights import hub
from minidistill.weights.choice import choose_files, missing_files, pick_weights, shards
from minidistill.weights.files import read_metadata, read_safetensors, write_safetensors
from minidistill.weights.folders import MINIATURE, find_weights, load_tokenizer
from minidistill.weights.hub import find_source

HALF, FULL = torch.float16, torch.float32
STEM = "diffusion_pytorch_model"


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
SDXL = [
    *COMMON,
    *several("sd_xl_base_1.0 sd_xl_offset_example-lora_1.0", "safetensors"),
    *tokenizer("tokenizer_2"),
    "text_encoder_2/config.json",
    *several("unet/model vae_decoder/model unet/openvino_model", "onnx bin xml"),
    *several("unet/diffusion_flax_model text_encoder/flax_model", "msgpack"),
    *("unet/model.onnx_data", "vae_decoder/config.json", "vae_1_0/diffusion_pytorch_model.safetensors"),
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
        (SDXL, FULL, [*PARTS, *TWO, *several(f"{UNET} {VAE} {TEXT} text_encoder_2/model", "safetensors")]),
        (TINY_SD, FULL, [*PARTS, *several(f"{UNET} {VAE} text_encoder/pytorch_model", "bin")]),
        (TAESD, FULL, ["config.json", "diffusion_pytorch_model.safetensors"]),
    ],
    ids=["sd15", "sd15-half", "sdxl", "tiny-sd", "taesd"],
)
def test_one_form_of_each_needed_thing_is_chosen_of_official_repositories(names, dtype, expected):
    chosen = choose_files(names, dtype)
    assert sorted(chosen) == sorted(expected) and len(set(chosen)) == len(chosen)
    assert chosen[0] in ("model_index.json", "config.json")
    assert choose_files(list(reversed(names)), dtype) == chosen, "the order of the list must not matter"


def test_precision_comes_before_safety_of_the_format_unless_half_is_enough():
    for kinds, dtype, expected in (
        ("fp16.safetensors bin fp16.bin", FULL, "bin"),
        ("fp16.safetensors fp16.bin", FULL, "fp16.safetensors"),
        ("bin fp16.bin safetensors", HALF, "safetensors"),
        ("bin fp16.bin", HALF, "fp16.bin"),
    ):
        assert pick_weights(several(STEM, kinds), dtype) == [f"{STEM}.{expected}"]
    assert pick_weights(["openvino_model.bin", "model.onnx", "flax_model.msgpack"]) == []


def test_shards_are_taken_with_their_index_in_either_spelling_and_no_others():
    plain = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    before = [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    after = [f"{STEM}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    index, half_index = f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.fp16.json"
    for half in (before, after):
        names = {*plain, *half, index, half_index, "config.json"}
        assert pick_weights(names, FULL) == [index, *plain]
        assert pick_weights(names, HALF) == [half_index, *half]
        assert pick_weights({*half, half_index}, FULL) == [half_index, *half]
        assert pick_weights({*names, f"{STEM}.safetensors"}, FULL) == [f"{STEM}.safetensors"]
    files = ["model_index.json", "unet/config.json", *(f"unet/{name}" for name in (index, *plain))]
    assert choose_files(files) == files
    pickled = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert pick_weights(pickled) == pickled[::-1]


def test_repositories_of_single_files():
    assert choose_files(["README.md", "a.safetensors", "a.ckpt"]) == ["a.safetensors"]
    assert choose_files(["README.md", "deep/a.ckpt", "x.yaml"]) == ["deep/a.ckpt"]
    message = refused(choose_files, LIGHTNING, FULL, "ByteDance/SDXL-Lightning")
    for name in LIGHTNING[1:]:
        assert f"ByteDance/SDXL-Lightning/{name}" in message
    message = refused(choose_files, ["README.md", "config.json", "flax_model.msgpack"], FULL, "me/flax")
    assert "me/flax" in message and "flax_model.msgpack" in message and "safetensors" in message
    assert "and 28 more" in refused(choose_files, [f"{i}.safetensors" for i in range(40)])
    names = [name for name in SD15 if not name.startswith("unet/d")] + ["unet/diffusion_flax_model.msgpack"]
    assert "me/flax has no weights of its unet" in (message := refused(choose_files, names, FULL, "me/flax"))
    assert "only diffusion_flax_model.msgpack" in message


def test_what_a_folder_lacks_is_named_down_to_the_shard(tmp_path):
    shard = f"{STEM}-0000{{}}-of-00002.safetensors"
    contents = {name: "" for name in choose_files(SDXL, HALF)}
    contents |= {f"unet/{shard.format(1)}": "", f"unet/{shard.format(2)}": ""}
    del contents[f"{UNET}.fp16.safetensors"]
    index = {"weight_map": {"a": shard.format(1), "b": shard.format(2)}}
    contents[f"{UNET}.safetensors.index.fp16.json"] = json.dumps(index)
    nothing = {"_class_name": "X", "safety_checker": [None, None], "image_encoder": ["transformers", "Y"]}
    second = {part: ["transformers", "Class"] for part in ("text_encoder_2", "tokenizer_2")}
    contents["model_index.json"] = json.dumps(INDEX | second | nothing)
    folder = HubServer(tmp_path).add("me/x", contents)
    assert missing_files(folder, HALF) == missing_files(folder) == []
    poor = {f"{part}/weights in float32" for part in ("unet", "text_encoder", "text_encoder_2")}
    assert set(missing_files(folder, FULL)) == poor
    lacking = {f"unet/{shard.format(2)}", "unet/config.json"}
    lacking |= {"tokenizer_2/vocab.json", "scheduler/scheduler_config.json"}
    for name in (*lacking, f"{TEXT}.fp16.safetensors"):
        (folder / name).unlink()
    assert set(missing_files(folder, HALF)) == {*lacking, "text_encoder/weights"}


def test_an_index_may_not_lead_out_of_its_folder(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    for text in ('{"weight_map": {"a": "../../secret.safetensors"}}', '{"metadata": {}}'):
        path.write_text(text)
        assert "it has no weight_map, or files outside of its folder" in refused(shards, path)


def point_to(url: str, monkeypatch) -> None:
    """Make this the Hub's address, as HF_ENDPOINT would."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # some versions have it in both
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub with repositories in tmp_path/hub, and an empty cache in tmp_path/cache."""
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


def test_a_hub_id_is_its_folder_and_later_so_without_the_hub(server, monkeypatch):
    files = {name: path.read_bytes() for name, path in files_of(MINIATURE).items() if not name.startswith("clip/")}
    server.add("me/sd", {**files, "safety_checker/model.safetensors": "never asked for"})
    for _ in range(2):
        pipe = load_pipeline("me/sd", dtype=None, vae_dtype=None)
        weights = read_safetensors(MINIATURE / f"{UNET}.safetensors")
        assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())
        assert f"{UNET}.safetensors" in fetched(server, "me/sd")
        assert "safety_checker/model.safetensors" not in fetched(server, "me/sd")
        disconnect(monkeypatch)


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
    assert find_weights(folder / "unet", FULL)[0].name == f"{STEM}.safetensors"


def test_an_interrupted_download_is_completed(server):
    names = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}})
    add_pipeline(server, "me/sd", [name for name in SD15 if not name.startswith("unet/d")])
    shards = {f"unet/{name}": name for name in names}
    server.add("me/sd", shards | {f"unet/{STEM}.safetensors.index.json": index})
    folder = find_source("me/sd")
    (folder / f"{VAE}.safetensors").resolve().unlink()  # a link to nowhere stays
    (folder / "tokenizer/merges.txt").unlink()
    (folder / "unet" / names[1]).resolve().unlink()
    (folder / "unet" / names[1]).unlink()
    server.requests.clear()
    assert find_source("me/sd") == folder and (folder / "unet" / names[1]).read_text() == names[1]
    assert {f"unet/{names[1]}", f"{VAE}.safetensors"} <= set(fetched(server, "me/sd"))
    assert missing_files(folder) == [] and not any("text_encoder" in name for name in server.downloads())


def test_one_file_or_one_part_of_a_repository(server):
    server.add("ByteDance/SDXL-Lightning", LIGHTNING)
    source = f"ByteDance/SDXL-Lightning/{LIGHTNING[2]}"
    assert find_source(source).read_text() == source and server.downloads() == [source]
    server.add("me/single", ["README.md", "sd [v2].safetensors", "sd [v2].ckpt"])
    assert find_source("me/single").read_text() == "me/single/sd [v2].safetensors"
    server.add("me/taesd", TAESD)
    part = find_source("me/taesd")
    assert sorted(files_of(part)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    server.requests.clear()
    assert find_source("me/taesd") == part and find_source(source).read_text() == source and server.requests == []
    assert source in refused(find_source, "ByteDance/SDXL-Lightning")
    message = refused(find_source, "ByteDance/SDXL-Lightning/sdxl_lightning_3step_unet.safetensors")
    assert "3step_unet.safetensors" in message and "sdxl_lightning_4step_unet.safetensors" in message


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


def test_a_repository_that_moved_is_found_with_a_warning(server, recwarn, monkeypatch):
    old, new = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    add_pipeline(server, new)
    folder = find_source(old)
    assert find_source(old) == folder == find_source(new)
    assert find_source(f"{old}/unet/diffusion_pytorch_model.safetensors").is_relative_to(folder)
    assert old in str(recwarn[0].message) and new in str(recwarn[0].message)
    assert not any("runwayml" in request for request in server.requests)
    add_pipeline(server, "me/older")
    with monkeypatch.context() as patch:  # a copy from before it moved still serves
        copy = find_source("me/older")
        patch.setitem(hub.MOVED, "me/older", new)
        server.requests.clear()
        assert find_source("me/older") == copy and server.requests == []


WRONG = ["", "sd15", "out/run/student", "out/x.safetensors", "./a/b", "../a/b", "/a/b", "a\\b", "a b/c", "a/b/"]
WRONG += ["~/a/b", "owner/a--b", "owner/a..b", "owner/name/config.json", "a/b@/x.safetensors"]


def test_what_exists_or_can_only_be_a_wrong_path_needs_no_look_at_the_hub(server, tmp_path, monkeypatch):
    for source in WRONG:
        assert refused(find_source, source).startswith(f"no such file or folder: {source} (")
    (tmp_path / "models/sd15").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    assert find_source("models/sd15") == Path("models/sd15")
    assert find_source("~/sd15") == tmp_path / "models/sd15"
    assert server.requests == []


def test_closed_doors_come_with_the_key(server, monkeypatch):
    add_pipeline(server, "me/gated")
    add_pipeline(server, "me/private")
    add_pipeline(server, "me/denied")
    server.trouble |= {"me/gated": "gated", "me/private": "private", "me/denied": "denied"}
    message = refused(find_source, "models/sd15")
    assert "no such file or folder: models/sd15;" in message and "nor a model on the Hub (not found" in message
    message = refused(find_source, "me/gated")
    assert "accept its licence" in message and f"{server.url}/me/gated" in message and "hf auth login" in message
    assert "not found" in refused(find_source, "me/private") and "HF_TOKEN" in refused(find_source, "me/private")
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    for repo in server.trouble:
        message = refused(find_source, repo)
        assert "HF_TOKEN" in message and "hf_a_secret" not in message
    assert "does not deliver it (HTTP 403)" in refused(find_source, "me/denied")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert not missing_files(find_source("me/gated")) and not missing_files(find_source("me/private"))


def test_a_hub_that_does_not_work_a_full_disk_and_a_lost_connection_are_told_apart(server, monkeypatch):
    add_pipeline(server, "me/sd15")
    server.trouble["me/sd15"] = "down"
    assert "(HTTP 503): see" in refused(find_source, "me/sd15")
    server.trouble["me/sd15"] = "login page"
    assert "no connection to the Hub" in refused(find_source, "me/sd15")
    server.trouble.clear()
    with monkeypatch.context() as patch:
        download = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        patch.setattr(huggingface_hub, "snapshot_download", download)
        message = refused(find_source, "me/sd15")
        assert "No space left on device" in message and constants.HF_HUB_CACHE in message
        download.side_effect = OSError("file should be of size 7 but has size 3")
        assert "no connection to the Hub: connect, and try again" in refused(find_source, "me/sd15")
        download.configure_mock(side_effect=None, return_value=str(server.root))
        assert "not complete" in refused(find_source, "me/sd15")
    disconnect(monkeypatch)
    for source in ("me/sd15", "me/sd15/x.safetensors"):
        message = refused(find_source, source)
        assert f"no such file or folder: {source}; nor is it in the Hub's cache" in message and "connect" in message


def test_without_the_network_the_cache_serves_and_what_it_lacks_is_named(server, monkeypatch):
    for repo in ("me/whole", "me/part", "me/other"):
        add_pipeline(server, repo)
    server.add("me/single", ["sd.safetensors"])
    folder, single = find_source("me/whole"), find_source("me/single/sd.safetensors")
    (find_source("me/part") / "unet/config.json").unlink()
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_source("me/whole") == folder
    assert find_source("me/single/sd.safetensors") == find_source("me/single") == single
    for repo, lack in (("me/part", "lacks unet/config.json"), ("me/other", "nor is it in the Hub's cache")):
        message = refused(find_source, repo)
        assert f"no such file or folder: {repo};" in message and lack in message and "HF_HUB_OFFLINE" in message
    assert server.requests == []


def test_clips_vocabulary_is_fetched_once_or_the_place_for_it_is_named(server, tmp_path, monkeypatch):
    path, made = tmp_path / "here/model.safetensors", load_tokenizer(MINIATURE)
    write_single_file(path, load_pipeline("miniature", dtype=None, vae_dtype=None))
    header = {key: text for key, text in read_metadata(path).items() if key != "minidistill.tokenizers"}
    write_safetensors(path, read_safetensors(path), header)  # as those of others
    message = refused(load_parts, path, "meta", None, None)
    assert "vocab.json and merges.txt" in message and f"in {tmp_path / 'here/tokenizer'} (no such file" in message
    made.save(server.root / CLIP)
    for requests in (["merges.txt", "vocab.json"], []):
        server.requests.clear()
        [found] = load_parts(path, "meta", None, None)["tokenizers"]
        assert (found.vocab, found.merges) == (made.vocab, made.merges)
        assert fetched(server, CLIP) == requests and bool(server.requests) == bool(requests)
