"""Distil a Stable Diffusion into students of fewer and fewer sampling steps (SDXL-Lightning, arXiv 2402.13929).

    python -m minidistill.train_lightning                the miniature on a CPU, offline, in about ten minutes
    python -m minidistill.train_lightning --preset sdxl-one-gpu --teacher DIR --data DIR

Each stage makes a student of a model with more steps: first by mean squared error from the teacher with guidance, then
against a discriminator that is made of the teacher's encoder. The students are written to OUT/8-step and so on. The
procedure is a table, in `distill/lightning.py`; the equations are in `distill/progressive.py` and `adversarial.py`, the
networks of a phase in `distill/players.py`, the students in `distill/ladder.py`; `train_phase` is the training loop.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidistill.cli import option, run_command
from minidistill.diffusion.sampling import Sampling
from minidistill.diffusion.schedule import make_alpha_bar
from minidistill.distill.adversarial import verdict
from minidistill.distill.block_removal import RECIPES, Removal, find_removal, removal_rows
from minidistill.distill.kd import mean_square
from minidistill.distill.ladder import (
    LORA_FILE,
    Ladder,
    Start,
    keep_exact,
    load_student,
    round_text_encoders,
    save_student,
    student_pipeline,
)
from minidistill.distill.lightning import PLANS, TRIALS, Stage, choose, legs, only_lora, stage_rows
from minidistill.distill.memory import image_peak, stage_memory_rows
from minidistill.distill.players import Players, assemble, contest, endpoints, match, ranking
from minidistill.distill.progressive import convert_loss
from minidistill.errors import InputError
from minidistill.interop.model_card import CARD, GRID, write_card
from minidistill.metrics.cost import on_device
from minidistill.miniature.scenes import Scenes
from minidistill.models.unet import UNet
from minidistill.pipeline import Pipeline, load_pipeline
from minidistill.report import SEED, Report, draw, save_image_grid
from minidistill.settings import SMALL, RunConfig
from minidistill.training import inputs, optim, parallel
from minidistill.training.batches import Batches
from minidistill.training.device import best_precision, get_device, get_precision
from minidistill.training.log import MetricsLog, format_table
from minidistill.training.state import unpack

REFERENCE = 32  # sampling steps of the teacher in image grids and in the table
GUIDANCE = 4.0
PAIRS = 128  # at least, on which the discriminator's ranking is measured
COMPARED = 16  # samples whose latents are compared with the teacher's


@dataclass(frozen=True)
class Config(RunConfig):
    teacher: str = option("miniature", "teacher: a model folder, a Hub id, a single file, or miniature")
    start_from: str | None = option(None, "distilled student that the ladder goes on from: a model, U-Net or LoRA")
    recipe: str | None = option(None, "pruning recipe: the students have fewer blocks too", choices=RECIPES)
    remove: tuple[str, ...] | None = option(None, "blocks to remove: down.1.1,mid,stage.3 (default: from the recipe)")
    plan: str | None = option(None, "stages and phases (default: one-gpu, for small teachers demo)", choices=PLANS)
    stages: tuple[int, ...] | None = option(None, "sampling steps of the students (default: all of the plan)")
    length: float = option(1.0, "multiply the optimizer steps of every phase", minimum=0)
    guidance: float | None = option(
        None,
        "guidance of the first teacher; students need none (default: 4, off for distilled teachers)",
        minimum=1,
    )
    pure_noise: bool = option(True, "train on pure noise at the last timestep (eq. 24), as in sampling")
    zero_snr: bool = option(False, "instead of that, students of v-prediction on a schedule that ends in pure noise")
    lora_rank: int = option(64, "rank of the LoRA in phases that train one", minimum=1)
    lora_alpha: float = option(8.0, "scale the LoRA by alpha / rank", minimum=0)
    out: str = option("runs/lightning", "run folder; the students are written to OUT/8-step, OUT/4-step, ...")
    batch_size: int = option(16, "samples per micro-batch", minimum=1)
    precision: str | None = option(
        None, "precision (default: bf16 if the device computes it, else fp32)", choices=("fp32", "bf16")
    )
    log_every: int = option(10, "steps between log lines", minimum=1)
    sample_every: int = option(100, "steps between image grids", minimum=1)
    checkpoint_every: int = option(100, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(1, "number of checkpoints to keep", minimum=1)
    dry_run: bool = option(False, "print the stages, their memory and the number of samples, and stop")
    push_to_hub: str | None = option(None, "upload the last student to this Hub repository (owner/name)")


SDXL = {  # 1024 pixels, guidance 6, bf16
    "teacher": "stabilityai/stable-diffusion-xl-base-1.0",
    "resolution": 1024,
    "guidance": 6.0,
    "gradient_checkpointing": True,
    "device": "cuda",
    "precision": "bf16",
    "log_every": 50,
    "sample_every": 500,
    "checkpoint_every": 500,
}
PRESETS = {
    "quick": {"comment": "the defaults: students of 8, 4, 2 and 1 steps of the miniature"},
    "best": {
        "comment": "the miniature's students, longer, as one LoRA: an hour on two cores",
        "plan": "best",
        "lora_rank": 16,
        "lora_alpha": 16.0,
    },
    "sdxl-lightning": {
        "comment": "the paper's settings, batch 512; its optimizer steps are ours; give --data; not yet run here",
        **SDXL,
        "plan": "paper",
        "batch_size": 8,
        "accumulate": 64,
    },
    "sdxl-one-gpu": {
        "comment": "a LoRA of 8, 4 and 2 steps on one GPU, heads on a frozen backbone; give --data; not yet run here",
        **SDXL,
        "plan": "one-gpu",
        "batch_size": 4,
        "accumulate": 8,
    },
}


def main(config: Config) -> None:
    """Distil the teacher stage by stage (arXiv 2402.13929, section 3)."""
    ladder, report = set_up(config)
    folder, total = ladder.folder, ladder.settings["steps"]
    folder.begin(ladder.settings)
    if ladder.start and (name := f"start, {ladder.start.student} steps") not in report.results:
        report.measure(name, student_pipeline(ladder, ladder.start, load_student(ladder, -1)), 0)
    checkpoint = folder.latest_checkpoint()  # of step S: of the phase that does step S + 1
    start = checkpoint.step if checkpoint else 0
    unet: UNet | None = None
    with MetricsLog(folder.metrics, total, config.log_every, start, len(ladder.alpha_bar)) as log:
        for leg in legs(ladder.stages):
            if leg.last <= start and leg.last < total:
                continue
            players = assemble(ladder, leg, unet, fresh=checkpoint is None)
            if checkpoint is not None:
                unpack(checkpoint.tensors, checkpoint.meta, players.parts)
                print(f"resuming at step {start}", flush=True)
                checkpoint = None
            elif leg.first > 0:
                folder.save(leg.first, players.parts, config.keep_checkpoints)
            print(f"{leg.stage.name}, {leg.phase.label}: steps {leg.first + 1} to {leg.last}", flush=True)
            train_phase(ladder, players, report, log, max(start, leg.first))
            unet = parallel.whole(players.student)
            del players  # the other networks make room for those of the next phase
            if leg.ends_stage:
                with log.untimed():
                    if parallel.is_first():
                        save_student(ladder, leg.stage, unet)
                    parallel.wait()  # the next stage reads it
                    report.measure(leg.stage.name, student_pipeline(ladder, leg.stage, unet), leg.last)
    finish(ladder, report)


def train_phase(ladder: Ladder, players: Players, report: Report, log: MetricsLog, start: int) -> None:
    """The optimizer steps of one phase, from `start` on. All players learn at once, from the weights of before."""
    config, leg, phase = ladder.config, players.leg, players.leg.phase
    for step in range(start, leg.last):
        done, trains = step + 1, step - leg.first >= phase.head_start  # before that, only the discriminator trains
        for k in range(step * config.accumulate, done * config.accumulate):
            batch = ladder.batches[k]
            jump = endpoints(ladder, players, batch, trains)  # (6) to (15)
            losses, measures = {}, {}
            if jump.x_real is not None:
                losses["mse"] = mean_square(jump.x_fake, jump.x_real)  # (16)
            if players.frozen is not None:
                frozen = jump.frozen_out, jump.x_t, jump.t, ladder.alpha_bar, players.frozen.prediction
                losses["convert"] = convert_loss(jump.out, *frozen)  # (29)
            if phase.matching:
                losses["matching"], measures = match(ladder, players, batch, jump, k)
            loss = target = sum(getattr(phase, name) * value for name, value in losses.items())  # (B,)
            if phase.adversarial:
                losses["adversarial"], pull, more = contest(ladder, players, batch, jump, k, trains)  # (18) to (21)
                loss = loss + phase.adversarial * losses["adversarial"]
                target = target + phase.adversarial * (jump.x_fake * pull).flatten(1).sum(1)  # with L_G's gradient
                measures |= more
            optim.check_finite(loss, done, jump.t)
            if trains:
                (target.mean() / config.accumulate).backward()
            means = {name: value.mean() for name, value in losses.items()}
            log.add({"loss": loss.mean(), **means, **measures}, loss, jump.t)

        now = optim.lr_at(step - leg.first, 1.0, phase.warmup, phase.steps, phase.schedule)
        norms = {
            name: optim.optimizer_step(
                player.network, player.optimizer, ladder.scaler, now * player.rate, config.max_grad_norm, done, jump.t
            )
            for name, player in players.trained.items()
            if name != "student" or trains
        }
        log.end_step(done, lr=now * phase.learning_rate, grad_norm=norms.get("student", 0.0))
        with log.untimed():
            if done % config.sample_every == 0 or done == leg.last:
                look(ladder, players, report, done)
            if (done % config.checkpoint_every == 0 and done < leg.last) or done == ladder.settings["steps"]:
                ladder.folder.save(done, players.parts, config.keep_checkpoints)


def look(ladder: Ladder, players: Players, report: Report, step: int) -> None:
    """An image grid, and how well the discriminator ranks held-out pairs; a warning if it teaches nothing."""
    if step < players.leg.last or not players.leg.ends_stage:  # there the student is measured, and drawn
        report.look(student_pipeline(ladder, players.leg.stage, parallel.whole(players.student)), step)
    if players.discriminator is not None:
        accuracy, by_chance, count = ranking(ladder, players, PAIRS)
        chance = f"random heads {min(by_chance):.0%} to {max(by_chance):.0%}"
        print(f"the discriminator ranks {accuracy:.0%} of {count} held-out pairs correctly ({chance})", flush=True)
        if problem := verdict(accuracy, count, by_chance):
            warnings.warn(f"step {step}: the discriminator {problem} ({accuracy:.0%} of {count} pairs)", stacklevel=2)


class Setup(NamedTuple):
    """What a run does, all of it checked."""

    config: Config  # every setting resolved
    stages: tuple[Stage, ...]
    pipe: Pipeline  # the first teacher
    start: Start | None
    removal: Removal | None
    data: inputs.Data


def set_up(config: Config) -> tuple[Ladder, Report]:
    """Check all settings, load the teacher and the data, measure the teacher. No file is written."""
    device = parallel.join(get_device(config.device, config.deterministic), config.parallel)
    setup = check(config, device)
    config, stages, pipe, start, removal, data = setup
    smallest = inputs.smallest_map(pipe.unet.config, config.resolution // pipe.vae.config.downscale)
    config = dataclasses.replace(config, precision=config.precision or best_precision(device, smallest))
    precision = get_precision(config.precision, device, smallest)
    about = {"steps": list(legs(stages))[-1].last, "phases": [dataclasses.asdict(stage) for stage in stages]}
    if start:
        about["start_weights"] = inputs.weights_fingerprint(start.pipe)
    settings, folder = inputs.find_run({**dataclasses.asdict(config), **about}, pipe, data)
    describe(setup)

    for network in (pipe.vae, *pipe.networks.values()):
        network.eval().requires_grad_(False)
    exact = keep_exact(stages, pipe, config.precision)
    batches = Batches(data, pipe, batch_size=config.batch_size, seed=config.seed, autocast=precision.autocast).share()
    absent, own = pipe.encode_prompts([None]), make_alpha_bar(pipe.schedule).to(device)
    round_text_encoders(stages, pipe, config.precision)
    zero = dataclasses.replace(pipe.schedule, rescale_betas_zero_snr=True)
    alpha_bar = make_alpha_bar(zero).to(device) if config.zero_snr else own
    begin = start and Stage(start.pipe.sampling.steps, 0, (), start.pipe.sampling.prediction == "sample")
    ladder = Ladder(
        config, settings, stages, begin, folder, pipe, exact, removal, batches, absent, alpha_bar, own, *precision
    )
    report = open_report(ladder)
    parallel.shard(pipe.unet, config.parallel)
    return ladder, report


def check(config: Config, device: torch.device) -> Setup:
    """Check all settings, load the teacher, open the data. Nothing is printed. InputError: something does not fit."""
    if config.length <= 0 or config.lora_alpha == 0 or config.max_grad_norm == 0:
        raise InputError("--length, --lora-alpha and --max-grad-norm must be above 0, or nothing trains")
    pipe = load_pipeline(config.teacher, device)
    inputs.check_weights(pipe, config.teacher)
    start = Start.open(pipe, config.start_from) if config.start_from else None
    size = sum(weight.numel() for weight in pipe.unet.parameters())
    config = dataclasses.replace(
        config,
        plan=config.plan or ("demo" if size < SMALL else "one-gpu"),
        resolution=inputs.resolution_for(pipe, config.resolution, config.teacher),
        guidance=config.guidance or (pipe.sampling.guidance if pipe.sampling else GUIDANCE),
    )
    distilled = (start.pipe if start else pipe).sampling
    stages = choose((PLANS | TRIALS)[config.plan], config.stages, config.length, distilled)
    if start:
        start.check(pipe, config.zero_snr, only_lora(stages))
    if start and start.lora and only_lora(stages):
        config = dataclasses.replace(config, lora_rank=len(start.lora.down), lora_alpha=start.lora.alpha)
    if config.zero_snr and only_lora(stages):
        raise InputError(f"--zero-snr changes what students predict, which a LoRA, as of plan {config.plan}, cannot")
    if config.parallel != "ddp" and only_lora(stages):
        raise InputError(f"--parallel {config.parallel}: plan {config.plan} trains a LoRA beside one U-Net; take ddp")
    removal = None
    if config.recipe or config.remove is not None:
        if start:
            raise InputError("--start-from names a student with blocks of its own: leave out --recipe and --remove")
        if only_lora(stages):
            what = f"plan {config.plan} trains nothing but a LoRA, for all blocks of the teacher"
            raise InputError(f"{what}: to remove some, take --plan paper, which trains all weights, or demo")
        removal = find_removal(pipe.unet.config, config.teacher, config.recipe, config.remove)
    config = dataclasses.replace(config, remove=removal and removal.removed)
    scenes = Scenes("train", length=config.images)
    data = inputs.open_data(config.data, config.resolution, scenes, config.split, config.caption_column)
    return Setup(config, stages, pipe, start, removal, data)


def describe(setup: Setup) -> None:
    """Print what the data are, what is removed from the teacher, and the stages."""
    config, stages, pipe, start, removal, data = setup
    inputs.print_summary(data)
    side = config.resolution // pipe.vae.config.downscale
    if removal:
        print(format_table(removal_rows(removal, side, side, pipe.tokenizers[0].max_length)) + "\n")
    print(format_table(stage_rows(stages, config.guidance, bool(start))) + "\n", flush=True)


def open_report(ladder: Ladder) -> Report:
    """The report, in which the teacher is sampled as it was distilled, else in 32 steps with guidance."""
    config, batches, autocast = ladder.config, ladder.batches, ladder.autocast
    teacher = copy.copy(ladder.pipe)
    usual = Sampling(REFERENCE, guidance=config.guidance, prediction=teacher.schedule.prediction_type)
    teacher.set_sampling(teacher.sampling or usual)
    captions, (width, height) = batches.captions(COMPARED), batches.size

    def latents(model: Pipeline) -> Tensor:
        with on_device(batches.idle, model.device), autocast:
            return model(captions, seed=SEED, height=height, width=width, output="latents")

    reference = cache(lambda: latents(teacher))

    def numbers(model: Pipeline) -> dict[str, Any]:
        size = {"parameters": sum(weight.numel() for weight in model.unet.parameters())} if ladder.removal else {}
        return {**size, "distance_to_teacher": mean_square(latents(model), reference()).mean().item()}

    name, judged = f"teacher, {teacher.sampling.steps} steps", config.judged if config.data == "scenes" else 0
    report = Report(
        ladder.folder, batches, numbers, (name, teacher), trained="student", judged=judged, idle=batches.idle,
        autocast=autocast,
    )  # fmt: skip
    if parallel.is_first():
        reference()  # now, while this process has all of the teacher
    return report


def finish(ladder: Ladder, report: Report) -> None:
    """One image grid of the teacher and all students, the table, and a model card for each student."""
    if not parallel.is_first():
        return
    last, rows, labels = ladder.stages[-1], [report.upper_row], [report.reference]
    for index, stage in enumerate(ladder.stages):
        student = student_pipeline(ladder, stage, load_student(ladder, index))
        with on_device(ladder.batches.idle, student.device):
            rows.append(draw(student, report.captions, report.size, SEED, autocast=ladder.autocast))
        labels.append(f"student, {stage.name}")
    grid = ladder.folder.image_grid(ladder.settings["steps"])
    save_image_grid(grid, rows, report.captions, labels)
    kind, files = ("lightning-lora", [LORA_FILE, CARD, GRID]) if only_lora(ladder.stages) else ("lightning", None)
    settings = {name: value for name, value in ladder.settings.items() if name != "phases"}
    about = {stage.name: {**settings, "student": stage.student, "mixed": stage.mixed} for stage in ladder.stages}
    for name, words in about.items():
        write_card(ladder.folder.path / name, kind, words, report.results, grid, settings["push_to_hub"])
    report.finish(ladder.folder.path / last.name, kind, files, about[last.name])


def dry_run(config: Config) -> None:
    """Print the stages, the memory of each phase and the number of samples. Its device need not be in this machine."""
    here = get_device("auto" if config.device == "auto" else "cpu")
    best = "bf16" if config.device.startswith("cuda") else best_precision(here)
    device = parallel.join(torch.device("cpu"), config.parallel)
    setup = check(dataclasses.replace(config, precision=config.precision or best), device)
    describe(setup)
    config, stages, pipe, start, removal, data = setup
    unet, side = pipe.unet.config, config.resolution // pipe.vae.config.downscale
    round_text_encoders(stages, pipe, config.precision)
    rows = stage_memory_rows(
        stages,
        unet,
        removal.student if removal else start.pipe.unet.config if start else unet,
        [pipe.vae, *pipe.text_encoders],
        (parallel.share_of(config.batch_size), side, side, pipe.tokenizers[0].max_length),
        image_peak(pipe.vae, side),
        guidance=config.guidance,
        rank=config.lora_rank,
        half=config.precision != "fp32",
        checkpointing=config.gradient_checkpointing,
        accumulate=config.accumulate > 1,
        held=parallel.held(config.parallel),
        started=bool(start),
    )
    steps = list(legs(stages))[-1].last
    samples = steps * config.accumulate * config.batch_size
    shape = f"{steps} steps of {config.accumulate} x {config.batch_size} samples"
    print(f"{format_table(rows)}\n\n{shape}: each of {len(data)} images is seen {samples / len(data):.1f} times")


def command(config: Config) -> None:
    """Train, or with --dry-run print what that takes."""
    (dry_run if config.dry_run else main)(config)


if __name__ == "__main__":
    run_command(command, Config, PRESETS, prog="python -m minidistill.train_lightning", description=__doc__)
