"""Remove blocks from a Stable Diffusion U-Net and train what is left to do the teacher's work (BK-SDM).

    python -m minidistill.train_kd                      the miniature on a CPU, offline, in about three minutes
    python -m minidistill.train_kd --teacher DIR --data DIR --recipe bk-small --device cuda

The student starts from copies of the teacher's weights and learns from three losses: the teacher's own training
objective (task), the teacher's answer (output) and its working, stage by stage (feature). The method is in
`distill/block_removal.py` and `distill/kd.py`; this file is the loop around them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from minidistill.cli import option, run_command
from minidistill.data.cache import LatentCache
from minidistill.data.listing import CAPTION_COLUMN_HELP, SPLIT_CHOICES, SPLIT_HELP
from minidistill.diffusion.schedule import add_noise, make_alpha_bar, training_target
from minidistill.distill import kd
from minidistill.distill.block_removal import (
    PAIRINGS,
    RECIPES,
    Removal,
    build_student,
    feature_pairs,
    plan_removal,
    removal_rows,
)
from minidistill.distill.memory import image_peak, memory_rows, step_peak
from minidistill.errors import InputError
from minidistill.interop.model_card import write_card
from minidistill.interop.publish import open_repo, push
from minidistill.miniature.scenes import Scenes
from minidistill.pipeline import Pipeline, load_pipeline
from minidistill.report import Comparison
from minidistill.training.batches import Batches, Captioned, captions_of
from minidistill.training.curves import draw_curves
from minidistill.training.ema import EMA
from minidistill.training.inputs import check_training, check_weights, open_data, resolution_for
from minidistill.training.log import MetricsLog, format_table
from minidistill.training.optim import (
    PRECISIONS,
    SCHEDULES,
    adamw,
    best_precision,
    check_finite,
    get_device,
    get_precision,
    lr_at,
    optimizer_step,
)
from minidistill.training.run_folder import RunFolder

LOSSES = ("task", "output", "feature")


@dataclass(frozen=True)
class Config:
    teacher: str = option("miniature", "SOURCE of the teacher: a model folder in the diffusers layout, or miniature")
    recipe: str | None = option(
        None,
        "which blocks go, and how losses are weighed; none takes inner for the miniature, bk-tiny for other teachers",
        choices=RECIPES,
    )
    remove: tuple[str, ...] | None = option(
        None, "blocks to remove, as in down.1.1,up.2.1,mid,stage.3,down.2.0@6; none takes the recipe's"
    )
    pairing: str | None = option(None, "which features to compare; none takes the recipe's", choices=PAIRINGS)
    loss_weights: tuple[float, ...] | None = option(
        None, "three weights, of the losses task,output,feature; none takes the recipe's", minimum=0
    )
    feature_norm: bool = option(False, "divide each feature's loss by the teacher's mean square (as LAPTOP-Diff does)")
    copy_weights: bool = option(True, "start from the teacher's weights, not from random ones")
    data: str = option("scenes", "scenes, a folder of images with captions, or a cache of one (minidistill.cache)")
    split: str | None = option(None, SPLIT_HELP, choices=SPLIT_CHOICES)
    caption_column: str | None = option(None, CAPTION_COLUMN_HELP)
    images: int = option(4096, "how many scenes to train on", minimum=1)
    resolution: int | None = option(None, "pixels to train at; none takes the teacher's own", minimum=8)
    random_conditioning: bool = option(
        False, "replace captions by random ones, the more often the noisier: p(t) = exp(-5 (1 - t/T))"
    )
    image_free: int = option(
        0, "train on this many latents that the teacher samples from the data's captions, not on images", minimum=0
    )
    flip: bool = option(False, "show every other image as its mirror image; not where captions say left and right")
    out: str = option("runs/kd", "folder of the run; the student is in OUT/student")
    steps: int = option(288, "optimizer steps", minimum=1)
    batch_size: int = option(16, "samples in a micro-batch", minimum=1)
    accumulate: int = option(1, "micro-batches in an optimizer step", minimum=1)
    learning_rate: float | None = option(
        None, "peak learning rate; none takes 4e-3 for the miniature, the paper's 5e-5 for other teachers", minimum=0
    )
    lr_schedule: str = option("cosine", "after the warm-up", choices=SCHEDULES)
    warmup: int = option(40, "steps of linear warm-up", minimum=0)
    weight_decay: float = option(1e-2, "AdamW's, on all weights", minimum=0)
    max_grad_norm: float | None = option(1.0, "gradients are scaled down to this norm; none leaves them", minimum=0)
    ema_decay: float = option(0.99, "of the averaged weights that become the student; 0 averages nothing", minimum=0)
    caption_dropout: float = option(0.1, "share of samples with the empty caption, which guidance needs", minimum=0)
    gradient_checkpointing: bool = option(False, "recompute the student's activations in backward: less memory, slower")
    seed: int = option(0, "decides everything random")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    precision: str | None = option(
        None, "of the forward passes; none takes bf16 where the device computes in it, else fp32", choices=PRECISIONS
    )
    guidance: float = option(
        4.0, "scale of classifier-free guidance in the images that are shown, judged and (--image-free) trained on"
    )
    judged: int = option(
        48, "held-out captions to judge the result on (scenes only); 0 for none", minimum=0, maximum=len(Scenes("test"))
    )
    log_every: int = option(20, "steps between log lines", minimum=1)
    sample_every: int = option(144, "steps between image grids", minimum=1)
    checkpoint_every: int = option(144, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(2, "how many checkpoints to keep", minimum=1)
    push_to_hub: str | None = option(None, "OWNER/NAME on the Hugging Face Hub that gets the student; none: nobody")
    private: bool = option(False, "the repository that --push-to-hub makes is private")
    resume: bool = option(False, "go on with the run in OUT")
    dry_run: bool = option(False, "print what the run will take, and stop")


# As Nota's released scripts have it: 512 pixels, fp16, checkpointing, flips, EMA, batch 256. The scripts say 400,000
# steps, the paper and the released weights 50,000. One A100 took 300 hours for bk-base, by their account.
NOTA = {
    "resolution": 512,
    "flip": True,
    "steps": 50_000,
    "batch_size": 64,
    "accumulate": 4,
    "learning_rate": 5e-5,
    "lr_schedule": "constant",
    "warmup": 0,
    "ema_decay": 0.9999,
    "caption_dropout": 0.0,
    "gradient_checkpointing": True,
    "seed": 1234,
    "device": "cuda",
    "precision": "fp16",
    "guidance": 7.5,
    "log_every": 50,
    "sample_every": 500,
    "checkpoint_every": 500,
}
# Segmind's sources disagree. Learning rate: 1e-5 in the README, 1e-4 in the script and on the model cards. Batch: 32 in
# the README, 32 x 4 in the others. Loss weights: 0.5 in the README, 1 in the blog's formula. Steps: 100,000 in the blog
# for small, 95,000 on its card. Taken here: the script's numbers with the README's weights (those of the recipe).
# Realistic Vision was published as V4.0 and renamed V4.0_noVAE.
SEGMIND = {
    **NOTA,
    "teacher": "SG161222/Realistic_Vision_V4.0_noVAE",
    "batch_size": 32,
    "learning_rate": 1e-4,
    "lr_schedule": "cosine",
    "ema_decay": 0.0,
    "seed": 647,
}
PRESETS = {
    "quick": {"comment": "the defaults: half of the miniature, below 3 minutes on 2 CPU cores: 65 % right, teacher 96"},
    "best": {
        "comment": "the plain recipe, longer: 82 to 84 % right, teacher 89, of 200; no later idea beat it",
        "steps": 2000,
        "sample_every": 500,
        "checkpoint_every": 500,
    },
    "nota-sd15": {
        "comment": "BK-SDM as published, of SD 1.4: give --data and a --recipe; 12.8 M samples; not yet run here",
        **NOTA,
        "teacher": "CompVis/stable-diffusion-v1-4",
        "recipe": "bk-base",
    },
    "nota-sd21": {
        "comment": "BK-SDM-v2 as published, of SD 2.1-base, batch 128: give --data; 6.4 M samples; not yet run here",
        **NOTA,
        "teacher": "stabilityai/stable-diffusion-2-1-base",
        "recipe": "bk-base",
        "batch_size": 32,
    },
    "segmind-small": {
        "comment": "SD-Small as published: give --data; 12.8 M samples; not yet run here",
        **SEGMIND,
        "recipe": "segmind-small",
        "steps": 100_000,
    },
    "segmind-tiny": {
        "comment": "SD-Tiny as published: give --data; 16 M samples; not yet run here",
        **SEGMIND,
        "recipe": "segmind-tiny",
        "steps": 125_000,
    },
}


def main(config: Config) -> None:
    """Distil, as the configuration says; everything is checked before the first file is written."""
    # A dry run may be of a machine that this is not.
    device = get_device("cpu" if config.dry_run else config.device)
    best = "bf16" if config.dry_run and config.device.startswith("cuda") else best_precision(device)
    config = dataclasses.replace(config, precision=config.precision or best)
    precision = get_precision("fp32" if config.dry_run else config.precision, device)
    check_numbers(config)
    pipe = load_pipeline(config.teacher, device)
    check_weights(pipe, config.teacher)
    config = resolve(config, pipe)
    weights = dict(zip(LOSSES, config.loss_weights, strict=True))
    teacher = pipe.unet.eval().requires_grad_(False)
    removal = plan(config, pipe)
    pairs = feature_pairs(removal, config.pairing)
    torch.manual_seed(config.seed)  # decides a student's weights that are not copied
    student = build_student(removal, teacher if config.copy_weights else None, device)
    student.gradient_checkpointing = config.gradient_checkpointing
    scenes = Scenes("train", length=config.images)
    data = open_data(config.data, config.resolution, scenes, config.split, config.caption_column)

    optimizer = adamw(student.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    ema = EMA(student, config.ema_decay)
    parts = {"student": student, "optimizer": optimizer, "ema": ema, "scaler": precision.scaler}
    settings = {**dataclasses.asdict(config), "examples": data.fingerprint()}  # --resume is for the same images only
    run = RunFolder.find(config.out, settings, config.resume)
    describe(config, pipe, removal)
    if config.dry_run:
        print(dry_run(config, pipe, removal, pairs, config.image_free or len(data)))
        return
    if config.push_to_hub:
        open_repo(config.push_to_hub, config.private)
    batches = open_batches(config, data, pipe)
    run.begin(settings)
    start = run.restore(parts)

    alpha_bar = make_alpha_bar(pipe.schedule).to(device)
    judged = config.judged if config.data == "scenes" else 0
    comparison = Comparison(run, pipe, student, batches, judged, config.guidance, precision.autocast)
    if start == 0:
        comparison.measure("student before", 0)
    with MetricsLog(run.metrics, config.steps, config.log_every, start, len(alpha_bar)) as log:
        for step in range(start, config.steps):
            for k in range(config.accumulate):
                x0, context, eps, t, _, added_cond = batches[step * config.accumulate + k]
                x_t = add_noise(x0, eps, t, alpha_bar)
                with precision.autocast, torch.no_grad():
                    teacher_out, teacher_features = teacher(x_t, t, context, added_cond, return_features=True)
                with precision.autocast:
                    student_out, student_features = student(x_t, t, context, added_cond, return_features=True)
                target = training_target(x0, eps, t, alpha_bar, pipe.schedule.prediction_type)
                losses = {
                    "task": kd.task_loss(student_out, target),
                    "output": kd.output_loss(student_out, teacher_out),
                    "feature": kd.feature_loss(student_features, teacher_features, pairs, config.feature_norm),
                }
                per_sample = sum(weights[name] * loss for name, loss in losses.items())  # (B,)
                check_finite(per_sample, step + 1, t)
                if step == start and k == 0:
                    kd.check_gradients(losses, student, teacher)
                precision.scaler.scale(per_sample.mean() / config.accumulate).backward()
                log.add({"loss": per_sample.mean(), **{n: v.mean() for n, v in losses.items()}}, per_sample, t)

            lr = lr_at(step, config.learning_rate, config.warmup, config.steps, config.lr_schedule)
            norm = optimizer_step(student, optimizer, precision.scaler, lr, config.max_grad_norm)
            if not precision.scaler.is_enabled():  # it would have skipped this step; so the weights are lost
                check_finite(norm, step + 1, t, "gradient norm")
            ema.update()
            log.end_step(step + 1, lr=lr, grad_norm=norm)

            with log.untimed():
                done = step + 1
                if done % config.sample_every == 0 and done < config.steps:
                    with ema.swap():
                        comparison.look(done)
                if done % config.checkpoint_every == 0 or done == config.steps:
                    run.save(done, parts, config.keep_checkpoints)

    with ema.swap():
        comparison.measure("student after", config.steps)
        comparison.student.save(run.path / "student")
    draw_curves(run.metrics, run.curves)
    folder = run.path / "student"
    write_card(folder, "student", settings, comparison.results, run.last_image_grid(config.steps), config.push_to_hub)
    print(f"\n{comparison.table()}\n")
    print(f"student   {folder}\nimages  {run.last_image_grid(config.steps)}\ncurves    {run.curves}")
    if config.push_to_hub:
        print(f"online    {push(folder, config.push_to_hub, config.private)}")


def check_numbers(config: Config) -> None:
    """Refuse numbers that no flag's minimum can."""
    if config.loss_weights is not None and (len(config.loss_weights) != len(LOSSES) or not any(config.loss_weights)):
        raise InputError("--loss-weights takes three numbers, task,output,feature, not all of them zero")
    if config.flip and config.image_free:
        raise InputError("--flip needs images to mirror, and --image-free trains on none: leave out one of them")
    check_training(config)


def resolve(config: Config, pipe: Pipeline) -> Config:
    """Settings left open take the recipe's or the teacher's values, so that the run folder records what was done."""
    usual, rate = ("inner", 4e-3) if config.teacher == "miniature" else ("bk-tiny", 5e-5)
    name = config.recipe or usual
    recipe = RECIPES[name]
    return dataclasses.replace(
        config,
        recipe=name,
        remove=recipe.remove if config.remove is None else config.remove,
        pairing=config.pairing or recipe.pairing,
        loss_weights=config.loss_weights or recipe.loss_weights,
        resolution=resolution_for(pipe, config.resolution, config.teacher),
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
    )


def plan(config: Config, pipe: Pipeline) -> Removal:
    """What --recipe or --remove means for this teacher."""
    if not config.remove:
        raise InputError("--remove names no block; none takes the recipe's")
    try:
        return plan_removal(pipe.unet.config, config.remove)
    except InputError as error:
        is_recipe = config.remove == RECIPES[config.recipe].remove
        flag = f"--recipe {config.recipe}" if is_recipe else f"--remove {','.join(config.remove)}"
        hint = "; --remove takes a list of your own" if is_recipe else ""
        raise InputError(f"{flag} does not fit {config.teacher}: {error}{hint}") from error


def open_batches(config: Config, data: Captioned | LatentCache, pipe: Pipeline) -> Batches:
    """Batches of the data; with --image-free, of latents made now by the teacher from their captions."""
    if config.image_free:
        captions = [captions_of(data, i % len(data))[0] for i in range(config.image_free)]
        data = kd.sample_latents(pipe, captions, config.resolution, config.seed, config.guidance, config.batch_size)
    kind = kd.RandomCaptions if config.random_conditioning else Batches
    return kind(
        data,
        pipe,
        batch_size=config.batch_size,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        flip=config.flip,
    )


def describe(config: Config, pipe: Pipeline, removal: Removal) -> None:
    """Print what goes away, and what that saves at the size of the training images."""
    side = config.resolution // pipe.vae.config.downscale
    print(format_table(removal_rows(removal, side, side, pipe.tokenizers[0].max_length)) + "\n", flush=True)


def dry_run(config: Config, pipe: Pipeline, removal: Removal, pairs: list[tuple[str, str]], images: int) -> str:
    """What the run will take, for reading."""
    side = config.resolution // pipe.vae.config.downscale
    inputs = (config.batch_size, side, side, pipe.tokenizers[0].max_length)
    step = step_peak(
        removal, pairs, inputs, half=config.precision != "fp32", checkpointing=config.gradient_checkpointing
    )
    peaks = step, image_peak(pipe.vae, side)
    rows = memory_rows(removal, [pipe.vae, *pipe.text_encoders], *peaks, config.ema_decay > 0)
    seen = config.steps * config.accumulate * config.batch_size
    return (
        f"{format_table(rows)}\n\n{config.steps} steps of {config.accumulate} x {config.batch_size} samples: each of "
        f"{images} images is seen {seen / images:.1f} times"
    )


if __name__ == "__main__":
    run_command(main, Config, PRESETS, prog="python -m minidistill.train_kd", description=__doc__)
