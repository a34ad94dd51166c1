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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidistill.cli import option, run_command
from minidistill.diffusion.noise import generator_for
from minidistill.diffusion.schedule import ScheduleConfig, add_noise, make_alpha_bar
from minidistill.errors import InputError
from minidistill.metrics.clip_score import clip_pixels, retrieval
from minidistill.metrics.reconstruction import evaluate_vae
from minidistill.miniature.judge import score
from minidistill.miniature.layouts import Layouts
from minidistill.miniature.scenes import OPPOSITES, Scenes, held_out_captions
from minidistill.models.clip import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from minidistill.models.tokenizer import train_bpe
from minidistill.models.unet import UNet, UNetConfig
from minidistill.models.vae import AutoencoderKL, VAEConfig, posterior_std
from minidistill.pipeline import Pipeline
from minidistill.report import save_image_grid
from minidistill.training.batches import Batches, to_pixels
from minidistill.training.curves import draw_curves
from minidistill.training.device import get_device, get_precision
from minidistill.training.ema import EMA
from minidistill.training.log import MetricsLog
from minidistill.training.optim import adamw, check_finite, lr_at, optimizer_step
from minidistill.training.run_folder import RunFolder
from minidistill.weights import folders

MAX_TOKENS = 32  # the longest caption of the scenes has 20
TEXT = CLIPTextConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=MAX_TOKENS, projection_dim=128,
)  # fmt: skip
VISION = CLIPVisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
    image_size=64, patch_size=8, projection_dim=128,
)  # fmt: skip
VAE = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=64)
# Few, wide heads: attention is slow on a CPU. The second stage, at 8x8, is the widest: it decides the layout.
UNET = UNetConfig(
    sample_size=16, block_out_channels=(32, 96, 80, 80), attention_head_dim=(1, 3, 2, 2), norm_num_groups=8,
    cross_attention_dim=TEXT.hidden_size,
)  # fmt: skip
# Hard scenes are more frequent in the U-Net's training set than in the test set. Of every four samples, one is drawn
# from each of these ranges of t: relations are decided above 850, attributes of things between 900 and 600.
CROWDED = {"one": 14, "related": 24, "two": 8, "inside": 18, "counted": 12, "three": 24}
TIMESTEPS = ((850, 1000), (600, 900), (600, 900), (0, 1000))


@dataclass(frozen=True)
class Config:
    """Settings of the command."""

    part: str = option("all", "network(s) to train", choices=("clip", "vae", "unet", "all"))
    out: str = option("runs/miniature", "output folder; the result is OUT/pipeline")
    start: str | None = option(None, "folder of a model to start from; default: from scratch")
    steps: int | None = option(None, "optimizer steps; default: clip 2400, vae 5000, unet 30000", minimum=1)
    batch_size: int | None = option(None, "samples per step; default: clip 128, vae 16, unet 48", minimum=1)
    learning_rate: float | None = option(None, "peak learning rate; default: clip 1e-3, vae 1.5e-3, unet 1e-3")
    images: int = option(40_000, "scenes in the U-Net's training set", minimum=1)
    layout_steps: int = option(1000, "initial steps of the U-Net on layout only", minimum=0)
    seed: int = option(0, "random seed")
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    precision: str = option("bf16", "of the forward pass", choices=("fp32", "bf16", "fp16"))
    judged: int = option(1000, "held-out scenes for the evaluation of CLIP and VAE", minimum=1)
    log_every: int = option(100, "steps between log lines", minimum=1)
    sample_every: int = option(2000, "steps between the U-Net's image grids and scores", minimum=1)
    checkpoint_every: int = option(500, "steps between checkpoints", minimum=1)
    resume: bool = option(False, "resume the runs in OUT")


DEFAULTS = {
    "clip": {"steps": 2400, "batch_size": 128, "learning_rate": 1e-3},
    "vae": {"steps": 5000, "batch_size": 16, "learning_rate": 1.5e-3},
    "unet": {"steps": 30_000, "batch_size": 48, "learning_rate": 1e-3},
}


def main(config: Config) -> None:
    """Train the chosen parts, in their order. InputError: there is nothing to resume."""
    train = {"clip": train_clip, "vae": train_vae, "unet": train_unet}
    chosen = tuple(train) if config.part == "all" else (config.part,)
    if config.resume and not any((Path(config.out) / part / "config.json").is_file() for part in chosen):
        raise InputError(f"nothing to resume in {config.out}: check --out, or start without --resume")
    for part in chosen:
        own = {name: value for name, value in DEFAULTS[part].items() if getattr(config, name) is None}
        part_config = replace(config, part=part, **own)
        folder, settings = Path(config.out) / part, dataclasses.asdict(part_config)
        resume = config.resume and (folder / "config.json").is_file()
        train[part](part_config, RunFolder.find(folder, settings, resume).begin(settings))


def train_clip(config: Config, run: RunFolder) -> None:
    """Contrastive training of both encoders (CLIP, arXiv 2103.00020, fig. 3) -> tokenizer/, text_encoder/, clip/."""
    device = get_device(config.device)
    precision = get_precision(config.precision, device)
    torch.manual_seed(config.seed)
    if config.start:
        source = folders.find_model(config.start)
        tokenizer, clip = folders.load_tokenizer(source), folders.load_clip(source)
    else:
        captions = (data.caption(i) for data in (Scenes("train"), Scenes("test")) for i in range(4000))
        tokenizer = train_bpe(captions, 768, MAX_TOKENS)
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
        clip = CLIPModel(replace(TEXT, vocab_size=tokenizer.vocab_size, **special), VISION)
    clip.to(device)
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
                text_states = clip.encode_text(trim(tokenizer(list(captions)), tokenizer.eos).to(device)).float()
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


def trim(ids: Tensor, eos: int) -> Tensor:
    """Token ids (B, L) without the padding common to all rows; with the causal mask it has no effect."""
    return ids[:, : int((ids == eos).int().argmax(1).max()) + 1]


def train_vae(config: Config, run: RunFolder) -> None:
    """Training of the VAE (arXiv 2112.10752, sec. 3.1, without its perceptual and adversarial losses) -> vae/."""
    device = get_device(config.device)
    precision = get_precision(config.precision, device)
    torch.manual_seed(config.seed)
    vae = folders.load_vae(folders.find_model(config.start)) if config.start else AutoencoderKL(VAE)
    vae.to(device)
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
            weight = 1 + 4 * near_colour(x)  # small things are few pixels, but most of the caption
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
        whiten(vae, to_pixels([data[i][0] for i in range(512)]).to(device))
        folders.save_vae(Path(config.out) / "pipeline", vae.half())
    result = evaluate_vae(folders.load_vae(Path(config.out) / "pipeline"), config.judged)
    print(f"reconstruction: {', '.join(f'{k} {v:.4g}' for k, v in result.items())} -> {config.out}/pipeline/vae")


def near_colour(x: Tensor) -> Tensor:
    """1 within two pixels of a saturated colour, else 0: images (B, 3, H, W) in [-1, 1] -> (B, 1, H, W)."""
    chroma = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    return F.max_pool2d((chroma > 0.5).float(), 5, stride=1, padding=2)


@torch.no_grad()
def whiten(vae: AutoencoderKL, x: Tensor) -> None:
    """Whiten the scaled latents of images x (N, 3, H, W), in place: uncorrelated channels, mean 0, variance 1.

    After training, three of the four channels are nearly equal and colours are in their small differences, which noise
    hides first. The 1x1 convolutions around the latents absorb the change of basis z' = W (z - mean), W = cov^(-1/2),
    so reconstructions do not change. The variance of the posterior, tiny here, is replaced by its mean.
    """
    encoded = [vae.encode(part) for part in x.split(64)]
    z = torch.cat([mean for mean, _ in encoded]).transpose(0, 1).flatten(1).double()  # (N, 4, h, w) -> (4, N*h*w)
    noise = torch.cat([logvar for _, logvar in encoded]).exp().mean((0, 2, 3)).double()
    mean = z.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(z))
    whitening = vectors @ (values**-0.5 / vae.config.scaling_factor).diag() @ vectors.T
    encode, decode, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    into, out_of = encode.weight[:channels, :, 0, 0].double(), decode.weight[:, :, 0, 0].double()
    decode.bias += out_of @ mean
    decode.weight.copy_((out_of @ whitening.inverse())[..., None, None])
    encode.weight[:channels] = (whitening @ into)[..., None, None].float()
    encode.bias[:channels] = (whitening @ (encode.bias[:channels].double() - mean)).float()
    encode.weight[channels:] = 0
    encode.bias[channels:] = (whitening.square() @ noise).log().float()


def train_unet(config: Config, run: RunFolder) -> None:
    """eps-prediction training of a latent diffusion model (arXiv 2112.10752, eq. 3) -> unet/, text_encoder/.

    The text encoder is trained too, as in that paper (sec. 3.3). The loss is weighted by about SNR^(-1/2) (P2, arXiv
    2204.00227). The first `layout_steps` are at t >= 850 on captions that state positions (`Layouts`), with an
    auxiliary loss on positions (`where_loss`): below, the noisy latents show the layout, and the words are not needed.
    """
    device = get_device(config.device)
    precision = get_precision(config.precision, device)
    folder = Path(config.out) / "pipeline"
    source = folders.find_model(config.start) if config.start else folder
    torch.manual_seed(config.seed)
    pipe = start_pipeline(config, source, device)
    networks = nn.ModuleDict(pipe.networks)
    learned, heads, optimizer = position_heads(pipe.unet, networks, config, device)
    ema = EMA(networks, 0.999)
    parts = {"networks": networks, "heads": heads, "optimizer": optimizer, "ema": ema, "scaler": precision.scaler}
    start = run.restore(parts)

    data, settings = Scenes("train", config.images, CROWDED), {"batch_size": config.batch_size, "seed": config.seed}
    batches = Batches(data, pipe, caption_dropout=0.1, **settings)
    layouts = Batches(Layouts(config.images // 3), pipe, **settings) if start < config.layout_steps else None
    alpha_bar = make_alpha_bar(pipe.schedule)
    with MetricsLog(run.metrics, config.steps, config.log_every, start) as log:
        for step in range(start, config.steps):
            first = step < config.layout_steps
            x0, _, eps, t, captions, _ = (layouts if first else batches)[step]
            t = squeeze(t, TIMESTEPS[:1] if first else TIMESTEPS)
            text = pipe.text_states(captions).context
            with precision.autocast:
                out, features = pipe.unet(add_noise(x0, eps, t, alpha_bar), t, text, return_features=True)
            per_sample = (out.float() - eps).square().mean((1, 2, 3))
            loss = (per_sample * p2_weight(t, alpha_bar)).mean()
            losses = {"loss": loss}
            if first:
                losses["where"] = where_loss(features, heads)
                loss = loss + 0.1 * losses["where"]
            check_finite(per_sample, step + 1, t)
            lr = lr_at(step, config.learning_rate, 200, config.steps, "cosine")
            precision.scaler.scale(loss).backward()
            norm = optimizer_step(learned, optimizer, precision.scaler, lr, 1.0, step + 1)
            ema.update()
            log.add(losses, per_sample, t)
            log.end_step(step + 1, lr=lr, grad_norm=norm)
            with log.untimed():
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                    run.save(step + 1, parts)
                if (step + 1) % config.sample_every == 0 or step + 1 == config.steps:
                    with ema.swap():
                        report(run, pipe, step + 1, min(64, config.judged))
    with ema.swap():
        save_result(pipe, source, folder)
    draw_curves(run.metrics, run.curves)
    print(f"miniature -> {folder}")


def start_pipeline(config: Config, source: Path, device: torch.device) -> Pipeline:
    """The pipeline at step 0: of `config.start`, else a new U-Net with the CLIP and the VAE of `source`."""
    if config.start:
        unet, text_encoder = folders.load_unet(source), folders.load_text_encoder(source)
    else:
        unet, text_encoder = init_unet(UNet(UNET)), words_first(folders.load_clip(source))
    vae, tokenizer = folders.load_vae(source, device=device), folders.load_tokenizer(source)
    pipe = Pipeline(unet.to(device), vae, [text_encoder.to(device)], [tokenizer], ScheduleConfig())
    if config.layout_steps:
        redraw_places(pipe)
    return pipe


def position_heads(
    unet: UNet, networks: nn.ModuleDict, config: Config, device: torch.device
) -> tuple[nn.ModuleList, nn.ModuleDict, torch.optim.Optimizer]:
    """The heads of `where_loss`, one per stage: (networks and heads, heads, the optimizer of both)."""
    widths = unet.config.block_out_channels
    heads = {"down_0": widths[0], "down_1": widths[1], "up_1": widths[2], "up_2": widths[1], "up_3": widths[0]}
    heads = nn.ModuleDict({name: nn.Conv2d(width, 2, 1) for name, width in heads.items()}).to(device)
    learned = nn.ModuleList([networks, heads])
    # Gradients of the inner stages are as small as AdamW's usual eps, which would reduce their updates.
    return learned, heads, adamw(learned.parameters(), config.learning_rate, betas=(0.9, 0.99), eps=1e-12)


def save_result(pipe: Pipeline, source: Path, folder: Path) -> None:
    """Write the pipeline in float16 to `folder`, with the CLIP beside `source`."""
    for network in (pipe.unet, pipe.vae, *pipe.text_encoders):
        network.half()
    pipe.save(folder)
    if source != folder and (source / "clip").is_dir():
        folders.save_clip(folder, folders.load_clip(source).half())


@torch.no_grad()
def redraw_places(pipe: Pipeline) -> None:
    """Reinitialise the embeddings of left, right, above and below if CLIP's training left two of them nearly equal."""
    weight = pipe.text_encoders[0].text_model.embeddings.token_embedding.weight
    rows = [int(pipe.tokenizers[0]([word])[0, 1]) for word, _ in OPPOSITES]
    usual = weight.std() * weight.shape[1] ** 0.5  # norm of an embedding; independent ones are sqrt(2) of it apart
    if F.pdist(weight[rows]).min() < usual:
        weight[rows] = torch.randn(len(rows), weight.shape[1]).to(weight) * weight.std()


def squeeze(t: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Timesteps (B,) of 0 .. 999 rescaled into ranges [low, high), which the samples take in turn."""
    low, high = torch.tensor(ranges, device=t.device)[torch.arange(len(t)) % len(ranges)].T
    return low + t * (high - low) // 1000


def where_loss(features: dict[str, Tensor], heads: nn.ModuleDict) -> Tensor:
    """MSE of the position (x, y) in [-1, 1] of each pixel, predicted from the stages' features by 1x1 convolutions."""
    losses = []
    for name, head in heads.items():
        h = features[name.replace("_", ".")].float()
        line = torch.linspace(-1, 1, h.shape[-1], device=h.device)
        place = torch.stack(torch.meshgrid(line, line, indexing="xy"))
        losses.append((head(F.group_norm(h, 8)) - place).square().mean())
    return torch.stack(losses).mean()


def p2_weight(t: Tensor, alpha_bar: Tensor, gamma: float = 0.5, k: float = 0.015) -> Tensor:
    """Weight 1 / (k + SNR)^gamma of an eps loss at timesteps t (B,): (B,). Source: P2, arXiv 2204.00227."""
    a = alpha_bar.to(t.device)[t]
    return (k + a / (1 - a)) ** -gamma


def init_unet(unet: UNet) -> UNet:
    """Initialise all residual branches and the output with zeros, as in the original latent diffusion code."""
    for name, parameter in unet.named_parameters():
        if any(part in name for part in (".conv2.", ".proj_out.")) or name.startswith("conv_out."):
            nn.init.zeros_(parameter)
    return unet


@torch.no_grad()
def words_first(clip: CLIPModel, share: float = 0.25) -> CLIPTextModel:
    """CLIP's text encoder with embeddings of unit variance, and the residual updates of its layers scaled by `share`.

    In the miniature's CLIP the layers add 50 times the norm of an embedding, nearly the same for all words: the states
    of "circle" and "square" are 0.2 standard deviations apart, "left" and "right" 0.1, "red" and "blue" 1.6. A U-Net
    trained on these gave correct colours, but shapes and places nearly at random.
    """
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    embeddings = encoder.text_model.embeddings
    scale = 1 / embeddings.token_embedding.weight.std()
    for embedding in (embeddings.token_embedding, embeddings.position_embedding):
        embedding.weight.mul_(scale)
    for layer in encoder.text_model.encoder.layers:
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            last.weight.mul_(share)
            last.bias.mul_(share)
    return encoder


def report(run: RunFolder, pipe: Pipeline, step: int, count: int) -> None:
    """Scores and image grid of held-out captions, with fixed noise."""
    captions = held_out_captions(count)
    images = pipe(captions, steps=25, guidance=4.0, seed=0, batch_size=32)
    save_image_grid(run.image_grid(step), [images[:16]], captions[:16])
    print(f"step {step}: " + ", ".join(f"{k} {v:.1%}" for k, v in score(images, captions).items()), flush=True)


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.train_miniature", description=__doc__)
