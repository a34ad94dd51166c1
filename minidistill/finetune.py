"""Train a model further on captioned images: all its weights, or a LoRA beside them.

    python -m minidistill.finetune                      the miniature on a CPU, offline
    python -m minidistill.finetune --model DIR --data DIR --lora-rank 16 --device cuda --precision bf16
    python -m minidistill.finetune --preset portrait --data DIR --device cuda --precision fp16

Any model will do: Stable Diffusion 1.x, 2.x and XL, and the students that `train_kd` makes of them. It is trained as it
was at first, to predict the noise, or the velocity, in noisy latents (arXiv 2006.11239, algorithm 1).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from minidistill.cli import option, run_command
from minidistill.data.listing import CAPTION_COLUMN_HELP, SPLIT_CHOICES, SPLIT_HELP
from minidistill.diffusion.noise import generator_for
from minidistill.diffusion.schedule import add_noise, make_alpha_bar, training_target
from minidistill.distill.kd import mean_square
from minidistill.errors import InputError
from minidistill.interop.lora_files import write_lora
from minidistill.interop.model_card import CARD, GRID, public_name, write_card
from minidistill.interop.publish import open_repo, push
from minidistill.metrics.cost import on_device
from minidistill.miniature.judge import score
from minidistill.miniature.scenes import Scenes, held_out_captions
from minidistill.models import lora
from minidistill.pipeline import Pipeline, load_pipeline
from minidistill.report import draw, drawing, save_image_grid
from minidistill.training.batches import Batch, Batches
from minidistill.training.curves import draw_curves
from minidistill.training.ema import EMA
from minidistill.training.inputs import check_training, check_weights, open_data, resolution_for
from minidistill.training.log import MetricsLog, format_table
from minidistill.training.optim import (
    PRECISIONS,
    SCHEDULES,
    adamw,
    check_finite,
    get_device,
    get_precision,
    lr_at,
    optimizer_step,
)
from minidistill.training.run_folder import RunFolder
from minidistill.weights.files import read_json, write_json

SHOWN, SEED = 8, 0  # images in a grid, and of their noise
LORA_TARGETS = {  # layers of the U-Net, of the text encoders
    "attention": (lora.ATTENTION, lora.TEXT_ATTENTION),
    "all": (lora.ALL, lora.TEXT_ALL),
}
LORA_FILES = {"kohya": "lora.safetensors", "peft": "lora_peft.safetensors"}


@dataclass(frozen=True)
class Config:
    model: str = option("miniature", "SOURCE to start from: a model folder, a Hub id, a single file, or miniature")
    data: str = option("scenes", "scenes, a folder of images with captions, or a cache of one (minidistill.cache)")
    split: str | None = option(None, SPLIT_HELP, choices=SPLIT_CHOICES)
    caption_column: str | None = option(None, CAPTION_COLUMN_HELP)
    images: int = option(4096, "how many scenes to train on", minimum=1)
    resolution: int | None = option(None, "pixels to train at; none takes the model's own", minimum=8)
    flip: bool = option(False, "show every other image as its mirror image; not where captions say left and right")
    lora_rank: int | None = option(None, "train a LoRA of this rank, not the weights; none trains them", minimum=1)
    lora_alpha: float | None = option(
        None, "the LoRA's addition counts alpha / rank; none takes the rank, so that it counts once", minimum=0
    )
    lora_targets: str | None = option(None, "layers that get a LoRA; none: attention", choices=LORA_TARGETS)
    train_text_encoder: bool = option(False, "train the text encoder(s) too, as the U-Net is: all weights, or a LoRA")
    out: str = option("runs/finetune", "folder of the run; the model is in OUT/model, a LoRA in OUT/lora.safetensors")
    steps: int = option(200, "optimizer steps", minimum=1)
    batch_size: int = option(32, "samples in a micro-batch", minimum=1)
    accumulate: int = option(1, "micro-batches in an optimizer step", minimum=1)
    learning_rate: float = option(1e-4, "peak learning rate", minimum=0)
    lr_schedule: str = option("cosine", "after the warm-up", choices=SCHEDULES)
    warmup: int = option(20, "steps of linear warm-up", minimum=0)
    weight_decay: float = option(1e-2, "AdamW's, on all that trains", minimum=0)
    max_grad_norm: float | None = option(1.0, "gradients are scaled down to this norm; none leaves them", minimum=0)
    ema_decay: float | None = option(
        None, "of the averaged weights that are saved; 0 averages nothing; none: 0.99, with a LoRA 0", minimum=0
    )
    caption_dropout: float = option(0.1, "share of samples with the empty caption, which guidance needs", minimum=0)
    gradient_checkpointing: bool = option(False, "recompute the U-Net's activations in backward: less memory, slower")
    seed: int = option(0, "decides everything random")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    precision: str = option("fp32", "of the forward passes", choices=PRECISIONS)
    judged: int = option(
        48, "held-out captions to judge the result on (scenes only); 0 for none", minimum=0, maximum=len(Scenes("test"))
    )
    log_every: int = option(10, "steps between log lines", minimum=1)
    sample_every: int = option(100, "steps between image grids", minimum=1)
    checkpoint_every: int = option(100, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(2, "how many checkpoints to keep", minimum=1)
    resume: bool = option(False, "go on with the run in OUT")
    push_to_hub: str | None = option(None, "OWNER/NAME on the Hugging Face Hub that gets the result; none: nobody")
    private: bool = option(False, "the repository that --push-to-hub makes is private")


PRESETS = {
    "miniature": {"comment": "the defaults: the miniature on scenes, minutes on a CPU"},
    # Of Segmind's portrait-finetuned, which saw 7,000 images by Realistic Vision 4.0: size, steps, batch, learning
    # rate, fp16 and the plain loss. Where nothing is told of it, the defaults of diffusers' script, which theirs is.
    "portrait": {
        "comment": "Segmind's portraits from tiny-sd: 16.8 M samples of your --data, on a GPU; not yet run here",
        "model": "segmind/tiny-sd",
        "resolution": 768,
        "steps": 131_000,
        "batch_size": 32,
        "accumulate": 4,
        "learning_rate": 1e-4,
        "lr_schedule": "constant",
        "warmup": 500,
        "ema_decay": 0.0,
        "caption_dropout": 0.0,
        "gradient_checkpointing": True,
        "device": "cuda",
        "precision": "fp16",
        "sample_every": 1000,
        "checkpoint_every": 1000,
    },
}


def main(config: Config) -> None:
    """Fine-tune, as the configuration says; everything is checked before the first file is written."""
    device = get_device(config.device)
    precision = get_precision(config.precision, device)
    check_settings(config)
    pipe = load_pipeline(config.model, device)
    check_weights(pipe, config.model)
    warn_if_distilled(pipe)
    config = resolve(config, pipe)
    scenes = Scenes("train", length=config.images)
    data = open_data(config.data, config.resolution, scenes, config.split, config.caption_column)
    settings = {**dataclasses.asdict(config), "examples": data.fingerprint()}  # --resume is for the same images only
    run = RunFolder.find(config.out, settings, config.resume)
    if config.push_to_hub:
        open_repo(config.push_to_hub, config.private)
    batches = Batches(
        data,
        pipe,
        batch_size=config.batch_size,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        flip=config.flip,
        keep_text=not config.train_text_encoder,  # which changes them
    )

    networks = choose_weights(config, pipe)  # after `batches`, which knows a cache's text encoders by their weights
    trained = {name: weight for name, weight in networks.named_parameters() if weight.requires_grad}
    pipe.unet.gradient_checkpointing = config.gradient_checkpointing
    optimizer = adamw(trained.values(), config.learning_rate, weight_decay=config.weight_decay)
    ema = EMA(networks, config.ema_decay)
    parts = {"trained": trained, "optimizer": optimizer, "ema": ema, "scaler": precision.scaler}
    run.begin(settings)
    alpha_bar = make_alpha_bar(pipe.schedule).to(device)
    show = Show(run, pipe, config, batches, alpha_bar)  # sees the model as it came: a fresh LoRA adds nothing
    show.measure("before")
    start = run.restore(parts)

    if start == 0:
        show.look(0)
    with MetricsLog(run.metrics, config.steps, config.log_every, start, len(alpha_bar)) as log:
        for step in range(start, config.steps):
            for k in range(config.accumulate):
                batch = batches[step * config.accumulate + k]
                with precision.autocast:
                    if config.train_text_encoder:
                        batch = read_again(pipe, batch)
                    per_sample = denoising_loss(pipe, batch, alpha_bar)  # (B,)
                check_finite(per_sample, step + 1, batch.t)
                precision.scaler.scale(per_sample.mean() / config.accumulate).backward()
                log.add({"loss": per_sample.mean()}, per_sample, batch.t)

            lr = lr_at(step, config.learning_rate, config.warmup, config.steps, config.lr_schedule)
            norm = optimizer_step(networks, optimizer, precision.scaler, lr, config.max_grad_norm)
            if not precision.scaler.is_enabled():  # it would have skipped this step; so the weights are lost
                check_finite(norm, step + 1, batch.t, "gradient norm")
            ema.update()
            log.end_step(step + 1, lr=lr, grad_norm=norm)

            with log.untimed():
                done = step + 1
                if done % config.sample_every == 0 or done == config.steps:
                    with ema.swap():
                        show.look(done)
                if done % config.checkpoint_every == 0 or done == config.steps:
                    run.save(done, parts, config.keep_checkpoints)

    with ema.swap():
        show.measure("after", sum(weight.numel() for weight in trained.values()))
        folder = save(config, pipe, run.path)
    draw_curves(run.metrics, run.curves)
    kind, grid = "finetuned" if config.lora_rank is None else "lora", run.last_image_grid(config.steps)
    write_card(folder, kind, settings, show.results, grid, config.push_to_hub)
    print(f"\n{show.table()}\n\nmodel     {folder}\nimages  {grid}\ncurves    {run.curves}")
    if config.push_to_hub:
        files = None if config.lora_rank is None else [*LORA_FILES.values(), CARD, GRID]
        print(f"online    {push(folder, config.push_to_hub, config.private, files)}")


# what is trained, and on what


def denoising_loss(pipe: Pipeline, batch: Batch, alpha_bar: Tensor) -> Tensor:
    """How far the U-Net is from what it should predict, eps, v or x0: mean square of each sample, (B,), float32."""
    x0, context, eps, t, _, added_cond = batch
    target = training_target(x0, eps, t, alpha_bar, pipe.schedule.prediction_type)
    return mean_square(pipe.unet(add_noise(x0, eps, t, alpha_bar), t, context, added_cond), target)


def read_again(pipe: Pipeline, batch: Batch) -> Batch:
    """The batch with its captions encoded anew, by the text encoders of this moment and with gradients to them."""
    return batch.with_text(pipe.text_states(batch.captions))


def choose_weights(config: Config, pipe: Pipeline) -> nn.ModuleDict:
    """Freeze all that stays as it is, give LoRAs to what trains by them. The networks that train, by their parts."""
    for network in (pipe.vae, *pipe.networks.values()):
        network.requires_grad_(False)
    chosen = {part: net for part, net in pipe.networks.items() if part == "unet" or config.train_text_encoder}
    for part, network in chosen.items():
        if config.lora_rank is None:
            network.requires_grad_(True)
        else:
            targets = LORA_TARGETS[config.lora_targets][part != "unet"]
            generator = generator_for(config.seed, "lora", part)
            count = lora.add_lora(network, targets, config.lora_rank, config.lora_alpha, generator=generator)
            print(f"{part}: {count} layers with a LoRA")
    return nn.ModuleDict(chosen)


def save(config: Config, pipe: Pipeline, folder: Path) -> Path:
    """Write the model folder, or the LoRA in both forms; where they are."""
    if config.lora_rank is None:
        pipe.save(folder / "model")
        return folder / "model"
    for form, name in LORA_FILES.items():
        write_lora(folder / name, pipe.networks, form, metadata={"ss_sd_model_name": public_name(config.model)})
    return folder


class Show:
    """What a run shows of itself: always the same captions and noise, the model as it came above the model now."""

    def __init__(self, run: RunFolder, pipe: Pipeline, config: Config, batches: Batches, alpha_bar: Tensor) -> None:
        self.run, self.pipe, self.config, self.batches, self.alpha_bar = run, pipe, config, batches, alpha_bar
        self.judged = held_out_captions(config.judged) if config.data == "scenes" else []
        self.captions = held_out_captions(SHOWN) if self.judged else batches.captions(SHOWN)
        self.idle = [] if config.train_text_encoder else batches.idle
        self.before = self.draw(self.captions)
        self.file = run.path / "results.json"
        self.results = read_json(self.file) if self.file.exists() else {}

    def draw(self, captions: Sequence[str]) -> list[Image.Image]:
        """An image of each caption, with the model's own steps and guidance."""
        side = self.config.resolution
        with on_device(self.idle, self.pipe.device):
            return draw(self.pipe, captions, (side, side), SEED)

    def look(self, step: int) -> None:
        """Write samples/step-NNNNNN.png."""
        with drawing(f"the model of step {step}"):
            now = self.draw(self.captions) if step else self.before
        save_image_grid(self.run.image_grid(step), [self.before, now], self.captions, ["before", f"step {step}"])

    @torch.no_grad()
    def measure(self, name: str, trained: int | None = None) -> None:
        """Measure the model, once under each name but "after"; kept in results.json. trained: how many parameters."""
        if name in self.results and name != "after":
            return
        batch = self.batches[-1]  # images of the data, with noise that no step sees
        if self.config.train_text_encoder:  # else the batch has the states already, and the encoders may rest elsewhere
            batch = read_again(self.pipe, batch)
        result = {} if trained is None else {"trained_parameters": trained}
        result["loss"] = denoising_loss(self.pipe, batch, self.alpha_bar).mean().item()
        if self.judged:
            result["judge"] = score(self.draw(self.judged), self.judged)
        self.results[name] = result
        write_json(self.file, self.results)

    def table(self) -> str:
        """Loss, and how many images are right, before and after."""
        rows = [("", "loss", *(["all correct"] if self.judged else []))]
        for name, result in self.results.items():
            rows.append((name, f"{result['loss']:.4f}", *([f"{result['judge']['all']:.0%}"] if self.judged else [])))
        return format_table(rows)


# settings


def check_settings(config: Config) -> None:
    """Refuse what no flag's minimum can."""
    if config.lora_rank is None and (config.lora_alpha is not None or config.lora_targets is not None):
        raise InputError("--lora-alpha and --lora-targets are of a LoRA: give --lora-rank too")
    if config.lora_alpha == 0:
        raise InputError("--lora-alpha must be above 0, or the LoRA adds nothing")
    if config.lora_rank is not None and config.ema_decay and not config.resume:  # there the run folder compares
        raise InputError("--ema-decay is for all weights: the average of a LoRA's two factors is no average of LoRAs")
    check_training(config)


def warn_if_distilled(pipe: Pipeline) -> None:
    """Say what this loss does to a model of few steps."""
    if pipe.sampling is not None:
        warnings.warn(
            f"this model is made for {pipe.sampling}, and this training, which is for many steps, unlearns that: "
            "better train a LoRA for the model it was distilled from, and use it here",
            stacklevel=2,
        )


def resolve(config: Config, pipe: Pipeline) -> Config:
    """Settings left open get their values, so that the run folder records what was done."""
    is_lora = config.lora_rank is not None
    usual = 0.0 if is_lora else 0.99
    return dataclasses.replace(
        config,
        resolution=resolution_for(pipe, config.resolution, config.model),
        ema_decay=usual if config.ema_decay is None else config.ema_decay,
        lora_alpha=(config.lora_alpha or float(config.lora_rank)) if is_lora else None,
        lora_targets=(config.lora_targets or "attention") if is_lora else None,
    )


if __name__ == "__main__":
    run_command(main, Config, PRESETS, prog="python -m minidistill.finetune", description=__doc__)
