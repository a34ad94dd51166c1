"""The whole way from a pipeline folder and a prompt to images and back to a folder, against diffusers.

Tiny pipelines with seeded random weights, saved by diffusers, are loaded here; the images from equal noise
must be diffusers' own to 2 levels of 255, and diffusers must read what we save. Broken folders are refused.
"""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import PROMPTS, SCHEDULERS, TOKENS, apart, levels, load_oracle, noise

import minidistill
from minidistill import generate
from minidistill.cli import run_command
from minidistill.errors import InputError
from minidistill.pipeline import _to_image, load_pipeline
from minidistill.weights import folders


@pytest.fixture
def copy(sources, tmp_path):
    """A copy of the SD 1.x folder, to be changed."""
    return shutil.copytree(sources["sd1"], tmp_path / "copy")


def change_json(path, **changes) -> None:
    """Set keys of a json file; a key set to None is removed."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def bad_value(file, *said, **change) -> tuple:
    """A case of BREAKS: a config with another value, which the message names beside the file."""
    return lambda f: change_json(f / file, **change), [file, *said]


def refused(call, *args, **kwargs) -> str:
    """The message of the InputError that a call ends in; it must be one line."""
    with pytest.raises(InputError) as info:
        call(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


# the same images as diffusers


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_images_of_every_spacing_are_those_of_diffusers(sources, kind):
    """Leading steps, guidance and all kinds of models are in test_pipeline_parity.py."""
    oracle, pipe, negatives = load_oracle(sources[kind]), load_pipeline(sources[kind]), ["", "a green ring"]
    config, settings = oracle.scheduler.config, {"latents": noise(), "steps": 5, "guidance": 7.5}
    for sampler, spacing in (("ddim", "trailing"), ("euler", "trailing"), ("euler", "linspace")):
        oracle.scheduler = SCHEDULERS[sampler].from_config(config, timestep_spacing=spacing)
        asked = {"negative_prompt": negatives, "num_inference_steps": 5, "guidance_scale": 7.5}
        expected = oracle(PROMPTS, latents=noise(), **asked).images
        found, usual = (pipe(PROMPTS, negatives, sampler=sampler, spacing=s, **settings) for s in (spacing, "leading"))
        assert levels(expected).std() > 20, "the oracle's images must show something"
        assert max(apart(found, expected)) <= 2, (sampler, spacing)
        assert max(apart(found, usual)) > 20, "the spacing must matter"


# folders that we write


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_reads_a_saved_folder_and_makes_the_same_images(sources, tmp_path, kind):
    settings = {"latents": noise(), "num_inference_steps": 3, "height": 32, "width": 32}
    expected = levels(load_oracle(sources[kind])(PROMPTS, **settings).images)
    load_pipeline(sources[kind]).save(tmp_path / "saved")
    again = load_oracle(tmp_path / "saved")
    assert type(again.scheduler) is SCHEDULERS["euler" if kind == "sdxl" else "ddim"]
    assert again.unet.config.sample_size == 8
    if kind == "sdxl":
        assert again.config.force_zeros_for_empty_prompt is True
    else:
        assert again.safety_checker is None
    assert (levels(again(PROMPTS, **settings).images) == expected).all()


def test_a_saved_folder_loads_to_the_same_bits(sources, tmp_path):
    pipe = load_pipeline(sources["sd2"])
    pipe.save(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.schedule == pipe.schedule
    for part in ("unet", "vae"):
        one, other = getattr(pipe, part), getattr(again, part)
        assert one.config == other.config
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    one, other = (p(PROMPTS, steps=2, output="latents") for p in (pipe, again))
    assert torch.equal(one, other)


def test_a_folder_of_an_image_to_image_pipeline_is_the_same_model(sources, copy):
    change_json(copy / INDEX, _class_name="StableDiffusionImg2ImgPipeline")
    load_pipeline(copy).save(copy)
    assert json.loads((copy / INDEX).read_text())["_class_name"] == "StableDiffusionPipeline"


def test_saving_to_a_closed_folder_is_refused_and_home_is_expanded(copy, tmp_path, monkeypatch):
    pipe = load_pipeline(copy)
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe.save("~/saved")
    assert (tmp_path / "saved" / INDEX).is_file()

    def unlink(path):  # which chmod does not do to root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    assert refused(pipe.save, copy) == f"cannot write {copy}: Permission denied"


def test_saving_over_a_folder_replaces_it_but_never_leaves_other_weights_beside(copy):
    pipe = load_pipeline(copy)
    with torch.no_grad():
        pipe.unet.conv_in.weight.zero_()
    pipe.save(copy)
    assert load_pipeline(copy).unet.conv_in.weight.abs().sum() == 0
    shutil.copy(
        copy / "unet/diffusion_pytorch_model.safetensors",
        copy / "unet/diffusion_pytorch_model.fp16.safetensors",
    )
    assert "is a file, not a folder" in refused(pipe.save, copy / UNET)
    message = refused(pipe.save, copy)
    assert "diffusion_pytorch_model.fp16.safetensors" in message
    assert not (copy / "model_index.json").exists(), "a folder that was not finished must not look finished"


# folders that others wrote


def test_a_folder_in_the_spelling_of_2022_is_the_same_pipeline(sources, copy):
    """SD 1.5 as it lies on the hub: few keys in the configs, a PNDM scheduler, old names in the weights."""
    keep = ["sample_size", "block_out_channels", "down_block_types", "up_block_types", "layers_per_block"]
    keep += ["cross_attention_dim", "norm_num_groups", "attention_head_dim", "norm_eps", "act_fn"]
    for part, names in (("unet", keep), ("vae", [*keep, "latent_channels"])):
        config = json.loads((copy / part / "config.json").read_text())
        minimal = {name: config[name] for name in names if name in config}
        (copy / part / "config.json").write_text(json.dumps({"_diffusers_version": "0.6.0", **minimal}))
    old_scheduler = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    old_scheduler |= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "skip_prk_steps": True}
    old_scheduler |= {"set_alpha_to_one": False, "trained_betas": None, "clip_sample": False}
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(old_scheduler))

    text = load_file(copy / "text_encoder/model.safetensors")
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    save_file(text, copy / "text_encoder/model.safetensors")
    vae = {}
    for name, tensor in load_file(copy / "vae/diffusion_pytorch_model.safetensors").items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")  # noqa: PLW2901
        vae[name] = tensor
    assert sum("query" in name for name in vae) == 4
    save_file(vae, copy / "vae/diffusion_pytorch_model.safetensors")

    expected = levels(load_pipeline(sources["sd1"])(PROMPTS, steps=3))
    assert (levels(load_pipeline(copy)(PROMPTS, steps=3)) == expected).all()


def unet_files(folder) -> tuple:
    return folder / "unet", load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def test_sharded_and_pickled_weights_are_read(sources, copy):
    expected = load_pipeline(sources["sd1"]).unet.state_dict()
    folder, tensors = unet_files(copy)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    found = folders.load_unet(copy).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] + 1 for name in tensors if weight_map[name] == shard}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = folders.load_unet(copy).state_dict()
    assert all(torch.equal(found[name], expected[name] + 1) for name in expected), "safetensors come before .bin"

    (folder / "part-1.safetensors").unlink()
    assert "part-1.safetensors" in refused(folders.load_unet, copy)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "outside" in refused(folders.load_unet, copy)


def test_float16_files_are_taken_for_float16_and_only_then_without_a_word(copy):
    folder, tensors = unet_files(copy)
    half = {name: (tensor * 2).half() for name, tensor in tensors.items()}
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(folders.load_unet(copy, torch.float16).conv_in.weight, half["conv_in.weight"])
        assert torch.equal(folders.load_unet(copy).conv_in.weight, tensors["conv_in.weight"])
        full = tensors["conv_in.weight"].bfloat16()
        assert torch.equal(folders.load_unet(copy, torch.bfloat16).conv_in.weight, full)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="is all there is"):
        unet = folders.load_unet(copy)
    assert torch.equal(unet.conv_in.weight, half["conv_in.weight"].float())


def test_unet_and_text_encoder_take_the_asked_dtype_and_the_vae_stays_float32(sources):
    pipe = load_pipeline(sources["sd1"], dtype=torch.bfloat16)
    dtypes = [{p.dtype for p in part.parameters()} for part in (pipe.unet, pipe.text_encoders[0], pipe.vae)]
    assert dtypes == [{torch.bfloat16}, {torch.bfloat16}, {torch.float32}]
    exact = load_pipeline(sources["sd1"])(PROMPTS, steps=2, guidance=2, output="latents")
    close = pipe(PROMPTS, steps=2, guidance=2, output="latents")
    assert close.dtype == torch.float32
    assert 0 < (close - exact).std() < 0.1 * exact.std()


# a sample depends on its seed and index alone


def test_images_do_not_depend_on_the_batch_size_or_on_how_calls_are_split(sources):
    pipe = load_pipeline(sources["sd1"])
    prompts = [PROMPTS[i % 2] for i in range(5)]
    negatives = ["", "a ring", "green", "", "blue squares"]
    settings = {"steps": 3, "seed": 3}
    whole = pipe(prompts, negatives, batch_size=5, **settings)
    assert apart(whole[:1], whole[2:3])[0] > 5, "equal prompts have different noise"
    for batch_size in (1, 2):
        assert max(apart(pipe(prompts, negatives, batch_size=batch_size, **settings), whole)) <= 1
    parts = pipe(prompts[:2], negatives[:2], **settings)
    parts += pipe(prompts[2:], negatives[2:], first_index=2, **settings)
    assert max(apart(parts, whole)) <= 1


def test_levels_are_rounded_not_cut():
    image = (torch.tensor([0.0, 0.4, 0.6, 127.4, 127.6, 254.6, 300.0, -9.0]) / 127.5 - 1).reshape(1, 2, 4)
    found = np.asarray(_to_image(image.expand(3, 2, 4)))
    assert found[..., 0].flatten().tolist() == [0, 0, 1, 127, 128, 255, 255, 0]


# refusals


def test_a_sample_that_is_not_finite_is_named(sources):
    pipe = load_pipeline(sources["sd1"])
    latents = noise(3)
    poisoned = pipe([PROMPTS[0]] * 3, latents=latents, steps=1, output="latents")
    poisoned[1, 0, 0, 0] = torch.inf
    assert "image 1 is not finite" in refused(pipe.decode, poisoned, batch_size=1)
    (token,) = pipe.tokenizers[0].encode("squares")
    with torch.no_grad():
        pipe.text_encoders[0].text_model.embeddings.token_embedding.weight[token] = torch.nan
    message = refused(pipe, [PROMPTS[0], PROMPTS[1]], steps=1, batch_size=1)
    assert "sample 1" in message and PROMPTS[1] in message and "float32" in message


def photo(width: int = 32, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": "5"}, "steps must be an integer of 1 or more, not '5'"),
        ({"guidance": "7.5"}, "guidance must be a finite number, not '7.5'"),
        ({"guidance": torch.tensor(7.5)}, "guidance must be a finite number, not tensor(7.5000)"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"seed": torch.zeros(2, 2)}, "seed must be an integer, not tensor([[0., 0.], [0., 0.]])"),
        ({"sampler": "plms"}, "ddim, euler"),
        ({"spacing": "even"}, "spacing"),
        ({"height": 30}, "multiples of 4"),
        ({"width": -8}, "multiples of 4"),
        ({"height": "64"}, "height must be an integer"),
        ({"seed": None}, "seed must be an integer"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"batch_size": 0}, "batch size"),
        ({"negative_prompts": ["a", "b", "c"]}, "3 negative prompts for 2"),
        ({"negative_prompts": 3}, "negative prompts must be text"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "(2, 4, h, w)"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, "(2, 4, h, w)"),
        ({"latents": torch.zeros(2, 4, 8, 8), "height": 64}, "leave out height"),
        ({"latents": torch.zeros(2, 4, 0, 8)}, "(2, 4, h, w)"),
        ({"latents": torch.full((2, 4, 8, 8), torch.nan)}, "not finite"),
        ({"latents": [[0.0]]}, "latents must be a Tensor"),
        ({"image": "photo.png"}, "images must be PIL images"),
        ({"image": photo().convert("RGBA")}, "images must be RGB, not RGBA: use"),
        ({"image": photo(30)}, "multiples of 4"),
        ({"image": [photo(), photo(64)]}, "same size"),
        ({"image": [photo()] * 3}, "3 images for 2"),
        ({"image": photo(), "height": 64}, "leave out height"),
        *(({"image": photo(), "strength": strength}, "strength") for strength in (0, -1, 1.5, 0.01, "0.5")),
    ],
)
def test_settings_that_do_not_fit_are_refused(sources, settings, reason):
    assert reason in refused(load_pipeline(sources["sd1"]), PROMPTS, **settings)


def test_each_step_of_a_call_takes_what_people_give_or_says_what_it_needs(sources):
    pipe = load_pipeline(sources["sd1"])
    same = pipe(PROMPTS, steps=np.int64(2), guidance=np.float32(7.5), output="latents")
    assert torch.equal(same, pipe(PROMPTS, steps=2, output="latents"))
    assert len(pipe.encode_prompts(PROMPTS[0]).context) == 1  # not one for each letter
    assert "prompts must be text" in refused(pipe.encode_prompts, [5])
    for latents, shape in ((same[0], "(4, 8, 8)"), (same[:, :3], "(2, 3, 8, 8)"), (same.numpy(), "ndarray")):
        assert refused(pipe.decode, latents).endswith(f"must be a Tensor (B, 4, h, w), not {shape}")


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def with_tensor(path, name: str, tensor) -> None:
    """Rewrite a weights file with one tensor replaced, added, or (None) left out."""
    tensors = load_file(path) | {name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
BREAKS = {
    "no index": (lambda f: (f / INDEX).unlink(), ["not a pipeline folder"]),
    "half an SDXL": (
        lambda f: change_json(f / INDEX, _class_name="StableDiffusionXLPipeline"),
        ["no folder text_encoder_2/"],
    ),
    "other model": (lambda f: change_json(f / INDEX, _class_name="FluxPipeline"), ["FluxPipeline"]),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), ["no folder unet/"]),
    "no weights": (
        lambda f: (f / UNET).rename(f / UNET.replace(".safe", ".non_ema.safe")),
        ["no weights in", "unet", ", not config.json, diffusion_pytorch_model.non_ema.safetensors"],
    ),
    "no config": (lambda f: (f / "vae/config.json").unlink(), ["no such file", "vae/config.json"]),
    "cut weights": (lambda f: cut(f / VAE), [VAE, "cut short"]),
    "wider config": (
        lambda f: change_json(f / "unet/config.json", block_out_channels=[16, 64]),
        [UNET, "have another shape", "(32, 16, 3, 3) in the file, (64, 16, 3, 3) by the config"],
    ),
    "pruned config": (
        lambda f: change_json(f / "unet/config.json", layers_per_block=2),
        [UNET, "are missing", "down_blocks.0.resnets.1."],
    ),
    "unknown setting": bad_value(
        "unet/config.json", "resnet_time_scale_shift", resnet_time_scale_shift="scale_shift"
    ),
    "missing tensor": (lambda f: with_tensor(f / UNET, "conv_in.bias", None), [UNET, "1 of", "conv_in.bias"]),
    "extra tensor": (lambda f: with_tensor(f / VAE, "extra", torch.ones(1)), [VAE, "not expected (extra)"]),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ["no folder tokenizer/"]),
    "cut vocabulary": (lambda f: cut(f / "tokenizer/vocab.json"), ["tokenizer"]),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), ["no folder scheduler/"]),
    "flow scheduler": bad_value(SCHEDULER, "FlowMatch", _class_name="FlowMatchEulerDiscreteScheduler"),
    "no groups": bad_value("unet/config.json", norm_num_groups=0),
    "endless layers": bad_value("unet/config.json", "layers, more than 1000", layers_per_block=10**12),
    "endless transformers": bad_value(
        "unet/config.json", "transformer blocks, more than 1000", transformer_layers_per_block=10**6
    ),
    "endless encoder": bad_value("text_encoder/config.json", "num_hidden_layers = 1000000000", num_hidden_layers=10**9),
    "endless VAE": bad_value("vae/config.json", "layers_per_block = 1000000", layers_per_block=10**6),
    "width of no model": bad_value("text_encoder/config.json", "intermediate_size", intermediate_size=10**18),
    "a list for a number": bad_value("text_encoder/config.json", "layer_norm_eps = [1e-05]", layer_norm_eps=[1e-5]),
    "not a number": bad_value("vae/config.json", "scaling_factor = nan", scaling_factor=float("nan")),
    "a number for a class": bad_value("text_encoder/config.json", architectures=5),
    "a list of schedulers": bad_value(SCHEDULER, "is no name", _class_name=["DDIMScheduler"]),
    "endless schedule": bad_value(SCHEDULER, "num_train_timesteps = 1000000000000", num_train_timesteps=10**12),
    "an id that is none": (lambda f: change_json(f / "tokenizer/vocab.json", a="x"), ["cannot read the tokenizer"]),
    "no length": (
        lambda f: change_json(f / "tokenizer/tokenizer_config.json", model_max_length="long"),
        ["cannot read the tokenizer"],
    ),
    "no groups in the VAE": bad_value("vae/config.json", norm_num_groups=0),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_folder_is_refused_with_the_place_and_the_reason(copy, case):
    break_it, reasons = BREAKS[case]
    break_it(copy)
    message = refused(load_pipeline, copy)
    assert all(reason in message for reason in [str(copy), *reasons]), message


def test_parts_of_different_models_are_refused(copy, sources, tmp_path):
    change_json(copy / "unet/config.json", cross_attention_dim=20)
    for name, tensor in load_file(copy / UNET).items():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            with_tensor(copy / UNET, name, tensor[:, :20].clone())
    message = refused(load_pipeline, copy)
    assert "20" in message and "24" in message and "different models" in message
    shutil.copytree(sources["sd1"] / "unet", copy / "unet", dirs_exist_ok=True)
    change_json(copy / "tokenizer/vocab.json", more=10**6)
    assert "the tokenizer's ids go up to 1000000, the text encoder knows 547 tokens" in refused(load_pipeline, copy)
    load_pipeline(sources["sdxl"]).save(tmp_path)
    change_json(tmp_path / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "needs 2 text encoder(s), there are 1" in refused(load_pipeline, tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "fp16"}, "torch.float16"),
        ({"vae_dtype": "float32"}, "torch.float16"),
        ({"dtype": torch.int8}, "not torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, "not torch.float8_e4m3fn"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"source": None}, "a SOURCE is text or a Path"),
        ({"source": "nowhere"}, "no such file or folder: nowhere"),
    ],
)
def test_what_no_pipeline_can_be_loaded_with_is_refused(sources, options, reason):
    assert reason in refused(load_pipeline, **{"source": sources["sd1"], **options})
    assert "carries no config" in refused(load_pipeline, sources["sd1"] / UNET)


# the command


@pytest.fixture
def miniature(sources, monkeypatch, tmp_path):
    """The tiny pipeline in the place of the embedded one, and a working folder of our own."""
    monkeypatch.setitem(folders.SHIPPED, "miniature", sources["sd1"])
    monkeypatch.chdir(tmp_path)
    return sources["sd1"]


def run_generate(*words: str) -> int:
    with pytest.raises(SystemExit) as info:
        run_command(generate.generate, generate.GenerateConfig, prog="generate", argv=["--device", "cpu", *words])
    return info.value.code


def test_generate_without_flags_writes_an_image_and_prints_its_path(miniature, tmp_path, capsys):
    assert run_generate() == 0
    assert capsys.readouterr().out == "generated.png\n"
    expected = load_pipeline(miniature)(generate.GenerateConfig().prompt)
    assert (levels([Image.open("generated.png")]) == levels(expected)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["generated.png"]


def test_generate_takes_latents_and_every_setting(miniature):
    save_file({"latents": noise()}, "noise.safetensors")
    words = "--prompt ring --negative-prompt red --steps 3 --sampler euler --spacing trailing --guidance 3"
    assert run_generate(*words.split(), "--latents", "noise.safetensors", "--out", "new/row.png") == 0
    settings = {"steps": 3, "sampler": "euler", "spacing": "trailing", "guidance": 3.0, "latents": noise()}
    expected = load_pipeline(miniature)(["ring"] * 2, "red", **settings)
    assert (levels([Image.open("new/row.png")])[0] == np.concatenate(levels(expected), axis=1)).all()
    assert run_generate("--steps", "2", "--height", "16", "--width", "40", "--seed", "9", "--out", "a.png") == 0
    expected = load_pipeline(miniature)(generate.GenerateConfig().prompt, steps=2, height=16, width=40, seed=9)
    assert apart([Image.open("a.png")], expected) == [0]


def test_generate_says_when_a_prompt_is_cut(miniature, capsys):
    assert run_generate("--steps", "1", "--prompt", "red " * 40) == 0
    error = capsys.readouterr().err
    assert "40 tokens" in error and "first 30" in error


def test_generate_runs_as_a_module(sources, tmp_path):
    command = [sys.executable, "-m", "minidistill.generate", "--model", str(sources["sd2"]), "--steps", "1"]
    command += ["--device", "cpu", "--out", str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path / "a.png"), "")
    assert Image.open(tmp_path / "a.png").size == (32, 32)


def test_the_package_offers_its_pipeline_without_loading_torch_first():
    code = "import sys, minidistill; assert {'Pipeline', 'load_pipeline'} <= set(dir(minidistill))"
    code += "; assert 'torch' not in sys.modules; print(minidistill.__version__)"
    code += "; minidistill.load_pipeline; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == minidistill.__version__
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = minidistill.nothing_like_this
