"""Text to image: prompts -> text states -> denoised latents -> images. Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minidistill.diffusion.noise import initial_noise
from minidistill.diffusion.samplers import Callback, Model, guide
from minidistill.diffusion.sampling import Sampling, as_distilled, default_solver, solver
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.models.clip import CLIPTextModel
from minidistill.models.conditioning import Origin, TextStates, micro_conditions
from minidistill.models.taesd import AutoencoderTiny
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet
from minidistill.models.vae import AutoencoderKL, decode_tiled
from minidistill.weights import folders

VAE = AutoencoderKL | AutoencoderTiny
Size = tuple[int | None, int | None]  # height and width in pixels
STEPS, GUIDANCE = 25, 7.5  # where neither the caller nor the checkpoint says


def load_pipeline(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    vae_dtype: torch.dtype | None = torch.float32,
    without: Collection[str] = (),
) -> Pipeline:
    """Load a SOURCE: a pipeline folder, a Hub id, a single file (.safetensors, .ckpt), or "miniature", in this package.

    Another U-Net, another VAE and LoRAs are steps after it: `interop.replace`.
    InputError: something is missing, broken or does not fit together; the message says what.

    Args:
        dtype: of the U-Net and the text encoders; None keeps the files'.
        vae_dtype: of the VAE, which has its own: several VAEs overflow in float16.
        without: "unet", "vae": networks that will be replaced; they stay on the meta device, their weights unread.
    """
    folders.check_placement(device, dtype, vae_dtype)
    path = folders.find_model(source, dtype)
    if path.is_file():
        from minidistill.interop.replace import load_parts

        return Pipeline(**load_parts(path, device, dtype, vae_dtype, without))
    index = folders.read_model_index(path)
    is_sdxl = index["_class_name"] == folders.SDXL
    suffixes = ("", "_2") if is_sdxl else ("",)
    schedule = folders.load_schedule(path)
    return Pipeline(
        unet=folders.load_unet(path, dtype, "meta" if "unet" in without else device),
        vae=folders.load_vae(path, vae_dtype, "meta" if "vae" in without else device),
        text_encoders=[folders.load_text_encoder(path, dtype, device, f"text_encoder{x}") for x in suffixes],
        tokenizers=[folders.load_tokenizer(path, f"tokenizer{x}") for x in suffixes],
        # Old files of SD 1.x and 2.x lack the offset, and diffusers' pipelines set it too.
        schedule=schedule if is_sdxl else replace(schedule, steps_offset=1),
        sampling=None if "unet" in without else folders.load_sampling(path, dtype),
        zero_unconditional=is_sdxl and index.get("force_zeros_for_empty_prompt", True),
    )


def to_pixels(images: Iterable[Image.Image]) -> Tensor:
    """RGB images of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


class Pipeline:
    """The parts of a Stable Diffusion, and the way through them.

    Attributes:
        unet, vae: the networks.
        text_encoders, tokenizers: lists: SDXL has two of each.
        schedule: the noise schedule, with the checkpoint's prediction type and its usual timestep spacing.
        sampling: what the U-Net was distilled for; None if it takes any settings.
        zero_unconditional: the states of no prompt are zeros (SDXL), not those of the prompt "".
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoders: list[CLIPTextModel],
        tokenizers: list[CLIPTokenizer],
        schedule: ScheduleConfig,
        sampling: Sampling | None = None,
        zero_unconditional: bool = False,
    ):
        self.unet = unet
        self.vae = vae
        self.text_encoders = text_encoders
        self.tokenizers = tokenizers
        self.schedule = schedule
        self.set_sampling(sampling)
        self.zero_unconditional = zero_unconditional
        self.check_parts()

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net reads pooled text and sizes besides the text states."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return next(self.unet.parameters()).device

    @property
    def networks(self) -> dict[str, nn.Module]:
        """U-Net and text encoders by their names in model folders and LoRA files."""
        names = ("text_encoder", "text_encoder_2")[: len(self.text_encoders)]
        return {"unet": self.unet, **dict(zip(names, self.text_encoders, strict=True))}

    def set_sampling(self, sampling: Sampling | None) -> None:
        """What the U-Net was distilled for; prediction type and spacing of the schedule follow it. None: nothing."""
        self.sampling = sampling
        self.schedule = as_distilled(self.schedule, sampling)

    def check_parts(self) -> None:
        """InputError: the parts do not fit together. A network left on the meta device is checked once replaced."""
        left_out = any(next(network.parameters()).is_meta for network in (self.unet, self.vae))
        if not left_out and (problem := next(self._misfits(), None)):
            raise InputError(f"the parts of this pipeline do not fit: {problem}")

    def _misfits(self) -> Iterator[str]:
        """What keeps the parts from working together, the plainest first."""
        unet, encoders = self.unet.config, self.text_encoders
        if not len(encoders) == len(self.tokenizers) == 1 + self.is_sdxl:
            yield f"a U-Net of this kind needs {1 + self.is_sdxl} text encoder(s), there are {len(encoders)}"
        if (read := unet.in_channels) != (made := self.vae.config.latent_channels):
            yield f"the U-Net reads {read} channels, the VAE's latents have {made} (no inpainting or editing models)"
        if (read := unet.cross_attention_dim) != (made := sum(encoder.config.hidden_size for encoder in encoders)):
            reason = "they are of different models"
            yield f"the U-Net reads text states of width {read}, the text encoder makes {made}: {reason}"
        for tokenizer, encoder in zip(self.tokenizers, encoders, strict=True):
            if (made := tokenizer.max_length) > (read := encoder.config.max_position_embeddings):
                yield f"the tokenizer makes {made} tokens, the text encoder reads {read}"
        if self.is_sdxl:
            read = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
            if (made := getattr(encoders[-1].text_projection, "out_features", None)) != read:
                yield f"the U-Net reads pooled text of width {read}, the last encoder makes {made} (no SDXL refiner)"

    # text

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str | None]) -> TextStates:
        """`text_states` without gradients."""
        return self.text_states(prompts)

    def text_states(self, prompts: Sequence[str | None]) -> TextStates:
        """Text states of any prompts; None is no prompt, the one place where that is defined.

        SD 1.x and 2.x: the encoder's last state after the final norm. SDXL (arXiv 2307.01952, sec. 2.1): both encoders'
        last state but one, without the final norm, side by side, and the second one's pooled state, projected.
        """
        texts = [prompt or "" for prompt in prompts]
        outputs = [
            encoder(tokenizer(texts).to(next(encoder.parameters()).device))
            for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True)
        ]
        if not self.is_sdxl:
            return TextStates(outputs[0].last_hidden_state, None)
        context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].pooled
        if self.zero_unconditional:
            absent = torch.tensor([prompt is None for prompt in prompts], device=context.device)
            context = context.masked_fill(absent[:, None, None], 0)
            pooled = pooled.masked_fill(absent[:, None], 0)
        return TextStates(context, pooled)

    def added_cond(
        self, pooled: Tensor | None, height: int, width: int, origins: Sequence[Origin] | None = None
    ) -> dict[str, Tensor] | None:
        """`models.conditioning.micro_conditions` of SDXL; None for other models."""
        return None if pooled is None else micro_conditions(pooled, height, width, origins)

    # sampling

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        sampler: str | None = None,
        spacing: str | None = None,
        latents: Tensor | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        first_index: int = 0,
        callback: Callback | None = None,
        low_memory: bool = False,
        output: str = "images",
    ) -> list[Image.Image] | Tensor:
        """One image for each prompt. InputError: settings that do not fit, or a sample that is not finite.

        Args:
            negative_prompts: one for all or one each, what guidance leads away from; None is no prompt.
            steps, guidance, sampler ("ddim", "euler"), spacing ("leading", "trailing", "linspace"): None takes the
                checkpoint's own (`sampling`), else 25, 7.5, "ddim" and the schedule's. Guidance of 1 and below is off.
            seed: with a sample's index it decides the sample's noise, whatever the batch size.
            latents: standard-normal initial noise (B, C, h, w), in place of `seed`, `height` and `width`.
            image: RGB image(s) to start from, one for all or one each (image to image, arXiv 2108.01073).
            strength: share of the steps that is done from the noised image on, (0, 1].
            height, width: of the images, in pixels; None takes the image's or the size the model was trained at.
            first_index: of the first prompt, so that prompts split over calls get the noise of one call.
            callback: called once per step of each batch: `diffusion.samplers.Callback`.
            low_memory: keep the text encoders on the CPU while sampling, and decode each image in tiles.
            output: "images", or "latents": (B, C, h, w), float32, on the U-Net's device.
        """
        prompts = _one_each(prompts, None, "prompts", str | None, "text")
        negatives = _one_each(negative_prompts, len(prompts), "negative prompts", str | None, "text")
        _check_integers(seed=seed, first_index=first_index, batch_size=batch_size)
        if not prompts or batch_size < 1 or output not in ("images", "latents"):
            raise InputError("one prompt or more, a batch size of 1 or more, and output images or latents are needed")
        batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
        indices = range(first_index, first_index + len(prompts))
        started = None if image is None else self._encode_images(image, len(prompts), batch_size)
        latents = self._noise(indices, seed, latents, started, (height, width))
        done: list[Tensor] = []
        try:
            settings = self._settings(steps, guidance, sampler, spacing)
            solve = solver(self.schedule, settings, callback, None if image is None else strength)
            models = [self._guided(prompts[b], negatives[b], settings.guidance, latents.shape[2:]) for b in batches]
            with self._text_encoders_on_cpu() if low_memory else nullcontext():
                for model, b in zip(models, batches, strict=True):
                    noise, start = latents[b].to(self.device).float(), None if started is None else started[b]
                    done.append(self._finite(solve(model, noise, start), prompts, b.start))
                if output == "latents":
                    return torch.cat(done)
                return self.decode(torch.cat(done), 1 if low_memory else batch_size, tiled=low_memory)
        except ValueError as error:  # of settings, a sampler or a network, about what it cannot do
            raise InputError(str(error)) from error

    @contextmanager
    def _text_encoders_on_cpu(self) -> Iterator[None]:
        """The text encoders leave their device for the block, and come back."""
        home = [next(encoder.parameters()).device for encoder in self.text_encoders]
        for encoder in self.text_encoders:
            encoder.to("cpu")
        try:
            yield
        finally:
            for encoder, device in zip(self.text_encoders, home, strict=True):
                encoder.to(device)

    def _settings(
        self, steps: int | None, guidance: float | None, sampler: str | None, spacing: str | None
    ) -> Sampling:
        """What is asked for, else the checkpoint's own. A distilled model sampled otherwise gives poor images: warn."""
        if self.schedule.ignored:
            left_out = ", ".join(self.schedule.ignored)
            warnings.warn(f"not supported in sampling, and ignored, of scheduler_config.json: {left_out}", stacklevel=4)
        own = self.sampling or Sampling(STEPS, *default_solver(self.schedule, sampler, spacing), GUIDANCE)
        asked = {"steps": steps, "guidance": guidance, "sampler": sampler, "spacing": spacing}
        settings = replace(own, **{name: value for name, value in asked.items() if value is not None})
        if self.sampling and str(settings) != str(own):  # the text does not tell one guidance that is off from another
            warnings.warn(f"this model is made for {own}; you ask for {settings}: expect poor images", stacklevel=4)
        return settings

    def _guided(
        self, prompts: Sequence[str | None], negatives: Sequence[str | None], guidance: float, size: Sequence[int]
    ) -> Model:
        """model(x, t) with the prompts in it, for latents of a size (h, w)."""
        pixels = [side * self.vae.config.downscale for side in size]
        text = self.encode_prompts(prompts)
        added = self.added_cond(text.pooled, *pixels)
        if guidance <= 1:
            return guide(self.unet, text.context, None, guidance, added_cond=added)
        absent = self.encode_prompts(negatives)
        uncond = self.added_cond(absent.pooled, *pixels)
        return guide(self.unet, text.context, absent.context, guidance, added_cond=added, uncond_added_cond=uncond)

    def trained_size(self) -> tuple[int, int]:
        """Height and width in pixels that the U-Net was trained at. InputError if its config does not say."""
        size, factor = self.unet.config.sample_size, self.vae.config.downscale
        if size is None:
            raise InputError("this model's config.json names no sample_size: give height and width")
        return (size[0] * factor, size[1] * factor) if isinstance(size, tuple) else (size * factor, size * factor)

    def _noise(self, indices: range, seed: int, latents: Tensor | None, started: Tensor | None, size: Size) -> Tensor:
        """The initial noise (B, C, h, w): `latents`, else drawn, in the size asked for or that of `started`."""
        for given in (started, latents):
            if given is not None:
                size = self._check_latents(given, len(indices), *size)
        if latents is not None:
            return latents
        own = self.trained_size() if None in size else size
        height, width = (b if a is None else a for a, b in zip(size, own, strict=True))
        _check_integers(height=height, width=width)
        factor = self.vae.config.downscale
        if min(height, width) < factor or height % factor or width % factor:
            raise InputError(f"height and width must be multiples of {factor} for this model, got {height} and {width}")
        return initial_noise(seed, indices, (self.unet.config.in_channels, height // factor, width // factor))

    def _check_latents(self, latents: Tensor, count: int, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels of what `count` latents decode to. InputError: they do not fit."""
        channels, factor = self.unet.config.in_channels, self.vae.config.downscale
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        if len(shape) != 4 or shape[:2] != (count, channels):
            raise InputError(f"latents must be a Tensor ({count}, {channels}, h, w) for {count} prompts, not {shape}")
        h, w = latents.shape[2] * factor, latents.shape[3] * factor
        if (height or h, width or w) != (h, w):
            raise InputError(f"what you start from makes images {h} high and {w} wide: leave out height and width")
        if not latents.isfinite().all():
            raise InputError("the initial latents are not finite")
        return h, w

    def _finite(self, latents: Tensor, prompts: list[str], first: int) -> Tensor:
        """The same latents, of the prompts from `first` on. InputError: one is not finite."""
        for i, sample in enumerate(latents, first):
            if not sample.isfinite().all():
                raise InputError(
                    f"the latents of sample {i} ({prompts[i]!r}) are not finite with the U-Net in {self.unet.dtype}: "
                    "try float32 or bfloat16, or check the weights"
                )
        return latents

    # images and latents

    def _encode_images(self, image: Image.Image | Sequence[Image.Image], count: int, batch_size: int) -> Tensor:
        """RGB images of one size, one for all or one each -> their latents (count, C, h, w): the posterior's mean."""
        images = _one_each(image, count, "images", Image.Image, "PIL images (Image.open reads a file)")
        factor, (width, height) = self.vae.config.downscale, images[0].size
        if any(image.size != (width, height) for image in images):
            raise InputError("all images of one call must have the same size")
        if min(width, height) < factor or width % factor or height % factor:
            size = f"{width} wide and {height} high"
            raise InputError(f"the image is {size}: both must be multiples of {factor}; resize or crop it")
        weight = next(self.vae.parameters())
        pixels = to_pixels(image.convert("RGB") for image in images).to(weight.device, weight.dtype)
        return torch.cat([self.vae.to_latents(part) for part in pixels.split(batch_size)]).float()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 8, tiled: bool = False) -> list[Image.Image]:
        """Latents (B, C, h, w), scaled as the U-Net has them -> images. InputError: one is not finite.

        tiled: in overlapping tiles, which bounds the memory at some cost in evenness.
        """
        weight = next(self.vae.parameters())
        from_latents = partial(decode_tiled, self.vae) if tiled else self.vae.from_latents
        images: list[Image.Image] = []
        for batch in latents.split(max(1, batch_size)):
            for image in from_latents(batch.to(weight.device, weight.dtype)).float():
                if not image.isfinite().all():
                    way = "its weights are damaged" if weight.dtype == torch.float32 else "use it in float32"
                    raise InputError(f"image {len(images)} is not finite with the VAE in {weight.dtype}: {way}")
                images.append(_to_image(image))
        return images

    def save(self, folder: str | Path) -> None:
        """Write a pipeline folder, which `load_pipeline` and diffusers read. InputError: it cannot be written."""
        folders.save_pipeline(folder, self)


def _check_integers(**given: object) -> None:
    """InputError: one of the arguments, by its name, is no integer."""
    if wrong := [name for name, value in given.items() if not isinstance(value, Integral)]:
        raise InputError(f"{wrong[0]} must be an integer, not {given[wrong[0]]!r}")


def _one_each(given: Any, count: int | None, what: str, kind: Any, words: str) -> list:
    """A list of `count`, from one for all or from one each; count None: as many as there are. `words`: of the kind."""
    if isinstance(given, kind):
        return [given] * (count or 1)
    items = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(item, kind) for item in items):
        raise InputError(f"{what} must be {words}, one or a list of them, not {given!r:.60}")
    if count not in (None, len(items)):
        raise InputError(f"{len(items)} {what} for {count} prompts: give one for all, or one each")
    return items


def _to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB. Rounded: truncation would darken every image by half a level."""
    levels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
