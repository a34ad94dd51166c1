"""Any SOURCE to a pipeline, parts replaced in it, and `convert`, there and back: always the same images."""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pipeline import change_json, levels, load_oracle, refused, run_generate
from test_sdxl import noise, oracle_of
from tiny import PROMPTS

from minidistill import convert
from minidistill.cli import run_command
from minidistill.diffusion.sampling import Sampling, sampling_metadata
from minidistill.interop.lora_files import write_lora
from minidistill.interop.replace import merge_loras, replace_unet, replace_vae
from minidistill.interop.single_file import write_single_file
from minidistill.models.lora import ALL, ATTENTION, LoRAWeights, add_lora, find_targets
from minidistill.models.taesd import AutoencoderTiny
from minidistill.pipeline import load_pipeline
from minidistill.weights.files import read_metadata
from minidistill.weights.folders import find_model

pytestmark = pytest.mark.usefixtures("one_thread")

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
    for path in [*one.rglob("*.json"), *other.rglob("*.json")]:
        name = path.relative_to(one if path.is_relative_to(one) else other)
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())


def test_the_miniature_goes_through_a_single_file_in_its_own_precision_and_another_on_request(tmp_path):
    assert run_convert("miniature", tmp_path / "full", "--dtype", "fp32") == 0
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "full").values()} == {torch.float32}
    assert run_convert("miniature", tmp_path / "m.safetensors") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "m.safetensors").values()} == {torch.float16}
    load_pipeline("miniature", dtype=None, vae_dtype=None).save(tmp_path / "one")
    load_pipeline(tmp_path / "m.safetensors", dtype=None, vae_dtype=None).save(tmp_path / "other")
    assert_same_folders(tmp_path / "one", tmp_path / "other")


def test_a_single_file_without_a_vocabulary_takes_the_one_beside_it(sources, files, tmp_path):
    shutil.copytree(sources["sd1"] / "tokenizer", tmp_path / "tokenizer")
    for kind in ("sd1", "sd2"):
        metadata = {k: v for k, v in read_metadata(files[kind]).items() if k != "minidistill.tokenizers"}
        save_file(load_file(files[kind]), tmp_path / f"{kind}.safetensors", metadata)
        found, expected = load_pipeline(tmp_path / f"{kind}.safetensors"), load_pipeline(sources[kind])
        assert [t.pad for t in found.tokenizers] == [t.pad for t in expected.tokenizers]
        assert found.tokenizers[0].merges == expected.tokenizers[0].merges


def edited(source, unet=None, vae=None, loras=(), ema=False, dtype=torch.float32):
    """A pipeline after the steps of `interop.replace`, with no network read from disk that is replaced."""
    pipe = load_pipeline(source, dtype=dtype, without=[*["unet"][: bool(unet)], *["vae"][: bool(vae)]])
    if unet:
        replace_unet(pipe, unet, dtype, ema)
    if vae:
        replace_vae(pipe, vae)
    merge_loras(pipe, loras)
    return pipe


def test_another_unet_replaces_that_of_a_model_which_is_not_read(sources, files, tmp_path):
    other, file = altered(sources["sd1"], tmp_path / "other"), tmp_path / "other.safetensors"
    assert run_convert(other, file) == 0
    copy = shutil.copytree(sources["sd1"], tmp_path / "copy")
    (copy / UNET).unlink()
    expected = load_pipeline(other)(PROMPTS, **SETTINGS)
    for base, source in ((sources["sd1"], other), (copy, other / "unet"), (files["sd1"], file)):
        assert same(edited(base, unet=source)(PROMPTS, **SETTINGS), expected), source
        assert all(weight.is_meta for weight in load_pipeline(base, without=("unet",)).unet.parameters())
    assert not same(load_pipeline(sources["sd1"])(PROMPTS, **SETTINGS), expected)


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


def test_another_unet_brings_what_it_predicts(sources, velocity, tmp_path, capsys):
    whole = load_pipeline(velocity["folder"])
    expected = whole(PROMPTS, **SETTINGS)
    for kind, source in velocity.items():
        pipe = edited(sources["sdxl"], unet=source)
        assert pipe.schedule == whole.schedule and same(pipe(PROMPTS, **SETTINGS), expected), kind
    assert "--unet" in refused(load_pipeline, velocity["unet alone"]), "alone it makes no images"
    assert run_convert(velocity["unet alone"], tmp_path / "new") == 0
    assert "v_prediction" in capsys.readouterr().err, "a folder has no place for it"


def test_settings_survive_conversion(sources, tmp_path):
    pipe = load_pipeline(sources["sdxl"])
    pipe.sampling = Sampling(1, prediction="sample")
    pipe.save(tmp_path / "folder")
    assert run_convert(tmp_path / "folder", tmp_path / "one.safetensors") == 0
    assert run_convert(tmp_path / "one.safetensors", tmp_path / "again") == 0
    found = load_pipeline(tmp_path / "again")
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


def test_convert_touches_nothing_that_is_there(sources, files, tmp_path, capsys):
    before = files["sd1"].read_bytes()
    assert run_convert(sources["sd1"], files["sd1"]) == 2
    assert "exists" in capsys.readouterr().err and files["sd1"].read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    assert run_convert(sources["sd1"], tmp_path / "full") == 2
    assert run_convert(sources["sd1"], tmp_path / "name.ckpt", "--layout", "single-file") == 2
    assert ".safetensors" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_part_or_a_file_of_a_model_given_for_another_is_told_apart(sources):
    sd1 = sources["sd1"]
    assert "it is a AutoencoderKL (give it as --vae)" in refused(edited, sd1, unet=sd1 / "vae")
    assert "--unet" in refused(edited, sd1, vae=sd1 / "unet")
    assert "CLIPTextModel" in refused(edited, sd1, vae=sd1 / "text_encoder")
    assert f"its pipeline may be {sd1}" in refused(load_pipeline, sd1 / "unet")
    assert f"give its folder, {sd1}" in refused(load_pipeline, sd1 / "model_index.json")
    assert "is no model" in refused(load_pipeline, sd1 / "tokenizer/merges.txt")
    assert "not a model folder: it has no model_index.json, only scheduler_config.json" in refused(
        load_pipeline, sd1 / "scheduler"
    )


def test_a_checkpoint_of_diffusers_scripts_is_for_unet(sources, tmp_path):
    shutil.copytree(sources["sd1"] / "unet", tmp_path / "checkpoint-500/unet")
    assert refused(load_pipeline, tmp_path / "checkpoint-500").endswith("(its unet/ is for --unet)")
    edited(sources["sd1"], unet=tmp_path / "checkpoint-500")


def test_a_vae_of_another_kind_of_model_is_warned_of(sources, tmp_path):
    pipe = load_pipeline(sources["sd1"])
    pipe.vae.config = replace(pipe.vae.config, scaling_factor=0.13025)
    pipe.save(tmp_path)
    with pytest.warns(UserWarning, match="scaled by 0.13025, this model's are scaled by 0.18215: it is of another"):
        edited(sources["sd1"], vae=tmp_path)


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


# SDXL-Lightning's files in the forms they are published in, float16, random and with few layers:
#     sdxl_lightning_4step_unet.safetensors      a U-Net in diffusers' names, for the place of SDXL's
#     sdxl_lightning_4step_lora.safetensors      a LoRA in kohya's names with diffusers' blocks: rank 64, alpha 8
#     sdxl_lightning_4step.safetensors           a whole model in sgm's names
#     sdxl_lightning_1step_unet_x0.safetensors   a U-Net that puts out x0; 1step_x0 is the whole model with it
NAME = "sdxl_lightning_{}.safetensors"
RANK, ALPHA = 64, 8.0
SIZE = 32  # pixels; the latents' is a quarter of that
AS_MADE = ["--steps", "4", "--sampler", "euler", "--spacing", "trailing", "--guidance", "0"]
MADE_FOR = "this model is made for 4 steps of euler with trailing timesteps, guidance off; you ask for "


@pytest.fixture(scope="module")
def lightning(sources, tmp_path_factory):
    """base/ is the pipeline folder; beside it lie the files, and the noise.safetensors all start from."""
    folder = tmp_path_factory.mktemp("lightning")
    assert run_convert(sources["sdxl"], folder / "base", "--dtype", "fp16") == 0
    pipe, lora = load_pipeline(folder / "base", dtype=None, vae_dtype=None), {}
    torch.manual_seed(0)
    for name in find_targets(pipe.unet, ALL):
        out, into, *kernel = pipe.unet.get_submodule(name).weight.shape
        down, up = torch.randn(RANK, into, *kernel), torch.randn(out, RANK, *[1 for _ in kernel])
        lora[name] = LoRAWeights(0.3 * down, 0.1 * up, ALPHA)
    write_lora(folder / NAME.format("4step_lora"), {"unet": lora}, dtype=torch.float16)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    whole = folder / NAME.format("4step")
    write_single_file(whole, pipe)
    # The sizes, in place of those that all SDXLs have; nothing on sampling
    header = {key: text for key, text in read_metadata(whole).items() if "config" in key or "tokenizers" in key}
    for name in ("4step_unet", "1step_unet_x0"):
        save_file(pipe.unet.state_dict(), folder / NAME.format(name), header)
    tensors = {name: tensor.clone() for name, tensor in load_file(whole).items()}
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6).half()
    for name in ("4step", "1step_x0"):
        save_file(tensors, folder / NAME.format(name), header)
    save_file({"latents": torch.randn(1, 4, SIZE // 4, SIZE // 4)}, folder / "noise.safetensors")
    return folder


def draw(folder, form: str, *words: str) -> np.ndarray:
    """The image of the command for the U-Net, the LoRA, the whole file or the folder alone: (1, H, W, 3)."""
    file, base = str(folder / NAME.format(form)), ["--model", str(folder / "base")]
    model = {"base": base, "unet": [*base, "--unet", file], "lora": [*base, "--lora", file], "whole": ["--model", file]}
    kind = next((kind for kind in ("base", "unet", "lora") if kind in form), "whole")
    out = folder / "image.png"
    common = ["--prompt", PROMPTS[0], "--latents", str(folder / "noise.safetensors"), "--out", str(out)]
    assert run_generate(*model[kind], *common, *words) == 0
    return levels([Image.open(out)])


def draw_oracle(folder, form: str, steps: int, **scheduler: str) -> np.ndarray:
    """The same of diffusers, by the lines on SDXL-Lightning's model card."""
    pipe = oracle_of(folder / "base").to(torch.float32)
    file = folder / NAME.format(form)
    if "lora" in form:
        pipe.load_lora_weights(str(folder), weight_name=file.name)
        pipe.fuse_lora()
    else:
        pipe.unet.load_state_dict(load_file(file))
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", **scheduler
    )
    latents = load_file(folder / "noise.safetensors")["latents"]
    settings = {"num_inference_steps": steps, "guidance_scale": 0, "height": SIZE, "width": SIZE}
    return levels(pipe(PROMPTS[0], latents=latents, **settings).images)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return np.abs(one - other).max()


def test_the_unet_and_the_whole_file_draw_one_image_and_diffusers_the_same(lightning, recwarn):
    unet, whole = draw(lightning, "4step_unet"), draw(lightning, "4step")
    assert np.array_equal(unet, whole)
    assert difference(unet, draw_oracle(lightning, "4step_unet", 4)) <= 2
    assert np.array_equal(draw(lightning, "4step_unet", *AS_MADE), unet)
    assert not [warning for warning in recwarn if "made for" in str(warning.message)]
    assert difference(draw(lightning, "base", *AS_MADE), unet) > 20, "the file's weights must be seen in its image"


def test_the_lora_draws_what_it_draws_in_diffusers(lightning, capsys):
    lora = draw(lightning, "4step_lora")
    count = len(load_file(lightning / NAME.format("4step_lora"))) // 3
    assert f"4step_lora.safetensors: {count}/{count} modules matched" in capsys.readouterr().err
    assert difference(lora, draw_oracle(lightning, "4step_lora", 4)) <= 2
    assert difference(draw(lightning, "base", *AS_MADE), lora) > 20


def test_the_files_of_one_step_put_out_the_image_itself(lightning):
    found = draw(lightning, "1step_unet_x0")
    assert np.array_equal(found, draw(lightning, "1step_x0"))
    assert difference(found, draw_oracle(lightning, "1step_unet_x0", 1, prediction_type="sample")) <= 2
    assert difference(found, draw_oracle(lightning, "1step_unet_x0", 1)) > 20, "read as noise it is another image"


def test_a_flag_against_the_file_is_warned_of_once(lightning, recwarn):
    for form, words, asked in (
        ("4step_lora", "--guidance 7.5", "4 steps of euler with trailing timesteps, guidance 7.5"),
        ("4step_unet", "--steps 5 --guidance 3 --sampler ddim", "5 steps of ddim with trailing timesteps, guidance 3"),
    ):
        recwarn.clear()
        draw(lightning, form, *words.split())
        assert [str(warning.message) for warning in recwarn] == [MADE_FOR + asked + ": expect poor images"]
