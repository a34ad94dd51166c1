"""Remove blocks from a Stable Diffusion U-Net and distil the teacher into what is left (BK-SDM, arXiv 2305.15798).

    python -m minidistill.train_kd                      the miniature on a CPU, offline, in about three minutes
    python -m minidistill.train_kd --teacher DIR --data DIR --recipe bk-small --device cuda

The student starts from copies of the teacher's weights and learns from three losses: the teacher's own training
objective (task), the teacher's prediction (output) and its intermediate features (feature). The method is in
`distill/block_removal.py` and `distill/kd.py`; `main` is the training loop.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from minidistill.cli import option, run_command
from minidistill.diffusion.schedule import add_noise, make_alpha_bar, training_target
from minidistill.distill import block_removal, kd
from minidistill.distill.block_removal import PAIRINGS, RECIPES, Removal
from minidistill.distill.memory import image_peak, memory_rows, step_peak
from minidistill.distill.probes import make_probes
from minidistill.distill.published import PUBLISHED
from minidistill.distill.random_conditioning import RandomCaptions, sample_latents
from minidistill.errors import InputError
from minidistill.miniature.scenes import Scenes
from minidistill.pipeline import Pipeline, load_pipeline
from minidistill.report import Report, unet_numbers
from minidistill.settings import SMALL, TrainingConfig
from minidistill.training import inputs, optim, parallel
from minidistill.training.batches import Batches, Latents, captions_of
from minidistill.training.device import (
    PRECISIONS,
    Precision,
    best_precision,
    check_compiler,
    compiled,
    get_device,
    get_precision,
    to_precision,
)
from minidistill.training.ema import EMA
from minidistill.training.log import MetricsLog, format_table
from minidistill.training.run_folder import RunFolder

LOSSES = ("task", "output", "feature")
PROBES = 64  # noisy latents, at least, on which the predictions of student and teacher are compared
FEW = 100_000  # samples: too few for a larger teacher; published runs took 6 to 16 million


@dataclass(frozen=True)
class Config(TrainingConfig):
    teacher: str = option("miniature", "teacher: a model folder, a Hub id, a single file, or miniature")
    recipe: str = option("bk-tiny", "pruning recipe: blocks to remove and default loss weights", choices=RECIPES)
    remove: tuple[str, ...] | None = option(None, "blocks to remove: down.1.1,mid,stage.3 (default: from the recipe)")
    copy_weights: bool = option(True, "initialise the student with the teacher's weights, not at random")
    pairing: str | None = option(None, "which features to compare (default: from the recipe)", choices=PAIRINGS)
    loss_weights: tuple[float, ...] | None = option(
        None, "weights of the task, output and feature loss (default: from the recipe)", minimum=0
    )
    feature_norm: bool = option(False, "divide each feature's loss by the teacher's mean square, as in LAPTOP-Diff")
    random_conditioning: bool = option(False, "replace captions by random ones with probability exp(-5 (1 - t/T))")
    image_free: int = option(0, "train on N latents that the teacher samples from captions, not on images", minimum=0)
    steps: int = option(500, "optimizer steps", minimum=1)
    batch_size: int = option(16, "samples per micro-batch", minimum=1)
    learning_rate: float | None = option(
        None, "peak learning rate (default: the paper's 5e-5, for small teachers 4e-3)", minimum=0
    )
    warmup: int = option(40, "steps of linear warm-up", minimum=0)
    ema_decay: float = option(0.99, "EMA decay of the student's weights; 0 disables it", minimum=0)
    precision: str | None = option(None, "precision (default: bf16 if the device computes it, else fp32)", PRECISIONS)
    guidance: float = option(4.0, "classifier-free guidance of sampled images, and of --image-free latents")
    compile: bool = option(False, "compile both U-Nets (torch.compile): minutes at the start, faster steps then")
    out: str = option("runs/kd", "run folder; the student is written to OUT/student")
    log_every: int = option(20, "steps between log lines", minimum=1)
    sample_every: int = option(250, "steps between image grids", minimum=1)
    checkpoint_every: int = option(250, "steps between checkpoints", minimum=1)
    dry_run: bool = option(False, "print the memory and the number of samples of the run, and stop")


PRESETS = {
    "quick": {"comment": "the defaults: under 3 minutes on 2 cores; 21 % all attributes correct, teacher 88 %"},
    "best": {
        "comment": "the same, longer: 60 % all attributes correct of 200 captions, teacher 80 %",
        "steps": 2000,
        "sample_every": 500,
        "checkpoint_every": 500,
    },
    **PUBLISHED,
}


class Run(NamedTuple):
    """What the training loop needs."""

    config: Config  # every setting resolved
    settings: dict[str, Any]  # config.json: the config, and fingerprints of the model and of the data
    folder: RunFolder
    teacher: Pipeline
    student: Pipeline
    pairs: list[tuple[str, str]]  # of features to compare: (teacher's, student's)
    batches: Batches
    precision: Precision
    optimizer: torch.optim.Optimizer
    ema: EMA
    report: Report | None  # None: nothing is measured


def main(config: Config) -> None:
    """Distil the teacher into a student with fewer blocks (arXiv 2305.15798, section 3.2)."""
    run = set_up(config)
    config, precision, optimizer, ema = run.config, run.precision, run.optimizer, run.ema
    teacher, student, schedule = run.teacher.unet, run.student.unet, run.teacher.schedule
    predict_teacher, predict_student = (compiled(unet) if config.compile else unet for unet in (teacher, student))
    alpha_bar = make_alpha_bar(schedule).to(run.teacher.device)
    weights = dict(zip(LOSSES, config.loss_weights, strict=True))

    run.folder.begin(run.settings)
    if config.compile:
        print("compiling both U-Nets in the first step: minutes, in which nothing else is printed", flush=True)
    parts = {"student": student, "optimizer": optimizer, "ema": ema, "scaler": precision.scaler}
    start = run.folder.restore(parts)
    if start == 0:
        run.report.measure("student before", parallel.whole_pipeline(run.student), 0)
    with MetricsLog(run.folder.metrics, config.steps, config.log_every, start, len(alpha_bar)) as log:
        for step in range(start, config.steps):
            for k in range(config.accumulate):
                batch = run.batches[step * config.accumulate + k]
                x_t = add_noise(batch.x0, batch.eps, batch.t, alpha_bar)
                inputs = x_t, batch.t, batch.context, batch.added_cond
                with precision.autocast, torch.no_grad():
                    teacher_out, teacher_features = predict_teacher(*inputs, return_features=True)
                with precision.autocast:
                    student_out, student_features = predict_student(*inputs, return_features=True)
                target = training_target(batch.x0, batch.eps, batch.t, alpha_bar, schedule.prediction_type)
                losses = {
                    "task": kd.task_loss(student_out, target),
                    "output": kd.output_loss(student_out, teacher_out),
                    "feature": kd.feature_loss(student_features, teacher_features, run.pairs, config.feature_norm),
                }
                loss = sum(weights[name] * value for name, value in losses.items())  # (B,)
                optim.check_finite(loss, step + 1, batch.t)
                if step == start and k == 0:
                    kd.check_gradients(losses, student, teacher)
                precision.scaler.scale(loss.mean() / config.accumulate).backward()
                log.add({"loss": loss.mean(), **{name: value.mean() for name, value in losses.items()}}, loss, batch.t)

            lr = optim.lr_at(step, config.learning_rate, config.warmup, config.steps, config.lr_schedule)
            clip = config.max_grad_norm
            norm = optim.optimizer_step(student, optimizer, precision.scaler, lr, clip, step + 1, batch.t)
            ema.update()
            done = step + 1
            log.end_step(done, lr=lr, grad_norm=norm)

            with log.untimed():
                if done % config.sample_every == 0 and done < config.steps:
                    with ema.swap():
                        run.report.look(parallel.whole_pipeline(run.student), done)
                if done % config.checkpoint_every == 0 or done == config.steps:
                    run.folder.save(done, parts, config.keep_checkpoints)

    with ema.swap():
        result = parallel.whole_pipeline(run.student)
        run.report.measure("student after", result, config.steps)
        if parallel.is_first():
            result.save(run.folder.path / "student", PRECISIONS.get(config.dtype))
            run.report.finish(run.folder.path / "student", "student", None, run.settings)


def set_up(config: Config, *, measured: bool = True) -> Run:
    """Check all settings, build the student and what trains it, measure the teacher. No file is written.

    measured: False for a run without a report, the steps of which are only timed.
    """
    device = parallel.join(get_device(config.device, config.deterministic), config.parallel)
    if config.compile:
        check_compiler(device, config.parallel)
    config, pipe, removal, data = plan(config, device)
    smallest = inputs.smallest_map(removal.student, config.resolution // pipe.vae.config.downscale)
    config = dataclasses.replace(config, precision=config.precision or best_precision(device, smallest))
    precision = get_precision(config.precision, device, smallest)
    pairs = block_removal.feature_pairs(removal, config.pairing)
    settings, folder = inputs.find_run(dataclasses.asdict(config), pipe, data)
    describe(config, pipe, removal, data)

    teacher = pipe.unet.eval().requires_grad_(False)
    torch.manual_seed(config.seed)  # for weights of the student that are not copied
    student = copy.copy(pipe)
    student.unet = block_removal.build_student(removal, teacher if config.copy_weights else None, device)
    student.unet.gradient_checkpointing = config.gradient_checkpointing
    batches = open_batches(config, data, pipe, precision)
    report = make_report(config, folder, batches, pipe, precision) if measured else None
    to_precision(teacher, config.precision)  # once it is copied and measured
    for network in (teacher, student.unet):
        parallel.shard(network, config.parallel)
    optimizer = optim.adamw(student.unet.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    ema = EMA(student.unet, config.ema_decay)
    return Run(config, settings, folder, pipe, student, pairs, batches.share(), precision, optimizer, ema, report)


def make_report(config: Config, folder: RunFolder, batches: Batches, pipe: Pipeline, precision: Precision) -> Report:
    """Measures the teacher; probes are batches of numbers that no step takes."""
    probes = make_probes(batches, range(-math.ceil(PROBES / config.batch_size), 0))
    return Report(
        folder,
        batches,
        lambda model: unet_numbers(model.unet, probes),
        ("teacher", pipe),
        trained="student",
        judged=config.judged if config.data == "scenes" else 0,
        idle=batches.idle,
        guidance=config.guidance,
        autocast=precision.autocast,
    )


def plan(config: Config, device: torch.device) -> tuple[Config, Pipeline, Removal, inputs.Data]:
    """All settings resolved and checked, the teacher, what is removed from it, and the data. Nothing is printed."""
    if config.loss_weights is not None and (len(config.loss_weights) != len(LOSSES) or not any(config.loss_weights)):
        raise InputError("--loss-weights takes three numbers, task,output,feature, not all of them zero")
    if config.flip and config.image_free:
        raise InputError("--flip needs images to mirror, and --image-free trains on none: leave out one of them")
    inputs.check_training(config)
    pipe = load_pipeline(config.teacher, device)
    inputs.check_weights(pipe, config.teacher)
    config = resolve(config, pipe)
    removal = block_removal.find_removal(pipe.unet.config, config.teacher, config.recipe, config.remove)
    scenes = Scenes("train", length=config.images)
    data = inputs.open_data(config.data, config.resolution, scenes, config.split, config.caption_column)
    return config, pipe, removal, data


def describe(config: Config, pipe: Pipeline, removal: Removal, data: inputs.Data) -> None:
    """Print what the data are and what is removed from the teacher."""
    inputs.print_summary(data)
    side = config.resolution // pipe.vae.config.downscale
    rows = block_removal.removal_rows(removal, side, side, pipe.tokenizers[0].max_length)
    print(format_table(rows) + "\n", flush=True)


def resolve(config: Config, pipe: Pipeline) -> Config:
    """Settings left open take the recipe's or the teacher's values, so that config.json records what was done."""
    size, samples = sum(p.numel() for p in pipe.unet.parameters()), config.steps * config.accumulate * config.batch_size
    if size >= SMALL and samples < FEW:
        few = f"{samples:,} samples (steps x batch size) are far too few for a teacher of {size / 1e6:.0f} M parameters"
        warnings.warn(f"{few}: published runs took 6 to 16 million (--preset nota-sd15)", stacklevel=2)
    recipe, rate = RECIPES[config.recipe], 4e-3 if size < SMALL else 5e-5
    return dataclasses.replace(
        config,
        remove=recipe.remove if config.remove is None else config.remove,
        pairing=config.pairing or recipe.pairing,
        loss_weights=config.loss_weights or recipe.loss_weights,
        resolution=inputs.resolution_for(pipe, config.resolution, config.teacher),
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
    )


def open_batches(config: Config, data: inputs.Data | Latents, pipe: Pipeline, precision: Precision) -> Batches:
    """Batches of the data; with --image-free, of latents that the teacher now samples from its captions."""
    if config.image_free:
        captions = [captions_of(data, i % len(data))[0] for i in range(config.image_free)]
        data = sample_latents(pipe, captions, config.resolution, config.seed, config.guidance, config.batch_size)
    kind = RandomCaptions if config.random_conditioning else Batches
    settings = {"seed": config.seed, "caption_dropout": config.caption_dropout, "flip": config.flip}
    return kind(data, pipe, batch_size=config.batch_size, autocast=precision.autocast, **settings)


def dry_run(config: Config) -> None:
    """Print the memory and the number of samples that a run takes. Its device need not be in this machine."""
    here = get_device("auto" if config.device == "auto" else "cpu")
    best = "bf16" if config.device.startswith("cuda") else best_precision(here)
    config = dataclasses.replace(config, precision=config.precision or best)
    device = parallel.join(torch.device("cpu"), config.parallel)
    held, size = parallel.held(config.parallel), parallel.share_of(config.batch_size)
    config, pipe, removal, data = plan(config, device)
    describe(config, pipe, removal, data)
    side = config.resolution // pipe.vae.config.downscale
    half = config.precision != "fp32"
    step = step_peak(
        removal,
        block_removal.feature_pairs(removal, config.pairing),
        (size, side, side, pipe.tokenizers[0].max_length),
        half=half,
        checkpointing=config.gradient_checkpointing,
        accumulate=config.accumulate > 1,
        share=held.states,
    )
    image, others = image_peak(pipe.vae, side), [pipe.vae, *pipe.text_encoders]
    rows = memory_rows(removal, others, step, image, config.ema_decay > 0, half, held)
    images, samples = config.image_free or len(data), config.steps * config.accumulate * config.batch_size
    shape = f"{config.steps} steps of {config.accumulate} x {config.batch_size} samples"
    print(f"{format_table(rows)}\n\n{shape}: each of {images} images is seen {samples / images:.1f} times")


def command(config: Config) -> None:
    """Train, or with --dry-run print what that takes."""
    (dry_run if config.dry_run else main)(config)


if __name__ == "__main__":
    run_command(command, Config, PRESETS, prog="python -m minidistill.train_kd", description=__doc__)
