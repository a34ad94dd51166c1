"""Train the embedded miniature Stable Diffusion from scratch.

Three networks in this order, each resumable, all on scenes that are rendered on the fly:

    clip   a tokenizer, a text encoder and an image encoder, by contrastive training
    vae    64x64 pixels <-> 16x16x4 latents
    unet   the denoiser, on the VAE's latents and the text encoder's states

The result is a pipeline folder, OUT/pipeline. Its U-Net has four stages as SD 1.x, so that all recipes apply to it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidistill.cli import option, run_command
from minidistill.diffusion.noise import generator_for
from minidistill.diffusion.schedule import ScheduleConfig, add_noise, make_alpha_bar
from minidistill.distill.probes import make_probes
from minidistill.distill.sensitivity import measure_levels
from minidistill.errors import InputError
from minidistill.metrics.clip_score import clip_pixels, retrieval
from minidistill.metrics.reconstruction import evaluate_vae
from minidistill.miniature import inside_out, networks
from minidistill.miniature.contrast import contrast_loss, second_captions
from minidistill.miniature.judge import score
from minidistill.miniature.scenes import Scenes, held_out_captions
from minidistill.models.clip import CLIPModel, CLIPTextModel
from minidistill.models.tokenizer import train_bpe
from minidistill.models.unet import UNet
from minidistill.models.vae import AutoencoderKL, posterior_std
from minidistill.pipeline import Pipeline, load_pipeline
from minidistill.report import save_image_grid
from minidistill.training import parallel
from minidistill.training.batches import Batches, to_pixels
from minidistill.training.curves import draw_curves
from minidistill.training.device import PRECISIONS, best_precision, get_device, get_precision
from minidistill.training.ema import EMA
from minidistill.training.log import MetricsLog
from minidistill.training.optim import MUON_RATE, adamw, lr_at, muon_and_adamw, optimizer_step
from minidistill.training.run_folder import RunFolder
from minidistill.weights import folders

# Hard scenes are more frequent in the U-Net's training set than in the test set.
CROWDED = {"one": 14, "related": 24, "two": 8, "inside": 18, "counted": 12, "three": 24}


@dataclass(frozen=True)
class Config:
    part: str = option("all", "network(s) to train", choices=("clip", "vae", "unet", "all"))
    out: str = option("runs/miniature", "output folder; the result is OUT/pipeline")
    teacher: str | None = option(None, "a miniature to learn from: its predictions are the U-Net's targets")
    start_from: str | None = option(None, "OUT/pipeline of an earlier run, whose U-Net to go on from: the last phase")
    steps: int | None = option(None, "default: clip 2400, vae 5000, unet 30000, or 16000 with a teacher", minimum=1)
    batch_size: int | None = option(None, "samples per step; default: clip 128, vae 16, unet 16", minimum=1)
    learning_rate: float | None = option(None, "default: clip 1e-3, vae 1.5e-3, unet 1e-3, or 4e-4 with a teacher")
    images: int = option(40_000, "scenes in the U-Net's training set", minimum=1)
    seed: int = option(0, "random seed")
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    precision: str | None = option(None, "precision (default: bf16 if the device computes it, else fp32)", PRECISIONS)
    judged: int = option(1000, "held-out scenes for the evaluation of CLIP and VAE", minimum=1)
    log_every: int = option(100, "steps between log lines", minimum=1)
    sample_every: int = option(2000, "steps between the U-Net's image grids and scores", minimum=1)
    checkpoint_every: int = option(500, "steps between checkpoints", minimum=1)
    resume: bool = option(False, "resume the runs in OUT")


DEFAULTS = {
    "clip": {"steps": 2400, "batch_size": 128, "learning_rate": 1e-3},
    "vae": {"steps": 5000, "batch_size": 16, "learning_rate": 1.5e-3},
    "unet": {"steps": 30_000, "batch_size": 16, "learning_rate": 1e-3},
}
TAUGHT = {**DEFAULTS["unet"], "steps": 16_000, "learning_rate": 4e-4}  # the usual rate would destroy what is copied


def main(config: Config) -> None:
    """Train the chosen parts, in their order. InputError: there is nothing to resume."""
    chosen = tuple(DEFAULTS) if config.part == "all" else (config.part,)
    if chosen != ("unet",):
        parallel.refuse("train_miniature, but for --part unet,")
    device = parallel.join(get_device(config.device, report=False))
    if config.resume and not any((Path(config.out) / part / "config.json").is_file() for part in chosen):
        raise InputError(f"nothing to resume in {config.out}: check --out, or start without --resume")
    teacher = load_pipeline(config.teacher, device) if config.teacher and "unet" in chosen else None
    first = folders.load_unet(config.start_from, device=device) if config.start_from else None
    networks.check_blocks(teacher and teacher.unet, first)
    train = {"clip": train_clip, "vae": train_vae, "unet": partial(train_unet, teacher=teacher, first=first)}
    for part in chosen:
        usual = {"precision": best_precision(device), **(TAUGHT if teacher and part == "unet" else DEFAULTS[part])}
        own = {name: value for name, value in usual.items() if getattr(config, name) is None}
        part_config = replace(config, part=part, **own)
        folder, settings = Path(config.out) / part, dataclasses.asdict(part_config)
        resume = config.resume and (folder / "config.json").is_file()
        train[part](part_config, RunFolder.find(folder, settings, resume).begin(settings))


def train_clip(config: Config, run: RunFolder) -> None:
    """Contrastive training of both encoders (CLIP, arXiv 2103.00020, fig. 3) -> tokenizer/, text_encoder/, clip/."""
    device = get_device(config.device)
    precision = get_precision(config.precision, device)
    torch.manual_seed(config.seed)
    captions = (data.caption(i) for data in (Scenes("train"), Scenes("test")) for i in range(4000))
    tokenizer = train_bpe(captions, 768, networks.MAX_TOKENS)
    special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    clip = CLIPModel(replace(networks.TEXT, vocab_size=tokenizer.vocab_size, **special), networks.VISION).to(device)
    optimizer = adamw(clip.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    parts = {"clip": clip, "optimizer": optimizer, "scaler": precision.scaler}
    start = run.restore(parts)

    data = Scenes("train", length=10**9)  # no image is repeated
    labels = torch.arange(config.batch_size, device=device)
    with MetricsLog(run.metrics, config.steps, config.log_every, start) as log:
        for step in range(start, config.steps):
            images, captions = zip(*(data[step * config.batch_size + i] for i in range(len(labels))), strict=True)
            with precision.autocast, sdpa_kernel(SDPBackend.MATH):  # faster than the fused kernel on a CPU in bf16
                image_states = clip.encode_image(clip_pixels(images).to(device)).float()
                ids = networks.trim(tokenizer(list(captions)), tokenizer.eos)
                text_states = clip.encode_text(ids.to(device)).float()
            logits = clip.logit_scale.exp() * image_states @ text_states.T  # (B, B): image i, caption j
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            lr = lr_at(step, config.learning_rate, 100, config.steps, "cosine")
            precision.scaler.scale(loss).backward()
            norm = optimizer_step(clip, optimizer, precision.scaler, lr, 1.0, step + 1)
            with torch.no_grad():
                clip.logit_scale.clamp_(max=math.log(100))  # as in the paper's section 2.5
            log.add({"loss": loss})
            log.end_step(step + 1, lr=lr, grad_norm=norm)
            with log.untimed():
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                    run.save(step + 1, parts)

    pipeline = Path(config.out) / "pipeline"
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
    folders.save_tokenizer(pipeline, tokenizer)
    folders.save_text_encoder(pipeline, text_encoder.half())
    folders.save_clip(pipeline, clip.half())
    found = retrieval(clip.float(), tokenizer, rounds=max(1, config.judged // 100))
    print(f"retrieval among 100 captions: {found:.1%} -> {pipeline}")


def train_vae(config: Config, run: RunFolder) -> None:
    """Training of the VAE (arXiv 2112.10752, sec. 3.1, without its perceptual and adversarial losses) -> vae/."""
    device = get_device(config.device)
    precision = get_precision(config.precision, device)
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(networks.VAE).to(device)
    optimizer = adamw(vae.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMA(vae, 0.998)
    parts = {"vae": vae, "optimizer": optimizer, "ema": ema, "scaler": precision.scaler}
    start = run.restore(parts)

    data = Scenes("train", length=10**9)
    with MetricsLog(run.metrics, config.steps, config.log_every, start) as log:
        for step in range(start, config.steps):
            images = [data[step * config.batch_size + i][0] for i in range(config.batch_size)]
            x = to_pixels(images).to(device)
            with precision.autocast:
                mean, logvar = (out.float() for out in vae.encode(x))
                noise = torch.randn(mean.shape, generator=generator_for(config.seed, "posterior", step)).to(device)
                y = vae.decode(mean + posterior_std(logvar) * noise).float()
            weight = 1 + 4 * networks.near_colour(x)  # small things are few pixels, but most of the caption
            square, absolute = (weight * (y - x).square()).mean(), (weight * (y - x).abs()).mean()
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = square + 0.1 * absolute + 2e-6 * kl  # with 1e-4 for the last, one of four channels collapsed
            lr = lr_at(step, config.learning_rate, 100, config.steps, "cosine")
            precision.scaler.scale(loss).backward()
            norm = optimizer_step(vae, optimizer, precision.scaler, lr, 1.0, step + 1)
            ema.update()
            log.add({"loss": loss, "square": square, "absolute": absolute, "kl": kl})
            log.end_step(step + 1, lr=lr, grad_norm=norm)
            with log.untimed():
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                    run.save(step + 1, parts)

    with ema.swap():
        networks.whiten(vae, to_pixels([data[i][0] for i in range(512)]).to(device))
        folders.save_vae(Path(config.out) / "pipeline", vae.half())
    result = evaluate_vae(folders.load_vae(Path(config.out) / "pipeline"), config.judged)
    print(f"reconstruction: {', '.join(f'{k} {v:.4g}' for k, v in result.items())} -> {config.out}/pipeline/vae")


def train_unet(config: Config, run: RunFolder, teacher: Pipeline | None = None, first: UNet | None = None) -> None:
    """eps-prediction training of a latent diffusion model (arXiv 2112.10752, eq. 3) -> unet/, text_encoder/.

    In the phases of `inside_out.py`; for `first`, an earlier result, the last. With a teacher its predictions are the
    targets, under two captions each, and its text encoder stays.
    """
    device = parallel.join(get_device(config.device))
    precision = get_precision(config.precision, device)
    torch.manual_seed(config.seed)
    pipe = new_pipeline(config, device, teacher, first)
    trained = nn.ModuleDict({"unet": pipe.unet} if teacher else pipe.networks)
    heads = inside_out.X0Heads(pipe.unet.config).to(device)
    learned = nn.ModuleList([trained, heads])
    muon, adam = muon_and_adamw(learned, networks.hidden_weights(pipe.unet), config.learning_rate)
    ema = EMA(trained, 0.999)
    parts = {"networks": trained, "heads": heads, "muon": muon, "adamw": adam, "ema": ema, "scaler": precision.scaler}
    start = run.restore(parts)
    batches, held_out, rounds = open_scenes(config, pipe)
    dropout, alpha_bar = inside_out.OuterDropout(pipe.unet), make_alpha_bar(pipe.schedule).to(device)
    phases = inside_out.PHASES[-1:] if first else inside_out.PHASES
    with MetricsLog(run.metrics, config.steps, config.log_every, start) as log:
        for step in range(start, config.steps):
            batch, done = batches[step], step + 1
            phase, progress, begins = inside_out.phase_at(step, config.steps, phases)
            if begins and phase is phases[-1] and teacher and not first:
                inside_out.take_level_0(teacher.unet, pipe.unet)
                ema.restart()
            lr = config.learning_rate * min(1, done / 200, (1 - progress) / max(phase.falls, 1e-9))
            t, captions = inside_out.squeeze(batch.t, batches.numbers(step), phase.ranges), batch.captions
            x_t = add_noise(batch.x0, batch.eps, t, alpha_bar)
            draws = inside_out.draw(config.batch_size, generator_for(config.seed, "drop", step))[:, batches.part]
            if teacher:  # a second time with other captions
                captions = captions + second_captions(captions, batches.numbers(step), batches.data, config.seed)
                x_t, t, draws = x_t.repeat(2, 1, 1, 1), t.repeat(2), draws.repeat(1, 2)
            text = pipe.text_states(captions).context
            with precision.autocast, torch.no_grad():
                target = teacher.unet(x_t, t, text).float() if teacher else batch.eps
            with precision.autocast, dropout.at(inside_out.fading(phase, progress), draws):
                out, features = pipe.unet(x_t, t, text, return_features=True)
            per_sample, depth = (out.float() - target).square().mean((1, 2, 3)), heads(features, batch.x0)
            losses = {"eps": (per_sample * inside_out.p2_weight(t, alpha_bar, phase.gamma)).mean(), **depth}
            loss = losses["eps"] + phase.heads * sum(depth.values()) + 0.001 * inside_out.excess(features)
            if teacher:
                losses["contrast"] = contrast_loss(out, target).mean()
                loss = loss + phase.contrast * losses["contrast"]
            precision.scaler.scale(loss).backward()
            optimizer_step(learned, muon, precision.scaler, MUON_RATE * lr, None, done, t)
            norm = optimizer_step(learned, adam, precision.scaler, lr, 1.0, done, t)
            ema.update()
            log.add(losses, per_sample, t)
            if parallel.is_first() and (done % config.sample_every == 0 or done == config.steps):
                with log.untimed(), ema.swap():
                    log.add(report(run, pipe, done, held_out, rounds))
            log.end_step(done, lr=lr, grad_norm=norm)
            if done % config.checkpoint_every == 0 or done == config.steps:
                with log.untimed():
                    run.save(done, parts)
    if parallel.is_first():
        with ema.swap():
            save_result(run, pipe, Path(config.out) / "pipeline")


def open_scenes(config: Config, pipe: Pipeline) -> tuple[Batches, Batches, range]:
    """Training scenes, held-out ones, and the numbers of the held-out batches."""
    settings = {"batch_size": config.batch_size, "seed": config.seed, "keep_text": False}
    batches = Batches(Scenes("train", config.images, CROWDED), pipe, caption_dropout=0.1, **settings).share()
    rounds = max(1, min(96, config.judged) // config.batch_size)
    return batches, Batches(Scenes("test", rounds * config.batch_size), pipe, **settings), range(rounds)


def new_pipeline(config: Config, device: torch.device, teacher: Pipeline | None, first: UNet | None) -> Pipeline:
    """What is trained, with CLIP and VAE of OUT or else of the shipped miniature; a teacher's text encoder."""
    out = Path(config.out) / "pipeline"
    clip, vae = (out if (out / part).is_dir() else folders.MINIATURE for part in ("clip", "vae"))
    tokenizer, unet = folders.load_tokenizer(clip), first or networks.new_unet(teacher and teacher.unet)
    if teacher:
        text_encoder = teacher.text_encoders[0].requires_grad_(False)
    elif config.start_from:
        text_encoder = folders.load_text_encoder(config.start_from)
    else:
        text_encoder = networks.words_first(folders.load_clip(clip))
        networks.redraw_places(text_encoder, tokenizer)
    vae = folders.load_vae(vae, device=device)
    return Pipeline(unet.to(device), vae, [text_encoder.to(device)], [tokenizer], ScheduleConfig())


def save_result(run: RunFolder, pipe: Pipeline, folder: Path) -> None:
    """Write the curves, and the pipeline in float16 to `folder`, with the CLIP its text encoder started from."""
    draw_curves(run.metrics, run.curves)
    clip = folders.load_clip(folder if (folder / "clip").is_dir() else folders.MINIATURE)
    for network in (pipe.unet, pipe.vae, *pipe.text_encoders, clip):
        network.half()
    pipe.save(folder)
    folders.save_clip(folder, clip)
    print(f"miniature -> {folder}")


def report(run: RunFolder, pipe: Pipeline, step: int, held_out: Batches, rounds: range) -> dict[str, float]:
    """Image grid and scores of held-out captions, the curves so far -> what the output loses without inner levels."""
    captions = held_out_captions(min(64, len(held_out.data)))
    images = pipe(captions, steps=25, guidance=4.0, seed=0, batch_size=32)
    save_image_grid(run.image_grid(step), [images[:16]], captions[:16])
    draw_curves(run.metrics, run.curves)
    print(f"step {step}: " + ", ".join(f"{k} {v:.1%}" for k, v in score(images, captions).items()), flush=True)
    return measure_levels(pipe.unet, make_probes(held_out, rounds))


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.train_miniature", description=__doc__)
