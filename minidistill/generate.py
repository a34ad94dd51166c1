"""Text to image with any model folder.

python -m minidistill.generate --prompt "a red circle" --out circle.png
python -m minidistill.generate --model path/to/stable-diffusion-v1-5 --device cuda --precision fp16
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

from minidistill.diffusion.schedule import SPACINGS
from minidistill.errors import InputError
from minidistill.pipeline import SAMPLERS, Pipeline, load_pipeline
from minidistill.training.config import option, run_command
from minidistill.training.optim import PRECISIONS, get_device, get_precision
from minidistill.weights.files import atomic_path, read_safetensors

BATCH_SIZE = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class GenerateConfig:
    """The flags of this command."""

    model: str = option("miniature", "a pipeline folder in the diffusers layout, or miniature")
    prompt: str = option("a large red circle left of a small blue square", "what the picture shows")
    negative_prompt: str = option("", "what guidance leads away from")
    steps: int = option(25, "network evaluations, each with and without the prompt", minimum=1)
    sampler: str = option("ddim", "solver", choices=SAMPLERS)
    spacing: str | None = option(None, "which timesteps; none: as the model says", choices=SPACINGS)
    guidance: float = option(7.5, "scale of classifier-free guidance; 1 and below switch it off")
    seed: int = option(0, "decides the initial noise")
    latents: str | None = option(
        None,
        "safetensors file with the noise to start from, `latents` (B, 4, h, w); B pictures in a row",
    )
    height: int | None = option(None, "pixels; none: what the model was trained at", minimum=1)
    width: int | None = option(None, "pixels; none: what the model was trained at", minimum=1)
    device: str = option("cpu", "cpu or cuda")
    precision: str = option("fp32", "of U-Net and text encoder; the VAE stays fp32", choices=PRECISIONS)
    out: str = option("generated.png", "the picture, a .png file")


def generate(config: GenerateConfig) -> None:
    """Load, sample, write. InputError when anything about the settings or files is not right."""
    out = Path(config.out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"--out {config.out}: the name of a .png file is needed")
    device = get_device(config.device)
    get_precision(config.precision, device)  # refuses what this device cannot do
    noise = read_latents(config.latents) if config.latents else None
    pipe = load_pipeline(config.model, device, DTYPES[config.precision])
    count = 1 if noise is None else len(noise)
    total = config.steps * math.ceil(count / BATCH_SIZE)
    # The output is opened first: that it cannot be written is better found out before the work.
    # disable=None: a bar on a terminal, silence in a log file.
    with atomic_path(out) as temporary, tqdm(total=total, desc="sampling", unit="step", disable=None) as bar:
        pictures = pipe(
            [config.prompt] * count,
            config.negative_prompt,
            steps=config.steps,
            guidance=config.guidance,
            seed=config.seed,
            sampler=config.sampler,
            spacing=config.spacing,
            latents=noise,
            height=config.height,
            width=config.width,
            batch_size=BATCH_SIZE,
            callback=lambda step: bar.update(),
        )
        side_by_side(pictures).save(temporary)
    for text in (config.prompt, config.negative_prompt):
        warn_if_cut(pipe, text)
    print(out)


def read_latents(path: str) -> Tensor:
    """The tensor `latents` (B, C, h, w) of a safetensors file."""
    tensors = read_safetensors(path)
    if "latents" not in tensors:
        raise InputError(f"{path} has no tensor `latents`; it has {', '.join(sorted(tensors)[:5]) or 'none'}")
    latents = tensors["latents"]
    if latents.ndim != 4 or latents.numel() == 0:
        raise InputError(f"{path}: `latents` must be (B, C, h, w), it is {tuple(latents.shape)}")
    return latents


def warn_if_cut(pipe: Pipeline, text: str) -> None:
    """Say how much of a long prompt the text encoder will see."""
    room = pipe.tokenizers[0].max_length - 2
    length = len(pipe.tokenizers[0].encode(text))
    if length > room:
        print(f"note: {length} tokens, of which only the first {room} are read: {text!r}", file=sys.stderr)


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * width, 0))
    return row


if __name__ == "__main__":
    run_command(generate, GenerateConfig, prog="python -m minidistill.generate", description=__doc__)
