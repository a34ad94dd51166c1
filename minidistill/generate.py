"""Text to image with any model.

python -m minidistill.generate --prompt "a red circle" --out circle.png
python -m minidistill.generate --lightning 4 --prompt "a red circle"
python -m minidistill.generate --model path/to/stable-diffusion-v1-5 --device cuda --precision fp16
python -m minidistill.generate --model path/to/sdxl --unet sdxl_lightning_4step_unet.safetensors --prompt "a fox"
python -m minidistill.generate --model path/to/sdxl --lora style.safetensors,sdxl_lightning_4step_lora.safetensors

A distilled model is sampled with the settings it was made for, unless flags say otherwise.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

from minidistill.cli import option, run_command
from minidistill.data.folders import to_rgb
from minidistill.data.listing import image_formats
from minidistill.diffusion.sampling import SAMPLERS, Sampling
from minidistill.diffusion.schedule import SPACINGS
from minidistill.errors import InputError
from minidistill.pipeline import GUIDANCE, STEPS, Pipeline, load_pipeline
from minidistill.training.device import PRECISIONS, get_device, get_dtype
from minidistill.weights import folders
from minidistill.weights.files import DAMAGED, atomic_path, existing_file, read_safetensors
from minidistill.weights.folders import Device, DType

BATCH_SIZE = 8


@dataclass(frozen=True)
class GenerateConfig:
    """The flags of this command."""

    model: str = option("miniature", "SOURCE: pipeline folder, Hub id, .safetensors or .ckpt file, miniature(-tiny)")
    unet: str | None = option(None, "SOURCE of another U-Net for the model")
    vae: str | None = option(None, "SOURCE of another VAE for the model; a TAESD is one")
    lora: tuple[str, ...] | None = option(None, "LoRA files to merge into the model")
    lora_scale: tuple[float, ...] = option((1.0,), "scale of the LoRAs: one for all, or one each")
    lightning: int | None = option(None, "sample in N steps: with the student for N steps beside the model", minimum=1)
    ema: bool = option(False, "use the averaged U-Net weights of a single file that has both kinds")
    prompt: str = option("a large red circle left of a small blue square", "what the image shows")
    negative_prompt: str | None = option(None, "what guidance leads away from")
    steps: int | None = option(None, f"sampling steps (default: the model's own, else {STEPS})", minimum=1)
    sampler: str | None = option(None, "sampler (default: the model's own, else ddim)", choices=SAMPLERS)
    spacing: str | None = option(None, "timestep spacing (default: the model's own)", choices=SPACINGS)
    guidance: float | None = option(
        None, f"scale of classifier-free guidance; 1 or less is off (default: the model's own, else {GUIDANCE:g})"
    )
    seed: int = option(0, "seed of the initial noise")
    count: int = option(1, "number of images of the prompt, side by side in the file", minimum=1)
    latents: str | None = option(None, "safetensors file with the initial noise, `latents` (B, 4, h, w): B images")
    image: str | None = option(None, "image to start from (image to image)")
    strength: float = option(0.8, "share of the steps that are done on --image after adding noise; above 0, at most 1")
    height: int | None = option(None, "height in pixels (default: what the model was trained at)", minimum=1)
    width: int | None = option(None, "width in pixels (default: what the model was trained at)", minimum=1)
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    precision: str = option("fp32", "precision of the U-Net and the text encoders", choices=PRECISIONS)
    vae_precision: str = option("fp32", "precision of the VAE; several VAEs overflow in fp16", choices=PRECISIONS)
    low_memory: bool = option(False, "text encoders on the CPU while sampling, images decoded in tiles")
    out: str = option("generated.png", "PNG file to write")


def generate(config: GenerateConfig) -> None:
    """Load, sample, write. InputError when anything about the settings or files is not right."""
    out = Path(config.out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"--out {config.out}: the name of a .png file is needed")
    check_flags(config)
    config = with_student(config)
    device = get_device(config.device, report=False)  # the progress bar does
    dtype = get_dtype(config.precision, device)
    vae_dtype = get_dtype(config.vae_precision, device, "--vae-precision")
    noise = read_latents(config.latents) if config.latents else None
    image = read_image(config.image) if config.image else None
    pipe = load_model(config.model, config, device, dtype, vae_dtype)
    for text in (config.prompt, config.negative_prompt or ""):
        warn_if_cut(pipe, text)
    own = pipe.sampling.guidance if pipe.sampling else GUIDANCE
    if config.negative_prompt and (own if config.guidance is None else config.guidance) <= 1:
        print("note: guidance is off, so the negative prompt changes nothing", file=sys.stderr)
    count = config.count if noise is None else len(noise)
    # The output is opened first: that it cannot be written is better found out before the work.
    with atomic_path(out) as temporary, progress(pipe, config, count) as bar:
        names = ("steps", "guidance", "seed", "sampler", "spacing", "strength", "height", "width", "low_memory")
        settings = {name: getattr(config, name) for name in names}
        settings |= {"latents": noise, "image": image, "batch_size": BATCH_SIZE, "callback": lambda step: bar.update()}
        images = pipe([config.prompt] * count, config.negative_prompt, **settings)
        side_by_side(images).save(temporary)
    print(out)


class Edits(Protocol):
    """The flags that change a model after it is loaded."""

    unet: str | None
    vae: str | None
    lora: tuple[str, ...] | None
    lora_scale: tuple[float, ...]
    ema: bool


def load_model(source: str, edits: Edits, device: Device, dtype: DType, vae_dtype: DType) -> Pipeline:
    """`load_pipeline`, and then another U-Net, its averaged weights, another VAE or LoRAs, if flags ask for them."""
    unet = edits.unet or (source if edits.ema else None)
    without = [part for part, other in (("unet", unet), ("vae", edits.vae)) if other]
    if not without and not edits.lora:
        return load_pipeline(source, device, dtype, vae_dtype)
    from minidistill.interop.replace import merge_loras, replace_unet, replace_vae, with_scales

    loras = with_scales(edits.lora, edits.lora_scale)
    pipe = load_pipeline(source, device, dtype, vae_dtype, without)
    if unet:
        replace_unet(pipe, unet, dtype, edits.ema)
    if edits.vae:
        replace_vae(pipe, edits.vae, vae_dtype)
    merge_loras(pipe, loras)
    return pipe


def check_flags(config: GenerateConfig) -> None:
    """Refuse flags that would change nothing, for want of another."""
    usual = GenerateConfig()
    for name, other in (("strength", "image"), ("lora_scale", "lora")):
        if getattr(config, name) != getattr(usual, name) and not getattr(config, other):
            raise InputError(f"--{name.replace('_', '-')} is for --{other}, which is not given")
    if config.latents and config.count != usual.count:
        raise InputError(f"--count {config.count}: there are as many images as --latents {config.latents} holds")


def with_student(config: GenerateConfig) -> GenerateConfig:
    """The flags that load the student of --lightning: its U-Net, or its LoRA, at full scale after those given."""
    if not config.lightning:
        return config
    student = folders.find_student(config.model, config.lightning)
    if student.is_dir():
        if config.unet:
            raise InputError(f"--lightning {config.lightning} is a U-Net, as --unet is: leave out one of them")
        return replace(config, unet=str(student))
    given = config.lora or ()
    scales = config.lora_scale * (len(given) if len(config.lora_scale) == 1 else 1)
    return replace(config, lora=(*given, str(student)), lora_scale=(*scales, 1.0))


def progress(pipe: Pipeline, config: GenerateConfig, count: int) -> tqdm:
    """A bar over all steps of all batches; disable=None: on a terminal only, silence in a log file."""
    own = pipe.sampling or Sampling(STEPS)
    steps = config.steps or own.steps
    if config.image:
        steps = math.floor(steps * config.strength)
    return tqdm(
        total=steps * math.ceil(count / BATCH_SIZE), desc=f"sampling on {pipe.device}", unit="step", disable=None
    )


def read_image(path: str) -> Image.Image:
    """An RGB image, upright and on white, as training reads it. InputError: there is none, or it cannot be read."""
    try:
        with Image.open(existing_file(path), formats=image_formats()) as image:
            return to_rgb(image)
    except (*DAMAGED, SyntaxError, Image.DecompressionBombError) as error:  # what decoders raise
        raise InputError(f"cannot read the image {path}: {error}") from error


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


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images of one size in a row."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    return row


if __name__ == "__main__":
    run_command(generate, GenerateConfig, prog="python -m minidistill.generate", description=__doc__)
