"""The embedded miniature: a small pipeline folder that gives the same images in diffusers, and correct ones."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

import minidistill
from minidistill import evaluate
from minidistill.diffusion.noise import initial_noise
from minidistill.diffusion.sampling import Sampling
from minidistill.distill import sensitivity
from minidistill.distill.block_removal import RECIPES, plan_removal
from minidistill.distill.probes import make_probes
from minidistill.errors import InputError
from minidistill.interop.replace import merge_loras
from minidistill.metrics.clip_score import retrieval
from minidistill.metrics.reconstruction import evaluate_vae
from minidistill.miniature import networks
from minidistill.miniature.judge import score
from minidistill.miniature.scenes import Scenes, held_out_captions
from minidistill.training.batches import Batches
from minidistill.weights import folders
from minidistill.weights.files import read_json


@pytest.fixture(scope="module")
def pipe():
    return minidistill.load_pipeline("miniature")


def test_it_is_at_most_40_megabytes_of_package_data_with_all_of_its_students():
    assert Path(minidistill.__file__).parent == folders.MINIATURE.parent
    files = [path for path in folders.MINIATURE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "clip"} <= {
        path.relative_to(folders.MINIATURE).parts[0] for path in files
    }


def test_its_unet_has_the_shape_of_stable_diffusion_1():
    config = folders.load_unet(folders.MINIATURE).config
    assert config == networks.UNET and len(config.block_out_channels) == 4
    assert config.mid_block_type == "UNetMidBlock2DCrossAttn" and set(config.layers_per_block) == {2}


def test_no_block_that_a_recipe_removes_is_idle(pipe):
    probes = make_probes(Batches(Scenes("test", length=64), pipe, batch_size=32, seed=0), range(2))
    layers = [(f"down.{i}.1", f"up.{3 - i}.1") for i in range(4)]
    assert {entry for pair in layers for entry in pair} | {"mid", "stage.3"} == set(RECIPES["bk-tiny"].remove)
    removals = [plan_removal(networks.UNET, entries) for entries in [("mid",), ("stage.3",), *layers]]
    changes = [sensitivity.score(removal, pipe.unet, probes).sensitivity for removal in removals]
    assert min(changes) >= 5e-5 and max(changes) <= 1e4 * min(changes), changes
    assert sensitivity.measure_levels(pipe.unet, probes)["mid zeroed"] >= 5e-4


@pytest.mark.parametrize("name", folders.SHIPPED)
def test_diffusers_loads_it_and_gives_the_same_images(name):
    pipe = minidistill.load_pipeline(name)
    theirs = StableDiffusionPipeline.from_pretrained(folders.SHIPPED[name], torch_dtype=torch.float32)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    theirs.set_progress_bar_config(disable=True)
    captions = ["a large red circle on a striped grey background", "a blue square above a small yellow star"]
    noise = initial_noise(3, range(2), (4, 16, 16))
    ours = pipe(captions, steps=25, guidance=7.5, latents=noise)
    out = theirs(captions, num_inference_steps=25, guidance_scale=7.5, latents=noise, output_type="np").images
    for mine, other in zip(ours, out, strict=True):
        assert np.abs(np.asarray(mine, float) - 255 * other).max() <= 2.0


def test_its_student_is_a_bk_tiny_with_its_other_parts(pipe):
    student = minidistill.load_pipeline("miniature-tiny")
    assert student.unet.config == plan_removal(networks.UNET, RECIPES["bk-tiny"].remove).student
    parts = zip((pipe.vae, *pipe.text_encoders), (student.vae, *student.text_encoders), strict=True)
    for theirs, ours in parts:
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    card = (folders.SHIPPED["miniature-tiny"] / "README.md").read_text(encoding="utf-8")
    assert "A student of miniature" in card and "license: apache-2.0" in card


@pytest.mark.parametrize(("steps", "right"), [(8, 0.65), (4, 0.6), (2, 0.5)])
def test_its_students_of_few_steps_draw_what_captions_state_and_the_same_in_diffusers(steps, right):
    student, captions = folders.find_student("miniature", steps), held_out_captions(32)
    pipe = minidistill.load_pipeline("miniature")
    merge_loras(pipe, [(student, 1.0)])
    assert pipe.sampling == Sampling(steps)
    assert score(pipe(captions, seed=0, batch_size=32), captions)["all"] >= right
    theirs = StableDiffusionPipeline.from_pretrained(folders.MINIATURE, torch_dtype=torch.float32)
    theirs.scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    theirs.load_lora_weights(student.parent, weight_name=student.name)
    theirs.set_progress_bar_config(disable=True)
    noise = initial_noise(3, range(2), (4, 16, 16))
    ours = pipe(captions[:2], latents=noise)
    settings = {"num_inference_steps": steps, "guidance_scale": 0, "latents": noise, "output_type": "np"}
    for mine, other in zip(ours, theirs(captions[:2], **settings).images, strict=True):
        assert np.abs(np.asarray(mine, float) - 255 * other).max() <= 2.0


def test_the_vae_preserves_the_attributes_of_captions():
    result = evaluate_vae(folders.load_vae(folders.MINIATURE), 100)
    assert result["psnr"] >= 28 and result["psnr_plain"] >= 30 and result["all_correct"] >= 0.97, result


def test_latents_have_unit_variance_in_every_channel(pipe):
    images = [Scenes("test")[i][0] for i in range(64)]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.to_latents(pixels, torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.15)


def test_clip_retrieves_captions():
    clip, tokenizer = folders.load_clip(folders.MINIATURE), folders.load_tokenizer(folders.MINIATURE)
    assert retrieval(clip, tokenizer, rounds=2) >= 0.75


def test_its_images_show_what_the_captions_state(pipe):
    captions = held_out_captions(32)
    result = score(pipe(captions, steps=25, guidance=4.0, seed=0, batch_size=32), captions)
    assert result["all"] >= 0.85 and result["relation"] >= 0.9, result
    assert min(result["shape"], result["colour"], result["size"], result["background"]) >= 0.9, result


def test_captions_fit_the_text_encoder(pipe):
    tokenizer = pipe.tokenizers[0]
    lengths = [len(tokenizer.encode(Scenes(split).caption(i))) for split in ("train", "test") for i in range(500)]
    assert max(lengths) <= tokenizer.max_length - 2


def test_loading_does_not_import_the_compiler():
    code = "import sys, minidistill; minidistill.load_pipeline('miniature'); assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_evaluate_prints_shares_and_parts_and_writes_numbers_and_grid(tmp_path, capsys):
    evaluate.main(evaluate.Config(samples=2, steps=1, out=str(tmp_path / "e.json"), grid=str(tmp_path / "e.png")))
    assert "2 held-out captions in" in capsys.readouterr().out
    assert read_json(tmp_path / "e.json")["samples"] == 2 and (tmp_path / "e.png").exists()
    results = {"clip_similarity": 0.71191, "frechet": 0.00643, "vae": {"psnr": 39.4556, "all_correct": 1.0}}
    results["clip_retrieval_top1_of_100"] = 0.823
    assert evaluate.describe_parts(results).splitlines() == [
        "CLIP: similarity of image and caption 0.712",
        "CLIP: Frechet distance to the scenes of these captions 0.0064",
        "CLIP: the right one of 100 captions in 82.3% of cases",
        "VAE: 39.5 dB; 100.0% of reconstructions all correct",
    ]


@pytest.mark.parametrize("settings", [{"out": "."}, {"grid": "grid.jpg"}])
def test_evaluate_refuses_a_file_name_that_cannot_be_before_it_starts(settings, capsys):
    with pytest.raises(InputError, match="the name of a"):
        evaluate.main(evaluate.Config(**settings))
    assert not capsys.readouterr().out
