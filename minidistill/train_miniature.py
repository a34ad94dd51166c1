"""Make the embedded miniature Stable Diffusion from nothing: python -m minidistill.train_miniature

Three networks, in this order, each resumable, all on scenes that are drawn as they are needed:

    clip   a tokenizer, a text encoder and an image tower, trained to tell which caption belongs to which image
    vae    64x64 pixels <-> 16x16x4 latents
    unet   the denoiser, on the VAE's latents and the text encoder's states

The result is an ordinary pipeline folder, DIR/pipeline, which every command here and diffusers read. The U-Net has the
four-stage shape of Stable Diffusion 1.x, so that every block-removal recipe applies to it letter by letter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidistill.cli import option, run_command
from minidistill.diffusion.noise import generator_for
from minidistill.diffusion.schedule import ScheduleConfig, add_noise, make_alpha_bar
from minidistill.errors import InputError
from minidistill.metrics.clip_score import clip_pixels, retrieval
from minidistill.metrics.reconstruction import evaluate_vae
from minidistill.miniature.judge import score
from minidistill.miniature.scenes import OPPOSITES, Scenes, describe, describe_places, held_out_captions, render
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
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=MAX_TOKENS,
    projection_dim=128,
)
VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=4,
    image_size=64,
    patch_size=8,
    projection_dim=128,
)
VAE = VAEConfig(
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=64,
)
# Few, wide heads: attention over 256 latent pixels is what a CPU is slow at. The second stage is the widest: what is
# where is decided there, on 8x8 positions that attention joins.
UNET = UNetConfig(
    sample_size=16,
    block_out_channels=(32, 96, 80, 80),
    attention_head_dim=(1, 3, 2, 2),
    norm_num_groups=8,
    cross_attention_dim=TEXT.hidden_size,
)
# The U-Net trains on more of the scenes that are hard than there are in the world it is judged by, and of every four
# samples these timesteps: relations are decided above 850, which thing is what between 900 and 600.
CROWDED = {"one": 14, "related": 24, "two": 8, "inside": 18, "counted": 12, "three": 24}
TIMESTEPS = ((850, 1000), (600, 900), (600, 900), (0, 1000))


@dataclass(frozen=True)
class Config:
    part: str = option("all", "which network to train", choices=("clip", "vae", "unet", "all"))
    out: str = option("runs/miniature", "folder of the runs; the result is in OUT/pipeline")
    start: str | None = option(None, "SOURCE whose weights to go on from; none starts from nothing")
    steps: int | None = option(
        None, "optimizer steps; none takes the part's own: clip 2400, vae 5000, unet 30000", minimum=1
    )
    batch_size: int | None = option(
        None, "samples a step; none takes the part's own: clip 128, vae 16, unet 48", minimum=1
    )
    learning_rate: float | None = option(None, "peak; none takes the part's own: clip 1e-3, vae 1.5e-3, unet 1e-3")
    images: int = option(40_000, "scenes in the U-Net's training set", minimum=1)
    layout_steps: int = option(1000, "of the U-Net's steps, how many first teach only what is where", minimum=0)
    seed: int = option(0, "decides everything random")
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first there is of cuda, mps and cpu")
    precision: str = option("bf16", "of the forward pass", choices=("fp32", "bf16", "fp16"))
    judged: int = option(1000, "held-out scenes to measure the CLIP and the VAE on at the end", minimum=1)
    log_every: int = option(100, "steps between log lines", minimum=1)
    sample_every: int = option(2000, "steps between the U-Net's image grids and scores", minimum=1)
    checkpoint_every: int = option(500, "steps between checkpoints", minimum=1)
    resume: bool = option(False, "go on with the runs in OUT")


DEFAULTS = {
    "clip": {"steps": 2400, "batch_size": 128, "learning_rate": 1e-3},
    "vae": {"steps": 5000, "batch_size": 16, "learning_rate": 1.5e-3},
    "unet": {"steps": 30_000, "batch_size": 48, "learning_rate": 1e-3},
}


def main(config: Config) -> None:
    """Train the parts asked for, in their order."""
    train = {"clip": train_clip, "vae": train_vae, "unet": train_unet}
    chosen = tuple(train) if config.part == "all" else (config.part,)
    if config.resume and not any((Path(config.out) / part / "config.json").is_file() for part in chosen):
        raise InputError(f"nothing to resume in {config.out}: check --out, or start without --resume")
    for part in chosen:
        own = {name: value for name, value in DEFAULTS[part].items() if getattr(config, name) is None}
        part_config = replace(config, part=part, **own)
        folder = Path(config.out) / part
        resume = config.resume and (folder / "config.json").is_file()
        settings = dataclasses.asdict(part_config)
        train[part](part_config, RunFolder.find(folder, settings, resume).begin(settings))


# ------------------------------------------------------------------------------------------------------- CLIP


def train_clip(config: Config, run: RunFolder) -> None:
    """Contrastive training of both towers (CLIP, arXiv 2103.00020, figure 3) -> tokenizer/, text_encoder/, clip/."""
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

    data = Scenes("train", length=10**9)  # no image twice
    labels = torch.arange(config.batch_size, device=device)
    with MetricsLog(run.metrics, config.steps, config.log_every, start) as log:
        for step in range(start, config.steps):
            images, captions = zip(*(data[step * config.batch_size + i] for i in range(len(labels))), strict=True)
            with precision.autocast, sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused one is slow to train in bf16
                image_states = clip.encode_image(clip_pixels(images).to(device)).float()
                text_states = clip.encode_text(trim(tokenizer(list(captions)), tokenizer.eos).to(device)).float()
            logits = clip.logit_scale.exp() * image_states @ text_states.T  # (B, B): image i, caption j
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            lr = lr_at(step, config.learning_rate, 100, config.steps, "cosine")
            precision.scaler.scale(loss).backward()
            norm = optimizer_step(clip, optimizer, precision.scaler, lr, max_grad_norm=1.0)
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
    """Token ids (B, L) without the columns after the last end of text: under the causal mask they change nothing."""
    return ids[:, : int((ids == eos).int().argmax(1).max()) + 1]


# -------------------------------------------------------------------------------------------------------- VAE


def train_vae(config: Config, run: RunFolder) -> None:
    """Reconstruction, with a slight pull of the latents to a normal distribution -> vae/."""
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
            weight = 1 + 4 * near_colour(x)  # small shapes are made of few pixels, and the caption is about them
            square, absolute = (weight * (y - x).square()).mean(), (weight * (y - x).abs()).mean()
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = square + 0.1 * absolute + 2e-6 * kl  # with 1e-4 for the last, one latent channel of the four died
            lr = lr_at(step, config.learning_rate, 100, config.steps, "cosine")
            precision.scaler.scale(loss).backward()
            norm = optimizer_step(vae, optimizer, precision.scaler, lr, max_grad_norm=1.0)
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
    """Make the latents of images x (N, 3, H, W), times `scaling_factor`, uncorrelated with mean 0 and variance 1.

    Trained freely, three of the four channels nearly repeat each other, and the colours are in their small differences:
    noise buries those long before the rest. The 1x1 convolutions on either side of the latents absorb a change of basis
    z' = W (z - mean), W = cov^(-1/2), so that encoding and decoding stay the same map. The posterior's deviation, tiny
    here, becomes its mean in the new basis.
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


# ------------------------------------------------------------------------------------------------------ U-Net


def train_unet(config: Config, run: RunFolder) -> None:
    """Ordinary eps-prediction training of a latent diffusion model (arXiv 2112.10752, eq. 3) -> unet/, text_encoder/.

    The text encoder is trained with it, as in that paper (sec. 3.3). CLIP's training asks for one vector a caption, and
    so small a CLIP pays for it with its words: their states hardly tell a circle from a square (see `words_first`).

    The loss is weighted by about SNR^(-1/2) (P2 weighting, arXiv 2204.00227): the last traces of noise make most
    of the plain loss, and what the caption says is decided long before them.

    What is where has to be learned apart. Below t = 850 the noisy latents show it, so a caption's "left of" tells
    nothing new; above, it is worth 1 % of a tiny loss, and needs both words that mean places and features that know
    theirs. So the first `layout_steps` are at t >= 850, on captions that say places (`Layouts`), and the features
    learn their place besides (`where_loss`); afterwards three quarters of all samples are at the `TIMESTEPS` where a
    scene is decided, and more scenes are `CROWDED`.
    """
    device = get_device(config.device)
    precision = get_precision(config.precision, device)
    folder = Path(config.out) / "pipeline"
    source = folders.find_model(config.start) if config.start else folder
    torch.manual_seed(config.seed)
    if config.start:
        unet, text_encoder = folders.load_unet(source), folders.load_text_encoder(source)
    else:
        unet, text_encoder = init_unet(UNet(UNET)), words_first(folders.load_clip(source))
    pipe = Pipeline(
        unet.to(device),
        folders.load_vae(source, device=device),
        [text_encoder.to(device)],
        [folders.load_tokenizer(source)],
        ScheduleConfig(),
    )
    if config.layout_steps:
        redraw_places(pipe)
    networks = nn.ModuleDict(pipe.networks)
    widths = unet.config.block_out_channels
    heads = {"down_0": widths[0], "down_1": widths[1], "up_1": widths[2], "up_2": widths[1], "up_3": widths[0]}
    heads = nn.ModuleDict({name: nn.Conv2d(width, 2, 1) for name, width in heads.items()}).to(device)
    learned = nn.ModuleList([networks, heads])
    # The gradients of the inner stages are no larger than AdamW's usual eps, which would shorten their steps.
    optimizer = adamw(learned.parameters(), config.learning_rate, betas=(0.9, 0.99), eps=1e-12)
    ema = EMA(networks, 0.999)
    parts = {"networks": networks, "heads": heads, "optimizer": optimizer, "ema": ema, "scaler": precision.scaler}
    start = run.restore(parts)

    data = Scenes("train", config.images, CROWDED)
    batches = Batches(data, pipe, batch_size=config.batch_size, seed=config.seed, caption_dropout=0.1)
    lesson = None
    if start < config.layout_steps:
        lesson = Batches(Layouts(config.images // 3), pipe, batch_size=config.batch_size, seed=config.seed)
    alpha_bar = make_alpha_bar(pipe.schedule)
    with MetricsLog(run.metrics, config.steps, config.log_every, start) as log:
        for step in range(start, config.steps):
            first = step < config.layout_steps
            x0, _, eps, t, captions, _ = (lesson if first else batches)[step]
            t = squeeze(t, TIMESTEPS[:1] if first else TIMESTEPS)
            text = pipe.text_states(captions).context
            with precision.autocast:
                out, features = unet(add_noise(x0, eps, t, alpha_bar), t, text, return_features=True)
            per_sample = (out.float() - eps).square().mean((1, 2, 3))
            loss = (per_sample * p2_weight(t, alpha_bar)).mean()
            losses = {"loss": loss}
            if first:
                losses["where"] = where_loss(features, heads)
                loss = loss + 0.1 * losses["where"]
            check_finite(per_sample, step + 1, t)
            lr = lr_at(step, config.learning_rate, 200, config.steps, "cosine")
            precision.scaler.scale(loss).backward()
            norm = optimizer_step(learned, optimizer, precision.scaler, lr, max_grad_norm=1.0)
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
        for network in (pipe.unet, pipe.vae, *pipe.text_encoders):
            network.half()
        pipe.save(folder)
        if source != folder and (source / "clip").is_dir():
            folders.save_clip(folder, folders.load_clip(source).half())
    draw_curves(run.metrics, run.curves)
    print(f"miniature -> {folder}")


class Layouts:
    """Scenes of one thing or of two that are related, under captions that tell where: the U-Net's first lesson.

    One thing always has the caption of `describe_places`, two have it every other time and else their usual one.
    Scenes with nothing to tell are passed over.
    """

    def __init__(self, length: int) -> None:
        self.scenes, self.numbers = Scenes("train", length=10**9), []
        number = 0
        while len(self.numbers) < length:
            if describe_places(self.scenes.scene(number)):
                self.numbers.append(number)
            number += 1

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        scene = self.scenes.scene(self.numbers[index])
        places = index % 2 or len(scene.stated.things) == 1
        return Image.fromarray(render(scene)), describe_places(scene) if places else describe(scene.stated)


@torch.no_grad()
def redraw_places(pipe: Pipeline) -> None:
    """Draw the embeddings of left, right, above and below anew, if CLIP's training left two of them nearly equal."""
    weight = pipe.text_encoders[0].text_model.embeddings.token_embedding.weight
    rows = [int(pipe.tokenizers[0]([word])[0, 1]) for word, _ in OPPOSITES]
    usual = weight.std() * weight.shape[1] ** 0.5  # the length of a word; two that are independent are sqrt(2) apart
    if F.pdist(weight[rows]).min() < usual:
        weight[rows] = torch.randn(len(rows), weight.shape[1]).to(weight) * weight.std()


def squeeze(t: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Timesteps (B,) of 0 .. 999 moved into ranges [low, high), each sample into the next one in turn."""
    low, high = torch.tensor(ranges, device=t.device)[torch.arange(len(t)) % len(ranges)].T
    return low + t * (high - low) // 1000


def where_loss(features: dict[str, Tensor], heads: nn.ModuleDict) -> Tensor:
    """How badly 1x1 convolutions read the place of each pixel, x and y in [-1, 1], from what the stages put out."""
    losses = []
    for name, head in heads.items():
        h = features[name.replace("_", ".")].float()
        line = torch.linspace(-1, 1, h.shape[-1], device=h.device)
        place = torch.stack(torch.meshgrid(line, line, indexing="xy"))
        losses.append((head(F.group_norm(h, 8)) - place).square().mean())
    return torch.stack(losses).mean()


def p2_weight(t: Tensor, alpha_bar: Tensor, gamma: float = 0.5, k: float = 0.015) -> Tensor:
    """1 / (k + SNR)^gamma of timesteps t (B,), the weight of an eps loss (P2, arXiv 2204.00227): (B,)."""
    a = alpha_bar.to(t.device)[t]
    return (k + a / (1 - a)) ** -gamma


def init_unet(unet: UNet) -> UNet:
    """Every residual branch and the output start at zero, as in the original latent diffusion code."""
    for name, parameter in unet.named_parameters():
        if any(part in name for part in (".conv2.", ".proj_out.")) or name.startswith("conv_out."):
            nn.init.zeros_(parameter)
    return unet


@torch.no_grad()
def words_first(clip: CLIPModel, share: float = 0.25) -> CLIPTextModel:
    """A CLIP's text encoder whose states are the words' own embeddings first, and `share` of what the layers add.

    In the miniature's CLIP the layers add 50 times what an embedding has, much the same for all words: in the states
    that a U-Net reads, "circle" and "square" are 0.2 standard deviations apart, "left" and "right" 0.1, "red" and
    "blue" 1.6. A U-Net trained on these drew the right colours, and shapes and places nearly by chance.
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
    """Score and image grid of held-out captions, always with the same noise."""
    captions = held_out_captions(count)
    images = pipe(captions, steps=25, guidance=4.0, seed=0, batch_size=32)
    save_image_grid(run.image_grid(step), [images[:16]], captions[:16])
    print(f"step {step}: " + ", ".join(f"{k} {v:.1%}" for k, v in score(images, captions).items()), flush=True)


if __name__ == "__main__":
    run_command(main, Config, prog="python -m minidistill.train_miniature", description=__doc__)
