"""Any SOURCE to a pipeline, parts replaced in it, and `convert`, there and back: always the same images."""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import change_json, levels, load_oracle, refused
from test_sdxl import noise, oracle_of
from tiny import PROMPTS

from minidistill import convert
from minidistill.cli import run_command
from minidistill.diffusion.sampling import Sampling, sampling_metadata
from minidistill.distill.block_removal import RECIPES, plan_removal
from minidistill.errors import InputError
from minidistill.interop.lora_files import write_lora
from minidistill.interop.replace import merge_loras, replace_unet, replace_vae
from minidistill.models.lora import ATTENTION, add_lora
from minidistill.models.taesd import AutoencoderTiny
from minidistill.models.unet import UNet
from minidistill.pipeline import load_pipeline
from minidistill.weights.files import read_metadata
from minidistill.weights.folders import find_model

UNET = "unet/diffusion_pytorch_model.safetensors"
SETTINGS = {"latents": noise(), "steps": 2}
KINDS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def files(sources, tmp_path_factory):
    """{kind: the same pipeline as a single file}, not to be changed."""
    folder = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        assert run_convert(sources[kind], folder / f"{kind}.safetensors") == 0
    return {kind: folder / f"{kind}.safetensors" for kind in KINDS}


def run_convert(*words) -> int:
    with pytest.raises(SystemExit) as info:
        run_command(convert.main, convert.Config, prog="convert", argv=[str(word) for word in words])
    return info.value.code


def all_tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def same(one, other) -> bool:
    return np.array_equal(levels(one), levels(other))


def altered(folder, new, seed: int = 3):
    """A copy of a pipeline folder whose U-Net has other weights."""
    shutil.copytree(folder, new)
    torch.manual_seed(seed)
    tensors = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in load_file(new / UNET).items()}
    save_file(tensors, new / UNET)
    return new


# single files


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_pipeline_it_was_made_of_to_the_bit(sources, files, tmp_path, kind):
    folder, file = load_pipeline(sources[kind]), load_pipeline(files[kind])
    assert file.schedule == folder.schedule
    assert file.zero_unconditional == folder.zero_unconditional
    assert [t.pad for t in file.tokenizers] == [t.pad for t in folder.tokenizers]
    assert same(file(PROMPTS, **SETTINGS), folder(PROMPTS, **SETTINGS))
    assert run_convert(files[kind], tmp_path / "again") == 0
    folder.save(tmp_path / "ours")
    assert_same_folders(tmp_path / "ours", tmp_path / "again")


def assert_same_folders(one, other) -> None:
    """The same tensors, to the bit, and the same json files."""
    expected, found = all_tensors(one), all_tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    contents = [
        {path.relative_to(folder): json.loads(path.read_text()) for path in folder.rglob("*.json")}
        for folder in (one, other)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("recipe", ["koala-700m", "segmind-vega"])
def test_sdxls_students_come_back_from_a_file_bit_by_bit_with_their_configs(sources, tmp_path, recipe):
    pipe = load_pipeline(sources["sdxl"])
    # Deeper than any recipe leaves it, so that each has something to cut.
    teacher = replace(pipe.unet.config, layers_per_block=2, transformer_layers_per_block=(1, 2, 7))
    config = plan_removal(teacher, RECIPES[recipe].remove).student
    assert config.transformer_depths() != teacher.transformer_depths()
    torch.manual_seed(0)
    pipe.unet = UNet(config)
    pipe.save(tmp_path / "student")
    assert run_convert(tmp_path / "student", tmp_path / "student.safetensors") == 0
    assert run_convert(tmp_path / "student.safetensors", tmp_path / "again") == 0
    assert_same_folders(tmp_path / "student", tmp_path / "again")
    assert load_pipeline(tmp_path / "student.safetensors").unet.config == config


def test_the_miniature_goes_through_a_single_file_in_its_own_precision(tmp_path):
    assert run_convert("miniature", tmp_path / "m.safetensors") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "m.safetensors").values()} == {torch.float16}
    one, other = load_pipeline("miniature"), load_pipeline(tmp_path / "m.safetensors")
    assert same(one("a red circle", steps=2), other("a red circle", steps=2))


def test_convert_changes_precision_only_on_request(sources, tmp_path):
    assert run_convert(sources["sd1"], tmp_path / "half", "--dtype", "fp16") == 0
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "half").values()} == {torch.float16}
    full, half = load_pipeline(sources["sd1"]), load_pipeline(tmp_path / "half")
    assert torch.equal(half.unet.conv_in.weight, full.unet.conv_in.weight.half().float())


def test_a_single_file_without_a_vocabulary_takes_the_one_beside_it(sources, files, tmp_path, monkeypatch):
    monkeypatch.setattr("minidistill.weights.hub.fetch_files", offline)
    for kind in KINDS:
        metadata = {k: v for k, v in read_metadata(files[kind]).items() if k != "minidistill.tokenizers"}
        save_file(load_file(files[kind]), tmp_path / f"{kind}.safetensors", metadata)
    assert "put the vocab.json and merges.txt" in refused(load_pipeline, tmp_path / "sd1.safetensors")
    shutil.copytree(sources["sd1"] / "tokenizer", tmp_path / "tokenizer")
    for kind in ("sd1", "sd2"):
        found = load_pipeline(tmp_path / f"{kind}.safetensors")
        expected = load_pipeline(sources[kind])
        assert [t.pad for t in found.tokenizers] == [t.pad for t in expected.tokenizers]
        assert same(found(PROMPTS, **SETTINGS), expected(PROMPTS, **SETTINGS))


def offline(*_):
    raise InputError("offline")


# parts that are replaced


def edited(source, unet=None, vae=None, loras=(), ema=False, dtype=torch.float32):
    """A pipeline after the steps of `interop.replace`, with no network read from disk that is replaced."""
    pipe = load_pipeline(source, dtype=dtype, without=[*["unet"][: bool(unet)], *["vae"][: bool(vae)]])
    if unet:
        replace_unet(pipe, unet, dtype, ema)
    if vae:
        replace_vae(pipe, vae)
    merge_loras(pipe, loras)
    return pipe


def test_another_unet_replaces_that_of_a_model(sources, tmp_path):
    other, file = altered(sources["sd1"], tmp_path / "other"), tmp_path / "other.safetensors"
    assert run_convert(other, file) == 0
    expected, base = (load_pipeline(f)(PROMPTS, **SETTINGS) for f in (other, sources["sd1"]))
    for source in (other, other / "unet", file):
        found = edited(sources["sd1"], unet=source)(PROMPTS, **SETTINGS)
        assert same(found, expected) and not same(found, base), source


def test_a_network_that_is_replaced_is_not_read(sources, files, tmp_path):
    copy = shutil.copytree(sources["sd1"], tmp_path / "copy")
    (copy / UNET).unlink()
    for source in (copy, files["sd1"]):
        pipe = load_pipeline(source, without=("unet",))
        assert all(weight.is_meta for weight in pipe.unet.parameters())
        assert not any(weight.is_meta for weight in pipe.vae.parameters())


def test_a_lightning_unet_brings_its_settings(sources, files, tmp_path):
    name = tmp_path / "sdxl_lightning_2step_unet.safetensors"
    tensors = {n: t for n, t in load_file(files["sdxl"]).items() if n.startswith("model.diffusion_model.")}
    config = read_metadata(files["sdxl"])["minidistill.unet_config"]
    save_file(tensors, name, {"format": "pt", "minidistill.unet_config": config})
    pipe = edited(sources["sdxl"], unet=name)
    assert pipe.sampling == Sampling(2)
    oracle = oracle_of(sources["sdxl"])
    oracle.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        oracle.scheduler.config, timestep_spacing="trailing"
    )
    expected = oracle(PROMPTS, latents=noise(), num_inference_steps=2, guidance_scale=0, height=32, width=32).images
    assert np.abs(levels(pipe(PROMPTS, latents=noise())) - levels(expected)).max() <= 2
    assert "--unet" in refused(load_pipeline, name), "alone it makes no images"


@pytest.fixture(scope="module")
def velocity(sources, tmp_path_factory):
    """An SDXL that predicts v with zero terminal SNR: {"folder", "file", "file of others", "unet alone"}."""
    tmp_path = tmp_path_factory.mktemp("velocity")
    folder = shutil.copytree(sources["sdxl"], tmp_path / "v")
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    change_json(folder / "scheduler/scheduler_config.json", **config)
    assert run_convert(folder, tmp_path / "v.safetensors") == 0
    tensors, header = load_file(tmp_path / "v.safetensors"), read_metadata(tmp_path / "v.safetensors")
    others = {name: text for name, text in header.items() if "schedule" not in name and "prediction" not in name}
    save_file(tensors, tmp_path / "others.safetensors", others)
    unet = {name: t for name, t in tensors.items() if name.startswith("model.diffusion_model.") or not t.numel()}
    alone = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in unet.items()}
    save_file(alone, tmp_path / "alone.safetensors", {"minidistill.unet_config": header["minidistill.unet_config"]})
    files = {"file": "v", "file of others": "others", "unet alone": "alone"}
    return {"folder": folder, **{kind: tmp_path / f"{name}.safetensors" for kind, name in files.items()}}


def test_an_sdxl_file_that_predicts_v_has_the_marks_of_other_programs(files, velocity, tmp_path):
    marks = {"v_pred", "ztsnr"}
    assert not marks & load_file(files["sdxl"]).keys()
    for kind, source in velocity.items():
        new = tmp_path / "new.safetensors"
        assert run_convert(source, new) == 0
        tensors = load_file(new)
        assert marks <= tensors.keys() and not any(tensors[mark].numel() for mark in marks), kind
        assert read_metadata(new)["modelspec.prediction_type"] == "v", kind
        new.unlink()


def test_another_unet_brings_what_it_predicts(sources, velocity):
    whole = load_pipeline(velocity["folder"])
    expected = whole(PROMPTS, **SETTINGS)
    for kind, source in velocity.items():
        pipe = edited(sources["sdxl"], unet=source)
        assert pipe.schedule == whole.schedule and same(pipe(PROMPTS, **SETTINGS), expected), kind


def test_a_folder_has_no_place_for_what_a_unet_alone_predicts_and_that_is_said(velocity, tmp_path, capsys):
    assert run_convert(velocity["unet alone"], tmp_path / "new") == 0
    assert "v_prediction" in capsys.readouterr().err


def test_settings_survive_conversion(sources, tmp_path):
    pipe = load_pipeline(sources["sdxl"])
    pipe.sampling = Sampling(1, prediction="sample")
    pipe.save(tmp_path / "folder")
    assert run_convert(tmp_path / "folder", tmp_path / "one.safetensors") == 0
    assert run_convert(tmp_path / "one.safetensors", tmp_path / "again") == 0
    for source in ("one.safetensors", "again"):
        found = load_pipeline(tmp_path / source)
        assert found.sampling == pipe.sampling and found.schedule.prediction_type == "sample"
    assert sampling_metadata(pipe.sampling).items() <= read_metadata(tmp_path / "again" / UNET).items()


def test_a_taesd_takes_the_vaes_place(sources, tmp_path):
    torch.manual_seed(0)
    oracle, folder = load_oracle(sources["sd1"]), tmp_path / "taesd"
    oracle.vae = diffusers.AutoencoderTiny()
    oracle.vae.save_pretrained(folder)
    expected = oracle(PROMPTS, latents=noise(), num_inference_steps=2, height=64, width=64).images
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        pipe = edited(sources["sd1"], vae=source)
        assert isinstance(pipe.vae, AutoencoderTiny)
        assert np.abs(levels(pipe(PROMPTS, **SETTINGS)) - levels(expected)).max() <= 2
    pipe.save(tmp_path / "saved")
    assert same(load_pipeline(tmp_path / "saved")(PROMPTS, **SETTINGS), pipe(PROMPTS, **SETTINGS))


def test_a_file_without_a_vae_takes_that_of_another_model(sources, files, tmp_path):
    tensors = {name: t for name, t in load_file(files["sd1"]).items() if not name.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "file.safetensors", read_metadata(files["sd1"]))
    found = edited(tmp_path / "file.safetensors", vae=sources["sd1"])
    assert same(found(PROMPTS, **SETTINGS), load_pipeline(sources["sd1"])(PROMPTS, **SETTINGS))
    assert "--vae" in refused(load_pipeline, tmp_path / "file.safetensors")


# refusals


def test_convert_touches_nothing_that_is_there(sources, files, tmp_path, capsys):
    before = files["sd1"].read_bytes()
    assert run_convert(sources["sd1"], files["sd1"]) == 2
    assert "exists" in capsys.readouterr().err and files["sd1"].read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    assert run_convert(sources["sd1"], tmp_path / "full") == 2
    assert run_convert(sources["sd1"], tmp_path / "name.ckpt", "--layout", "single-file") == 2
    assert ".safetensors" in capsys.readouterr().err
    assert run_convert("nowhere", tmp_path / "new") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_sources_of_the_wrong_kind_are_refused_with_the_way_out(sources, files, tmp_path):
    (tmp_path / "page.safetensors").write_text("<html>404</html>")
    (tmp_path / "cut.safetensors").write_bytes(files["sd1"].read_bytes()[:5000])
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 2)}, tmp_path / "lora.safetensors")
    assert "web page" in refused(load_pipeline, tmp_path / "page.safetensors")
    assert "cut short" in refused(load_pipeline, tmp_path / "cut.safetensors")
    assert "--lora" in refused(load_pipeline, tmp_path / "lora.safetensors")
    assert "not a VAE" in refused(edited, sources["sd1"], vae=tmp_path / "lora.safetensors")
    for option in ({"unet": files["sd1"]}, {"loras": [(tmp_path / "none.safetensors", 1.0)]}):
        assert refused(edited, sources["sdxl"], **option)


def test_a_part_or_a_file_of_a_model_given_for_another_is_told_apart(sources):
    sd1 = sources["sd1"]
    assert "AutoencoderKL" in refused(edited, sd1, unet=sd1 / "vae") and "--vae" in refused(
        edited, sd1, unet=sd1 / "vae"
    )
    assert "--unet" in refused(edited, sd1, vae=sd1 / "unet")
    assert "CLIPTextModel" in refused(edited, sd1, vae=sd1 / "text_encoder")
    assert f"its pipeline may be {sd1}" in refused(load_pipeline, sd1 / "unet")
    assert f"give its folder, {sd1}" in refused(load_pipeline, sd1 / "model_index.json")
    assert "is no model" in refused(load_pipeline, sd1 / "tokenizer/merges.txt")


def test_of_a_folder_that_is_no_model_what_is_in_it_is_named(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/kd"
    shutil.copytree(sources["sd1"], run / "student")
    (run / "checkpoints").mkdir()
    (run / "config.json").write_text('{"teacher": "miniature", "steps": 6}')
    assert f"give {run / 'student'}" in refused(find_model, run)
    assert f"give {run / 'student'}" in refused(load_pipeline, run)
    assert "give runs/kd/student" in refused(load_pipeline, "runs/kd")
    (tmp_path / "owner/name").mkdir(parents=True)
    assert "rename or remove it if the model owner/name on the Hub is meant" in refused(load_pipeline, "owner/name")
    (run / "student").rename(tmp_path / "owner/half")
    load_pipeline("owner/half")
    (tmp_path / "owner/half" / UNET).unlink()
    message = refused(load_pipeline, "owner/half")
    assert "lacks unet/weights" in message and "on the Hub is meant" in message


def test_a_folder_of_one_file_is_that_file_as_on_the_hub(sources, tmp_path):
    pipe = load_pipeline(sources["sd1"])
    add_lora(pipe.unet, ATTENTION, rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    write_lora(tmp_path / "lora/lora.safetensors", {"unet": pipe.unet})
    edited(sources["sd1"], loras=[(tmp_path / "lora", 1.0)])
    write_lora(tmp_path / "lora/other.safetensors", {"unet": pipe.unet})
    assert "other.safetensors" in refused(edited, sources["sd1"], loras=[(tmp_path / "lora", 1.0)])
