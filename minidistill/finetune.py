"""Train a model further on captioned images: all its weights, or a LoRA beside them.

    python -m minidistill.finetune                      the miniature on a CPU, offline
    python -m minidistill.finetune --model DIR --data DIR --lora-rank 16 --device cuda --precision bf16

Any model will do: Stable Diffusion 1.x, 2.x and XL, and the students of `train_kd`. The loss is the original one,
of the noise, or the velocity, predicted from noisy latents (arXiv 2006.11239, algorithm 1).
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidistill.cli import option, run_command
from minidistill.diffusion.noise import generator_for
from minidistill.diffusion.schedule import add_noise, make_alpha_bar, training_target
from minidistill.distill.kd import mean_square
from minidistill.errors import InputError
from minidistill.interop.lora_files import write_lora
from minidistill.interop.model_card import CARD, GRID, public_name
from minidistill.miniature.scenes import Scenes
from minidistill.models import lora
from minidistill.pipeline import Pipeline, load_pipeline
from minidistill.report import Report
from minidistill.settings import TrainingConfig
from minidistill.training import inputs, optim, parallel
from minidistill.training.batches import Batch, Batches
from minidistill.training.device import PRECISIONS, Precision, get_device, get_precision, to_precision
from minidistill.training.ema import EMA
from minidistill.training.log import MetricsLog
from minidistill.training.run_folder import RunFolder

LORA_TARGETS = {  # layers of the U-Net, of the text encoders
    "attention": (lora.ATTENTION, lora.TEXT_ATTENTION),
    "all": (lora.ALL, lora.TEXT_ALL),
}
LORA_FILES = {"kohya": "lora.safetensors", "peft": "lora_peft.safetensors"}


@dataclass(frozen=True)
class Config(TrainingConfig):
    model: str = option("miniature", "model to start from: a model folder, a Hub id, a single file, or miniature")
    lora_rank: int | None = option(None, "train a LoRA of this rank (default: all weights, no LoRA)", minimum=1)
    lora_alpha: float | None = option(None, "scale the LoRA by alpha / rank (default: alpha = rank)", minimum=0)
    lora_targets: str | None = option(None, "layers that get a LoRA (default: attention)", choices=LORA_TARGETS)
    train_text_encoder: bool = option(False, "train the text encoder(s) too: all weights, or a LoRA")
    steps: int = option(200, "optimizer steps", minimum=1)
    batch_size: int = option(32, "samples per micro-batch", minimum=1)
    learning_rate: float = option(1e-4, "peak learning rate", minimum=0)
    warmup: int = option(20, "steps of linear warm-up", minimum=0)
    ema_decay: float | None = option(None, "EMA decay of the weights; 0 disables it (default: 0.99, LoRA 0)", minimum=0)
    precision: str = option("fp32", "precision of the forward passes", choices=PRECISIONS)
    out: str = option("runs/finetune", "run folder; the model is written to OUT/model, a LoRA to OUT/lora.safetensors")
    log_every: int = option(10, "steps between log lines", minimum=1)
    sample_every: int = option(100, "steps between image grids", minimum=1)
    checkpoint_every: int = option(100, "steps between checkpoints", minimum=1)


class Run(NamedTuple):
    """What the training loop needs."""

    config: Config  # every setting resolved
    settings: dict[str, Any]  # config.json: the config, and fingerprints of the model and of the data
    folder: RunFolder
    pipe: Pipeline
    networks: nn.ModuleDict  # those that train
    trained: dict[str, nn.Parameter]
    batches: Batches
    precision: Precision
    optimizer: torch.optim.Optimizer
    ema: EMA
    report: Report


def main(config: Config) -> None:
    """Train all weights or a LoRA with the denoising loss (arXiv 2006.11239, algorithm 1)."""
    run = set_up(config)
    config, pipe, precision, optimizer, ema = run.config, run.pipe, run.precision, run.optimizer, run.ema
    alpha_bar = make_alpha_bar(pipe.schedule).to(pipe.device)

    run.folder.begin(run.settings)
    parts = {"trained": run.trained, "optimizer": optimizer, "ema": ema, "scaler": precision.scaler}
    start = run.folder.restore(parts)
    if start == 0:
        run.report.look(parallel.whole_pipeline(pipe), 0)
    with MetricsLog(run.folder.metrics, config.steps, config.log_every, start, len(alpha_bar)) as log:
        for step in range(start, config.steps):
            for k in range(config.accumulate):
                batch = run.batches[step * config.accumulate + k]
                with precision.autocast:
                    if config.train_text_encoder:
                        batch = encode_again(pipe, batch)
                    loss = denoising_loss(pipe, batch, alpha_bar)  # (B,)
                optim.check_finite(loss, step + 1, batch.t)
                precision.scaler.scale(loss.mean() / config.accumulate).backward()
                log.add({"loss": loss.mean()}, loss, batch.t)

            lr = optim.lr_at(step, config.learning_rate, config.warmup, config.steps, config.lr_schedule)
            clip = config.max_grad_norm
            norm = optim.optimizer_step(run.networks, optimizer, precision.scaler, lr, clip, step + 1, batch.t)
            ema.update()
            done = step + 1
            log.end_step(done, lr=lr, grad_norm=norm)

            with log.untimed():
                if done % config.sample_every == 0 and done < config.steps:
                    with ema.swap():
                        run.report.look(parallel.whole_pipeline(pipe), done)
                if done % config.checkpoint_every == 0 or done == config.steps:
                    run.folder.save(done, parts, config.keep_checkpoints)

    with ema.swap():
        result = parallel.whole_pipeline(pipe)
        run.report.measure("after", result, config.steps)
        if parallel.is_first():
            run.report.finish(*save(config, result, run.folder.path), run.settings)


def denoising_loss(pipe: Pipeline, batch: Batch, alpha_bar: Tensor) -> Tensor:
    """Mean squared error of the U-Net's prediction (of eps, v or x0) for each sample, (B,), float32."""
    target = training_target(batch.x0, batch.eps, batch.t, alpha_bar, pipe.schedule.prediction_type)
    x_t = add_noise(batch.x0, batch.eps, batch.t, alpha_bar)
    return mean_square(pipe.unet(x_t, batch.t, batch.context, batch.added_cond), target)


def encode_again(pipe: Pipeline, batch: Batch) -> Batch:
    """The batch with its captions encoded by the text encoders as they are now, with gradients to them."""
    return batch.with_text(pipe.text_states(batch.captions))


def save(config: Config, pipe: Pipeline, folder: Path) -> tuple[Path, str, list[str] | None]:
    """Write the model folder, or the LoRA in both formats: its folder, kind of model card, files (None: all in it)."""
    dtype = PRECISIONS.get(config.dtype)
    if config.lora_rank is None:
        pipe.save(folder / "model", dtype)
        return folder / "model", "finetuned", None
    for form, name in LORA_FILES.items():
        write_lora(folder / name, pipe.networks, form, dtype, {"ss_sd_model_name": public_name(config.model)})
    return folder, "lora", [*LORA_FILES.values(), CARD, GRID]


def set_up(config: Config) -> Run:
    """Check all settings, build what trains, measure the model before training. No file is written."""
    device = parallel.join(get_device(config.device, config.deterministic), config.parallel)
    check_lora(config)
    inputs.check_training(config)
    pipe = load_pipeline(config.model, device)
    inputs.check_weights(pipe, config.model)
    warn_if_distilled(pipe)
    config = resolve(config, pipe)
    scenes = Scenes("train", length=config.images)
    data = inputs.open_data(config.data, config.resolution, scenes, config.split, config.caption_column)
    smallest = inputs.smallest_map(pipe.unet.config, config.resolution // pipe.vae.config.downscale)
    precision = get_precision(config.precision, device, smallest)
    settings, folder = inputs.find_run(asdict(config), pipe, data)
    inputs.print_summary(data)

    choice = {"seed": config.seed, "caption_dropout": config.caption_dropout, "flip": config.flip}
    keep_text = not config.train_text_encoder  # which changes the text states
    choice |= {"batch_size": config.batch_size, "autocast": precision.autocast}
    batches = Batches(data, pipe, keep_text=keep_text, **choice)
    networks = choose_weights(config, pipe)  # after `batches`, which knows a cache's text encoders by their weights
    if config.lora_rank is not None:  # which is saved alone: elsewhere the text encoders of the model folder stay exact
        for network in pipe.networks.values():
            to_precision(network, config.precision)
    pipe.unet.gradient_checkpointing = config.gradient_checkpointing
    size = sum(weight.numel() for weight in networks.parameters() if weight.requires_grad)
    held_out = batches[-1]  # images of the data, with noise that no step sees
    alpha_bar = make_alpha_bar(pipe.schedule).to(device)

    def numbers(model: Pipeline) -> dict[str, Any]:
        with precision.autocast:
            batch = encode_again(model, held_out) if config.train_text_encoder else held_out
            loss = denoising_loss(model, batch, alpha_bar).mean().item()
        return {"trained_parameters": size, "loss": loss}

    report = Report(
        folder,
        batches,
        numbers,
        ("before", pipe),
        trained="model" if config.lora_rank is None else "LoRA",
        judged=config.judged if config.data == "scenes" else 0,
        idle=[] if config.train_text_encoder else batches.idle,
        autocast=precision.autocast,
    )
    parallel.shard(networks, config.parallel)
    trained = {name: weight for name, weight in networks.named_parameters() if weight.requires_grad}
    optimizer = optim.adamw(trained.values(), config.learning_rate, weight_decay=config.weight_decay)
    ema = EMA(networks, config.ema_decay)
    return Run(config, settings, folder, pipe, networks, trained, batches.share(), precision, optimizer, ema, report)


def choose_weights(config: Config, pipe: Pipeline) -> nn.ModuleDict:
    """Freeze what does not train, add LoRAs where asked for -> the networks that train, by name."""
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


def check_lora(config: Config) -> None:
    """InputError: settings of a LoRA that do nothing, or without one."""
    if config.lora_rank is None and (config.lora_alpha is not None or config.lora_targets is not None):
        raise InputError("--lora-alpha and --lora-targets are of a LoRA: give --lora-rank too")
    if config.lora_alpha == 0:
        raise InputError("--lora-alpha must be above 0, or the LoRA adds nothing")
    if config.lora_rank is not None and config.ema_decay and not config.resume:  # there the run folder compares
        raise InputError("--ema-decay is for all weights: the average of a LoRA's two factors is no average of LoRAs")


def warn_if_distilled(pipe: Pipeline) -> None:
    """Warn that the denoising loss undoes the distillation of a few-step model."""
    if pipe.sampling is not None:
        what = f"this model is made for {pipe.sampling}, and this training, which is for many steps, unlearns that"
        way = "train a LoRA for the model it was distilled from and use it here, or train_lightning --plan keep"
        warnings.warn(f"{what}: better {way}", stacklevel=2)


def resolve(config: Config, pipe: Pipeline) -> Config:
    """Settings left open take their values, so that config.json records what was done."""
    is_lora = config.lora_rank is not None
    return replace(
        config,
        resolution=inputs.resolution_for(pipe, config.resolution, config.model),
        ema_decay=(0.0 if is_lora else 0.99) if config.ema_decay is None else config.ema_decay,
        lora_alpha=(config.lora_alpha or float(config.lora_rank)) if is_lora else None,
        lora_targets=(config.lora_targets or "attention") if is_lora else None,
    )


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.finetune", description=__doc__)
