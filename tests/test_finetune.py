"""The command finetune: the loss and its gradients are diffusers', what is saved works there, resuming changes no bit.

Tiny models saved by diffusers are trained for a few steps on a folder of ten images; all weights, or a LoRA.
"""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import CAPTIONS
from PIL import Image
from runs import (
    TEXT,
    UNET,
    assert_same_files,
    checkpoint,
    exit_code,
    largest_difference,
    metrics,
    one_line,
    read,
)
from safetensors.torch import load_file

from minidistill import cache, finetune, pipeline, report
from minidistill.cli import parse
from minidistill.data.folders import ImageFolder
from minidistill.diffusion.sampling import Sampling
from minidistill.diffusion.schedule import make_alpha_bar
from minidistill.interop.replace import merge_loras
from minidistill.models.lora import lora_layers
from minidistill.pipeline import load_pipeline
from minidistill.training import batches
from minidistill.training.batches import Batches
from minidistill.weights.files import read_metadata

RUN = "--steps 4 --batch-size 4 --warmup 0 --log-every 1 --checkpoint-every 2 --sample-every 3 --learning-rate 1e-2"
LORA = "--lora-rank 3 --lora-alpha 6 --lora-targets all --train-text-encoder"
LORA_FILES = ("lora.safetensors", "lora_peft.safetensors")


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    """Two sampling steps for the image grids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def train(tiny_sd1, images):
    """train(run folder, flags) -> exit code."""

    def run(folder: Path, flags: str = "", model: Path = tiny_sd1, data: object = images) -> int:
        words = ("--model", model, "--data", data, "--out", folder, *RUN.split(), *flags.split())
        return exit_code(finetune, *words)

    return run


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """The folder of a run on all weights of the U-Net; not to be changed."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="module")
def with_lora(train, tmp_path_factory):
    """The folder of a run with LORA; not to be changed."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert train(folder, LORA) == 0
    return folder


# the loss


def oracle_loss(folder: Path, batch, prediction: str):
    """diffusers' pipeline of a folder, and the loss as its training scripts compute it, with gradients."""
    kind = diffusers.StableDiffusionXLPipeline if batch.added_cond else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(folder)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    texts = [caption or "" for caption in batch.captions]

    def encode(tokenizer, encoder):
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return encoder(ids, output_hidden_states=True)

    one = encode(pipe.tokenizer, pipe.text_encoder)
    context, added = one.last_hidden_state, None
    if batch.added_cond:
        two = encode(pipe.tokenizer_2, pipe.text_encoder_2)
        here = torch.tensor([caption is not None for caption in batch.captions]).float()
        context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1) * here[:, None, None]
        added = {"text_embeds": two.text_embeds * here[:, None], "time_ids": batch.added_cond["time_ids"]}
    x_t = scheduler.add_noise(batch.x0, batch.eps, batch.t)
    out = pipe.unet(x_t, batch.t, context, added_cond_kwargs=added).sample
    is_v = prediction == "v_prediction"
    target = scheduler.get_velocity(batch.x0, batch.eps, batch.t) if is_v else batch.eps
    return pipe, (out - target).square().flatten(1).mean(1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sdxl"])
def test_loss_and_gradients_are_those_of_diffusers_up_to_the_text_encoders(tiny_sd1, sources, images, kind):
    folder = sources["sdxl"] if kind == "sdxl" else tiny_sd1
    prediction = "epsilon" if kind == "sdxl" else kind
    pipe = load_pipeline(folder)
    pipe.schedule = replace(pipe.schedule, prediction_type=prediction)
    batch = Batches(ImageFolder(images, 32), pipe, batch_size=6, seed=0, caption_dropout=0.4)[0]
    assert None in batch.captions and any(batch.captions)
    again = finetune.encode_again(pipe, batch)
    loss = finetune.denoising_loss(pipe, again, make_alpha_bar(pipe.schedule))
    theirs, expected = oracle_loss(folder, batch, prediction)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    frozen = batch.with_text(pipe.encode_prompts(batch.captions))  # those in memory may differ in their last bits
    assert torch.equal(finetune.denoising_loss(pipe, frozen, make_alpha_bar(pipe.schedule)), loss)
    loss.mean().backward()
    expected.mean().backward()
    for part, network in pipe.networks.items():
        oracle = {n.removeprefix("text_model."): p.grad for n, p in getattr(theirs, part).named_parameters()}
        compared = 0
        for name, weight in network.named_parameters():
            grad = oracle[name.removeprefix("text_model.")]
            assert (weight.grad is None) == (grad is None), name
            if grad is not None:
                torch.testing.assert_close(weight.grad, grad, rtol=1e-3, atol=1e-6)
                compared += bool(grad.abs().max() > 1e-5)
        assert compared > 5, part


# all weights


def latents_of(pipe, **more) -> torch.Tensor:
    """What our pipeline or diffusers' makes of two prompts, before the VAE."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    if isinstance(pipe, pipeline.Pipeline):
        return pipe(CAPTIONS[:2], latents=noise, steps=3, output="latents", **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe(CAPTIONS[:2], latents=noise, num_inference_steps=3, guidance_scale=7.5, output_type="latent").images


def assert_moved_alike(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    moved = (expected - base).abs().max()
    assert moved > 0.05 and (found - expected).abs().max() < 0.01 * moved


def test_the_model_loads_in_diffusers_and_samples_the_same(plain, tiny_sd1):
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(plain / "model")
    base = latents_of(load_pipeline(tiny_sd1))
    assert_moved_alike(latents_of(load_pipeline(plain / "model")), latents_of(oracle), base)
    untouched = load_file(plain / "model" / TEXT), load_pipeline(tiny_sd1).text_encoders[0].state_dict()
    assert largest_difference(*untouched) == 0


def test_the_run_folder_holds_what_it_should(plain, with_lora):
    common = {"checkpoints", "config.json", "curves.png", "metrics.jsonl", "results.json", "samples"}
    card = {"README.md", "images.png"}
    assert {path.name for path in plain.iterdir()} == {*common, "model"}
    assert {path.name for path in with_lora.iterdir()} == {*common, *LORA_FILES, *card}
    assert card < {path.name for path in (plain / "model").iterdir()}
    names = {field.name for field in fields(finetune.Config)} | {"examples", "weights"}
    resolved = ("resolution", "ema_decay", "lora_rank", "lora_alpha", "lora_targets")
    for run, expected in ((plain, [32, 0.99, None, None, None]), (with_lora, [32, 0, 3, 6, "all"])):
        assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-00000{i}.png" for i in (0, 3, 4)]
        config = read(run / "config.json")
        assert config.keys() == names and [config[name] for name in resolved] == expected


def test_training_lowers_the_loss_and_says_so(plain, with_lora):
    for run in (plain, with_lora):
        lines, results = metrics(run), read(run / "results.json")
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(line["grad_norm"] > 0 and line["lr"] > 0 and line["loss_by_timestep"] for line in lines)
        assert list(results) == ["before", "after"] and results["after"]["loss"] < results["before"]["loss"]
        trained = sum(t.numel() for t in checkpoint(run, part="trained").values())
        assert all(row["trained_parameters"] == trained for row in results.values())
    assert results["before"]["loss"] == read(plain / "results.json")["before"]["loss"]


def test_image_grids_show_the_model_before_training_above_the_model_now(plain):
    grids = [np.asarray(Image.open(path)) for path in sorted((plain / "samples").iterdir())]
    left, height = report.LABEL, 6 + 128  # see report.py: a row
    above, below = ([grid[rows, left:] for grid in grids] for rows in (slice(6, height), slice(height + 6, 2 * height)))
    assert all((row == above[0]).all() for row in [*above, below[0]])
    assert all((row != below[0]).any() for row in below[1:])


def test_what_is_saved_is_the_average(plain):
    saved = {f"unet.{name}": tensor for name, tensor in load_file(plain / "model" / UNET).items()}
    averaged, own = (checkpoint(plain, part=part) for part in ("ema", "trained"))
    assert largest_difference(saved, averaged) == 0 and largest_difference(averaged, own) > 1e-4


def test_two_micro_batches_of_four_are_one_batch_of_eight_and_checkpointing_changes_nothing(train, tmp_path):
    flags = "--train-text-encoder --learning-rate 1e-3 --steps 2"
    assert train(tmp_path / "whole", f"--batch-size 8 {flags}") == 0
    assert train(tmp_path / "split", f"--accumulate 2 --gradient-checkpointing {flags}") == 0
    whole, split = (checkpoint(tmp_path / name, 2, "trained") for name in ("whole", "split"))
    assert {name.split(".")[0] for name in whole} == {"unet", "text_encoder"}
    assert largest_difference(whole, split) < 1e-4
    before = load_pipeline(read(tmp_path / "whole/config.json")["model"]).text_encoders[0].state_dict()
    after = load_file(tmp_path / "whole/model" / TEXT)
    assert largest_difference(after, dict(before)) > 1e-4, "the text encoder did not train"


# a LoRA


def test_only_the_lora_trains_and_is_kept_and_its_files_say_what_it_is_made_for(tiny_sd1, images, with_lora):
    pipe = load_pipeline(tiny_sd1)
    config = finetune.resolve(parse(finetune.Config, None, ["--model", str(tiny_sd1), *LORA.split()], "", None), pipe)
    networks = finetune.choose_weights(config, pipe)
    batch = Batches(ImageFolder(images, 32), pipe, batch_size=4, seed=0)[0]
    finetune.denoising_loss(pipe, finetune.encode_again(pipe, batch), make_alpha_bar(pipe.schedule)).mean().backward()
    moved = {name for network in (networks, pipe.vae) for name, p in network.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in networks.named_parameters() if name.endswith(("lora_down", "lora_up"))}
    assert all(lora_layers(network) for network in networks.values())
    assert set(checkpoint(with_lora, part="trained")) == moved
    assert not checkpoint(with_lora, part="ema"), "a LoRA is not averaged"
    kohya, peft = (read_metadata(with_lora / name) for name in LORA_FILES)
    assert kohya["ss_sd_model_name"] == peft["ss_sd_model_name"] == tiny_sd1.name
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("3", "6")
    described = json.loads(peft["lora_adapter_metadata"])
    assert (described["unet.r"], described["unet.lora_alpha"]) == (3, 6)


def test_in_bf16_a_lora_trains_in_float32_on_rounded_weights_and_is_written_as_asked(tiny_sd1, images, tmp_path):
    words = ["--model", tiny_sd1, "--data", images, "--out", tmp_path / "run", *LORA.split(), "--precision", "bf16"]
    run = finetune.set_up(parse(finetune.Config, None, [*map(str, words), "--dtype", "fp16"], "prog", None))
    for network in run.pipe.networks.values():
        kinds = {(weight.dtype, weight.requires_grad) for weight in network.parameters()}
        assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    folder, _, files = finetune.save(run.config, run.pipe, tmp_path)
    written = load_file(folder / files[0])
    assert {tensor.dtype for name, tensor in written.items() if not name.endswith("alpha")} == {torch.float16}


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_both_files_of_a_lora_to_the_same_output(train, tiny_sd1, sources, with_lora, tmp_path, kind):
    model, run = (tiny_sd1, with_lora) if kind == "sd1" else (sources["sdxl"], tmp_path)
    assert kind == "sd1" or train(run, LORA, model) == 0
    base = latents_of(load_pipeline(model))
    found = []
    for name in LORA_FILES:
        pipe = load_pipeline(model)
        merge_loras(pipe, [(run / name, 1.0)])
        found.append(latents_of(pipe))
    torch.testing.assert_close(*found)
    parts = ("unet", "text_encoder", "text_encoder_2")[: 2 + (kind == "sdxl")]
    for name in LORA_FILES:
        oracle = diffusers.DiffusionPipeline.from_pretrained(model)
        if kind == "sdxl":
            oracle.watermark = None
        oracle.load_lora_weights(run, weight_name=name)
        assert all(getattr(oracle, part).peft_config for part in parts)
        assert_moved_alike(found[0], latents_of(oracle), base)


def test_without_its_flag_the_text_encoder_gets_no_lora_and_attention_is_the_default(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--lora-rank 2 --steps 1") == 0
    names = checkpoint(tmp_path / "run", 1, "trained")
    assert all(name.startswith("unet.") for name in names)
    assert all(any(f".{end}." in name for end in finetune.lora.ATTENTION) for name in names)
    assert read(tmp_path / "run/config.json")["lora_alpha"] == 2
    printed = capsys.readouterr().out
    assert f"unet: {len(names) // 2} layers with a LoRA" in printed
    assert f"\nLoRA      {tmp_path / 'run' / LORA_FILES[0]}\n" in printed and "\nmodel " not in printed


# data


def test_a_cache_trains_the_text_encoder_as_its_folder_does(train, images, tiny_sd1, with_lora, tmp_path):
    """Its text states are those before training; encoders that train must be called again."""
    cache.main(cache.CacheConfig(model=str(tiny_sd1), data=str(images), out=str(tmp_path / "cache"), text_states=True))
    assert train(tmp_path / "run", LORA, data=tmp_path / "cache") == 0
    assert largest_difference(*(load_file(run / LORA_FILES[0]) for run in (tmp_path / "run", with_lora))) < 1e-4


def test_text_states_are_not_kept_for_text_encoders_that_train(train, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "encode_captions", lambda *_: pytest.fail("these are outdated after one step"))
    assert train(tmp_path / "run", "--train-text-encoder --steps 1") == 0


def altered(tiny_sd1: Path, folder: Path, **settings) -> Path:
    """A copy of the model with other settings of its scheduler."""
    scheduler = shutil.copytree(tiny_sd1, folder) / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**read(scheduler), **settings}))
    return folder


def test_a_zero_terminal_snr_model_is_trained(train, tiny_sd1, tmp_path):
    """Prediction of eps with trailing timesteps: DDIM's first step would divide by alpha_bar = 0, so Euler samples."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert train(tmp_path / "run", "--steps 1", altered(tiny_sd1, tmp_path / "zero", **zero)) == 0


def test_scenes_are_judged_and_a_v_prediction_model_stays_one(tiny_sd1, train, tmp_path):
    model = altered(tiny_sd1, tmp_path / "v", prediction_type="v_prediction")
    assert train(tmp_path / "run", "--resolution 64 --images 6 --judged 2 --steps 1", model, "scenes") == 0
    judged = [row["judge"] for row in read(tmp_path / "run/results.json").values()]
    assert len(judged) == 2 and all(0 <= judge["all"] <= 1 for judge in judged)
    assert read(tmp_path / "run/model/scheduler/scheduler_config.json")["prediction_type"] == "v_prediction"
    assert load_pipeline(tmp_path / "run/model").schedule.prediction_type == "v_prediction"


# resuming


def test_a_lora_resumes_from_its_out_folder_alone_to_the_same_bits(with_lora, tmp_path):
    run = shutil.copytree(with_lora, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-000004")
    for name in LORA_FILES:
        (run / name).unlink()
    assert exit_code(finetune, "--out", run, "--resume") == 0
    names = ["checkpoints/step-000004/state.safetensors", "results.json", "samples/step-000004.png"]
    assert_same_files(run, with_lora, names)
    assert metrics(run) == metrics(with_lora)
    for name in LORA_FILES:  # their headers are in no fixed order
        assert largest_difference(load_file(run / name), load_file(with_lora / name)) == 0


# settings and refusals


def test_a_model_of_few_steps_is_warned_about(tiny_sd1):
    pipe = load_pipeline(tiny_sd1)
    pipe.sampling = Sampling(4)
    with pytest.warns(UserWarning, match="4 steps of euler.*unlearns"):
        finetune.warn_if_distilled(pipe)


REFUSED = {  # flags: words of the message; what all training commands check is tested with train_kd
    "--model none/here/at/all": ["none/here/at/all"],
    "--lora-alpha 4": ["give --lora-rank"],
    "--lora-targets all": ["give --lora-rank"],
    "--lora-rank 2 --lora-alpha 0": ["--lora-alpha must be above 0"],
    "--lora-rank 2 --ema-decay 0.9": ["--ema-decay is for all weights"],
    "--data scenes --flip": ["--flip", "left and right", "--no-flip"],
    "--resume": ["nothing to resume in", "check --out"],
}


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(train, tmp_path, capsys, flags):
    assert train(tmp_path / "new/run", flags) == 2
    error = one_line(capsys)
    assert all(reason in error for reason in REFUSED[flags]), error
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_no_model(train, tmp_path, monkeypatch, capsys):
    lr_at = finetune.optim.lr_at
    monkeypatch.setattr(finetune.optim, "lr_at", lambda step, *rest: 1e30 if step == 1 else lr_at(step, *rest))
    assert train(tmp_path / "run", "--sample-every 100 --checkpoint-every 1") == 3
    assert "the loss is " in (error := one_line(capsys)) and "at step 3 (timesteps " in error
    assert not (tmp_path / "run/model").exists()
