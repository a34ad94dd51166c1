"""`generate`, as it is run: every flag that changes a model or starts from something else, and the bar.

The flags of the sampling itself, bad input and broken folders are in test_pipeline.py.
"""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import enable_progress_bars
from PIL import Image
from runs import one_line
from safetensors.torch import load_file, save_file
from test_convert import parts  # noqa: F401 (a fixture)
from test_pipeline import change_json, levels, noise, run_generate
from test_sources import altered, edited

from minidistill import generate
from minidistill.diffusion.sampling import Sampling, sampling_metadata
from minidistill.errors import InputError
from minidistill.interop.lora_files import write_lora
from minidistill.models.lora import ALL, add_lora, lora_layers
from minidistill.pipeline import load_pipeline
from minidistill.weights.folders import SHIPPED, save_unet

PROMPT = "a red circle"


@pytest.fixture
def run(sources, tmp_path, monkeypatch):
    """Runs generate on the SD 1.x of `sources`, in 2 steps: (the images in the file, the pipeline it used)."""
    used = []

    def remembered(*args, **kwargs):
        used.append(load_pipeline(*args, **kwargs))
        return used[-1]

    monkeypatch.setattr(generate, "load_pipeline", remembered)

    def call(*words, steps: int = 2) -> tuple[np.ndarray, object]:
        out = tmp_path / "out.png"
        given = ["--model", sources["sd1"], "--prompt", PROMPT, "--steps", steps, "--out", out, *words]
        assert run_generate(*map(str, given)) == 0
        return levels([Image.open(out)])[0], used[-1]

    return call


def row(images) -> np.ndarray:
    """Images side by side, as the file has them."""
    return np.concatenate(levels(images), axis=1)


def test_loras_are_merged_each_at_its_scale(run, sources, parts, capsys):  # noqa: F811
    style, pose = parts["style"], parts["pose"]
    asked = {
        ("--lora", style): [(style, 1.0)],
        ("--lora", style, "--lora-scale", "0.5"): [(style, 0.5)],
        ("--lora", f"{style},{pose}", "--lora-scale", "0.5,-0.5"): [(style, 0.5), (pose, -0.5)],
        ("--lora", f"{style},{pose}", "--lora-scale", "0.5"): [(style, 0.5), (pose, 0.5)],
    }
    seen = [run()[0]]
    for words, loras in asked.items():
        found, _ = run(*words)
        assert (found == row(edited(sources["sd1"], loras=loras)(PROMPT, steps=2))).all()
        assert not any((found == other).all() for other in seen)
        seen.append(found)
    assert capsys.readouterr().err.count("40/40 modules matched") == 2 * 6  # here, and in `run`


@pytest.fixture
def shipped(sources, tmp_path, monkeypatch):
    """A model as it is shipped, by the name miniature, with a LoRA for 2 steps and a U-Net for 1."""
    folder = shutil.copytree(sources["sd1"], tmp_path / "shipped")
    monkeypatch.setitem(SHIPPED, "miniature", folder)
    unet = load_pipeline(folder).unet
    save_unet(folder / "lightning", unet, sampling_metadata(Sampling(1, prediction="sample")), "1-step-x0")
    add_lora(unet, ALL, 2, generator=torch.Generator().manual_seed(0))
    for layer in lora_layers(unet).values():
        torch.nn.init.normal_(layer.lora_up, std=0.1)
    write_lora(folder / "lightning/2-step.safetensors", {"unet": unet}, metadata=sampling_metadata(Sampling(2)))
    return folder


def test_a_shipped_student_is_taken_by_its_number_of_steps(shipped, parts, tmp_path, capsys):  # noqa: F811
    def image(*words) -> np.ndarray:
        out = tmp_path / "out.png"
        assert run_generate("--prompt", PROMPT, "--out", str(out), *map(str, words)) == 0
        assert "expect poor images" not in capsys.readouterr().err
        return levels([Image.open(out)])[0]

    lora, unet = shipped / "lightning/2-step.safetensors", shipped / "lightning/1-step-x0"
    assert (image("--lightning", 2) == image("--lora", lora)).all()
    assert (image("--lightning", 1) == image("--unet", unet)).all()
    both = image("--lightning", 2, "--lora", parts["style"], "--lora-scale", "0.5")
    assert (both == image("--lora", f"{parts['style']},{lora}", "--lora-scale", "0.5,1")).all()
    assert (both != image("--lightning", 2)).any()
    for words, reason in ((["--lightning", "4"], "for 1, 2 steps"), (["--lightning", "1", "--unet", "x"], "leave out")):
        assert run_generate(*words) == 2
        assert reason in one_line(capsys)


def test_another_unet_and_another_vae_take_their_places(run, sources, parts, tmp_path):  # noqa: F811
    other = altered(sources["sd1"], tmp_path / "other")
    taesd = parts["taesd"] / "diffusion_pytorch_model.safetensors"
    found, pipe = run("--unet", other, "--vae", taesd)
    assert (found == row(edited(other, vae=taesd)(PROMPT, steps=2))).all()
    assert found.shape == (64, 64, 3)  # a TAESD makes eight times the side of the latents, the tiny VAE four times
    assert not torch.equal(pipe.unet.conv_in.weight, load_pipeline(sources["sd1"]).unet.conv_in.weight)


def test_the_averaged_weights_are_taken_on_request(run, parts):  # noqa: F811
    plain, averaged = (run("--model", parts["both"], *words)[1].unet.state_dict() for words in ((), ("--ema",)))
    theirs = load_file(parts["both"])["model_ema.diffusion_modelinput_blocks00weight"]
    assert torch.equal(averaged["conv_in.weight"], theirs) and not torch.equal(plain["conv_in.weight"], theirs)


def test_the_vae_stays_in_float32_unless_told(run, sources):
    _, pipe = run("--precision", "bf16")
    assert (pipe.unet.dtype, next(pipe.vae.parameters()).dtype) == (torch.bfloat16, torch.float32)
    found, pipe = run("--vae-precision", "bf16")
    assert (pipe.unet.dtype, next(pipe.vae.parameters()).dtype) == (torch.float32, torch.bfloat16)
    expected = row(load_pipeline(sources["sd1"], vae_dtype=torch.bfloat16)(PROMPT, steps=2))
    assert (found == expected).all() and (found != run()[0]).any()


def test_an_image_is_the_start_of_several(run, sources, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    found, pipe = run("--image", tmp_path / "photo.png", "--strength", "0.5", "--count", "2", "--seed", "3", steps=4)
    assert (found == row(pipe([PROMPT] * 2, image=photo, strength=0.5, seed=3, steps=4))).all()
    assert found.shape == (24, 80, 3) and (found[:, :40] != found[:, 40:]).any()
    usual, _ = run("--image", tmp_path / "photo.png", steps=5)
    assert (usual == row(pipe(PROMPT, image=photo, strength=0.8, steps=5))).all()


def test_a_negative_prompt_without_guidance_is_noted(run, capsys):
    run("--negative-prompt", "blue")
    assert "note: guidance" not in capsys.readouterr().err
    run("--negative-prompt", "blue", "--guidance", "1")
    assert "note: guidance is off" in capsys.readouterr().err


def test_an_image_to_start_from_is_turned_upright_put_on_white_and_not_too_large_to_be_true(tmp_path, monkeypatch):
    photo = Image.new("RGB", (6, 4), (10, 20, 30))
    exif = photo.getexif()
    exif[274] = 6  # turned by a quarter
    photo.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert generate.read_image(tmp_path / "turned.png").size == (4, 6)
    assert generate.read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="bomb"):
        generate.read_image(tmp_path / "clear.png")


def test_low_memory_tiles_and_gives_the_same_images(run, monkeypatch):
    usual, _ = run("--count", "2")
    tiled = []
    decode = generate.Pipeline.decode
    monkeypatch.setattr(
        generate.Pipeline, "decode", lambda *args, **kw: tiled.append(kw["tiled"]) or decode(*args, **kw)
    )
    found, _ = run("--count", "2", "--low-memory")
    assert tiled == [True]
    assert np.abs(found - usual).max() <= 1


@pytest.mark.parametrize(
    ("words", "steps", "total"), [(("--count", "9"), 2, 4), (("--image", "photo.png", "--strength", "0.5"), 4, 2)]
)
def test_the_bar_counts_every_step_and_is_for_terminals_only(run, tmp_path, monkeypatch, capsys, words, steps, total):
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    enable_progress_bars()  # transformers' switch, which another test may have turned, is huggingface_hub's too
    run(*words, steps=steps)
    assert "sampling" not in capsys.readouterr().err
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run(*words, steps=steps)
    assert f"{total}/{total}" in terminal.getvalue() and f"{total + 1}/" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model", "nowhere"], "no such file or folder: nowhere"),
        (["--model", "broken"], "unet"),
        (["--lora", "a,b", "--lora-scale", "1,2,3"], "3 scales for 2 LoRAs"),
        (["--lora-scale", "1,2"], "--lora-scale is for --lora"),
        (["--strength", "0.5"], "--strength is for --image"),
        (["--latents", "noise.safetensors", "--count", "2"], "--count 2"),
        (["--lightning", "4"], "comes with no such student; it has none"),
        (["--ema"], "only single files may hold both"),
        (["--precision", "fp16"], "bf16"),
        (["--vae-precision", "fp16"], "--vae-precision fp16"),
        (["--vae", "none.safetensors"], "none.safetensors"),
        (["--image", "none.png"], "no such file: none.png"),
        (["--image", "file"], "cannot read the image"),
        (["--image", "photo.png", "--strength", "0"], "strength must be above 0"),
        (["--latents", "other.safetensors"], "no tensor `latents`"),
        (["--latents", "flat.safetensors"], "(B, C, h, w)"),
        (["--height", "30"], "multiples of 4"),
        (["--out", "image"], ".png"),
        (["--out", "file/image.png"], "cannot write"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_line_and_no_image(sources, tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no image")
    Image.new("RGB", (32, 32)).save("photo.png")
    save_file({"x": noise()}, "other.safetensors")
    save_file({"latents": noise()[0]}, "flat.safetensors")
    save_file({"latents": noise()}, "noise.safetensors")
    if "broken" in words:
        change_json(Path(shutil.copytree(sources["sd1"], "broken")) / "unet/config.json", norm_num_groups=0)
    usual = {"--model": str(sources["sd1"]), "--out": "new/out.png", "--steps": "1"}
    assert run_generate(*(word for flag, v in usual.items() if flag not in words for word in (flag, v)), *words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert reason in captured.err
    assert [path.name for path in tmp_path.rglob("*.png")] == ["photo.png"]
