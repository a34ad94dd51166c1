"""Text to image with Stable Diffusion 1.x, 2.x and XL: prompts -> text states -> latents -> images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minidistill.diffusion.noise import initial_noise
from minidistill.diffusion.samplers import Callback, Model, guide
from minidistill.diffusion.sampling import Sampling, as_distilled, choose_settings, solver
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError, check_integers, one_each
from minidistill.models.clip import CLIPTextModel
from minidistill.models.conditioning import Origin, TextStates, encode_text, micro_conditions
from minidistill.models.taesd import AutoencoderTiny
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet
from minidistill.models.vae import AutoencoderKL, decode_tiled
from minidistill.weights import folders

VAE = AutoencoderKL | AutoencoderTiny
Size = tuple[int | None, int | None]  # height and width in pixels
STEPS, GUIDANCE = 25, 7.5  # defaults for checkpoints that are not distilled


def load_pipeline(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    vae_dtype: torch.dtype | None = torch.float32,
    without: Collection[str] = (),
) -> Pipeline:
    """Load a SOURCE: a pipeline folder, a Hub id, a single file (.safetensors, .ckpt), "miniature" or "miniature-tiny".

    To apply another U-Net, VAE or LoRA afterwards: `interop.replace`.
    InputError: a part is missing, broken or of another model.

    Args:
        dtype: of the U-Net and the text encoders; None keeps that of the files.
        vae_dtype: of the VAE, separate because several VAEs overflow in float16.
        without: "unet", "vae": networks that will be replaced; left on the meta device, their weights are not read.
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
        # Old files of SD 1.x and 2.x lack the offset; diffusers' pipelines set it as well.
        schedule=schedule if is_sdxl else replace(schedule, steps_offset=1),
        sampling=None if "unet" in without else folders.load_sampling(path, dtype),
        zero_unconditional=is_sdxl and index.get("force_zeros_for_empty_prompt", True),
    )


def to_pixels(images: Iterable[Image.Image]) -> Tensor:
    """RGB images of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(eq=False, repr=False)
class Pipeline:
    """A Stable Diffusion model. Calling it samples images.

    Attributes:
        unet, vae: the networks.
        text_encoders, tokenizers: lists, of two each for SDXL.
        schedule: the noise schedule, with the checkpoint's prediction type and default timestep spacing.
        sampling: the settings the U-Net was distilled for; None for a model that is not step-distilled.
        zero_unconditional: the unconditional text states are zeros (SDXL) instead of those of the prompt "".
    """

    unet: UNet
    vae: VAE
    text_encoders: list[CLIPTextModel]
    tokenizers: list[CLIPTokenizer]
    schedule: ScheduleConfig
    sampling: Sampling | None = None
    zero_unconditional: bool = False

    def __post_init__(self) -> None:
        self.set_sampling(self.sampling)
        self.check_parts()

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net is conditioned on pooled text and image sizes as well."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def device(self) -> torch.device:
        """The device of the U-Net."""
        return next(self.unet.parameters()).device

    @property
    def networks(self) -> dict[str, nn.Module]:
        """U-Net and text encoders by their names in model folders and LoRA files."""
        names = ("text_encoder", "text_encoder_2")[: len(self.text_encoders)]
        return {"unet": self.unet, **dict(zip(names, self.text_encoders, strict=True))}

    def set_sampling(self, sampling: Sampling | None) -> None:
        """Set the settings the U-Net was distilled for, and the schedule's prediction type and spacing accordingly."""
        self.sampling = sampling
        self.schedule = as_distilled(self.schedule, sampling)

    def check_parts(self) -> None:
        """InputError: the parts do not fit together. A network on the meta device is checked once it is replaced."""
        left_out = any(next(network.parameters()).is_meta for network in (self.unet, self.vae))
        if not left_out and (problem := next(self._misfits(), None)):
            raise InputError(f"the parts of this pipeline do not fit: {problem}")

    def _misfits(self) -> Iterator[str]:
        """Descriptions of the parts that do not fit, the most informative first."""
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
            if (made := tokenizer.vocab_size) > (read := encoder.config.vocab_size):
                yield f"the tokenizer's ids go up to {made - 1}, the text encoder knows {read} tokens"
        if self.is_sdxl:
            read = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
            if (made := getattr(encoders[-1].text_projection, "out_features", None)) != read:
                yield f"the U-Net reads pooled text of width {read}, the last encoder makes {made} (no SDXL refiner)"

    # text

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str | None]) -> TextStates:
        """`text_states`, without gradients."""
        return self.text_states(prompts)

    def text_states(self, prompts: Sequence[str | None]) -> TextStates:
        """Text states of prompts, with gradients; None is the unconditional prompt."""
        prompts = one_each(prompts, None, "prompts", str | None, "text")
        return encode_text(prompts, self.tokenizers, self.text_encoders, self.is_sdxl, self.zero_unconditional)

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
        """Sample one image for each prompt. InputError: invalid settings, or a sample that is not finite.

        Args:
            negative_prompts: one for all or one each, in place of the unconditional prompt (None) in guidance.
            steps, guidance, sampler ("ddim", "euler"), spacing ("leading", "trailing", "linspace"): default: those of
                `sampling`, else 25, 7.5, "ddim" and the schedule's. Guidance of 1 or less is off.
            seed: the noise of a sample depends on (seed, its index) alone, not on the batch size.
            latents: standard-normal initial noise (B, C, h, w), in place of `seed`, `height` and `width`.
            image: RGB image(s) to start from, one for all or one each (SDEdit, arXiv 2108.01073).
            strength: fraction of the steps that are done, starting from the noised image, (0, 1].
            height, width: of the images, in pixels; default: those of `image`, else of the training images.
            first_index: sample index of the first prompt, so that prompts can be split over several calls.
            callback: called at each step of each batch: `diffusion.samplers.Callback`.
            low_memory: keep the text encoders on the CPU while sampling, and decode each image in tiles.
            output: "images", or "latents": (B, C, h, w), float32, on the U-Net's device.
        """
        prompts = one_each(prompts, None, "prompts", str | None, "text")
        negatives = one_each(negative_prompts, len(prompts), "negative prompts", str | None, "text")
        check_integers(seed=seed, first_index=first_index, batch_size=batch_size)
        if not prompts or batch_size < 1 or output not in ("images", "latents"):
            raise InputError("one prompt or more, a batch size of 1 or more, and output images or latents are needed")
        batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
        init = None if image is None else self._encode_images(image, len(prompts), batch_size)
        latents = self._noise(range(first_index, first_index + len(prompts)), seed, latents, init, (height, width))
        asked = {"steps": steps, "guidance": guidance, "sampler": sampler, "spacing": spacing}
        done = []
        try:
            settings = choose_settings(self.schedule, self.sampling, asked, STEPS, GUIDANCE)
            solve = solver(self.schedule, settings, callback, None if image is None else strength)
            models = [self._guided(prompts[b], negatives[b], settings.guidance, latents.shape[2:]) for b in batches]
            with self._text_encoders_on_cpu() if low_memory else nullcontext():
                for model, b in zip(models, batches, strict=True):
                    noise, start = latents[b].to(self.device).float(), None if init is None else init[b]
                    done.append(self._finite(solve(model, noise, start), prompts, b.start))
                if output == "latents":
                    return torch.cat(done)
                return self.decode(torch.cat(done), 1 if low_memory else batch_size, tiled=low_memory)
        except ValueError as error:  # of settings that the sampler or the network does not support
            raise InputError(str(error)) from error

    def _finite(self, latents: Tensor, prompts: Sequence[str], first: int) -> Tensor:
        """latents, unchanged, of prompts[first:]. InputError: a sample is not finite."""
        if (i := _find_nonfinite(latents)) is not None:
            way = f"with the U-Net in {self.unet.dtype}: try float32 or bfloat16, or check the weights"
            raise InputError(f"the latents of sample {first + i} ({prompts[first + i]!r}) are not finite {way}")
        return latents

    @contextmanager
    def _text_encoders_on_cpu(self) -> Iterator[None]:
        """Within this context, the text encoders are on the CPU."""
        devices = [next(encoder.parameters()).device for encoder in self.text_encoders]
        for encoder in self.text_encoders:
            encoder.to("cpu")
        try:
            yield
        finally:
            for encoder, device in zip(self.text_encoders, devices, strict=True):
                encoder.to(device)

    def _guided(
        self, prompts: Sequence[str | None], negatives: Sequence[str | None], guidance: float, size: Sequence[int]
    ) -> Model:
        """model(x, t): the U-Net conditioned on prompts, with guidance, for latents of size (h, w)."""
        pixels = [side * self.vae.config.downscale for side in size]
        text = self.encode_prompts(prompts)
        absent = self.encode_prompts(negatives) if guidance > 1 else TextStates(None, None)
        added, unadded = (self.added_cond(states.pooled, *pixels) for states in (text, absent))
        return guide(self.unet, text.context, absent.context, guidance, added_cond=added, uncond_added_cond=unadded)

    def trained_size(self) -> tuple[int, int]:
        """Height and width in pixels of the training images. InputError: not in the U-Net's config."""
        size, factor = self.unet.config.sample_size, self.vae.config.downscale
        if size is None:
            raise InputError("this model's config.json names no sample_size: give height and width")
        return (size[0] * factor, size[1] * factor) if isinstance(size, tuple) else (size * factor, size * factor)

    def _noise(self, indices: range, seed: int, latents: Tensor | None, init: Tensor | None, size: Size) -> Tensor:
        """The initial noise (B, C, h, w): `latents`, else drawn, in the size given or that of the `init` latents."""
        for given in (init, latents):
            if given is not None:
                size = self._check_latents(given, len(indices), *size)
        if latents is not None:
            return latents
        default = self.trained_size() if None in size else size
        height, width = (b if a is None else a for a, b in zip(size, default, strict=True))
        return initial_noise(seed, indices, (self.unet.config.in_channels, *self._latent_size(height, width)))

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents of images of this size. InputError: no such images."""
        check_integers(height=height, width=width)
        factor = self.vae.config.downscale
        if min(height, width) < factor or height % factor or width % factor:
            need = f"multiples of {factor} for this model, also those of an image to start from"
            raise InputError(f"height and width must be {need}; got {height} and {width}")
        return height // factor, width // factor

    def _check_latents(self, latents: Tensor, count: int, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the images of `count` latents. InputError: they do not fit."""
        channels, factor = self.unet.config.in_channels, self.vae.config.downscale
        shape = _shape_of(latents)
        if len(shape) != 4 or shape[:2] != (count, channels) or not latents.numel():
            raise InputError(f"latents must be a Tensor ({count}, {channels}, h, w) for {count} prompts, not {shape}")
        h, w = latents.shape[2] * factor, latents.shape[3] * factor
        if (height or h, width or w) != (h, w):
            raise InputError(f"the image or latents given are for height {h} and width {w}: leave out height and width")
        if not latents.isfinite().all():
            raise InputError("the initial latents are not finite")
        return h, w

    # images and latents

    def _encode_images(self, image: Image.Image | Sequence[Image.Image], count: int, batch_size: int) -> Tensor:
        """RGB images of one size, one for all or one each -> posterior means of their latents (count, C, h, w)."""
        images = one_each(image, count, "images", Image.Image, "PIL images (Image.open reads a file)")
        if len({image.size for image in images}) > 1:
            raise InputError("all images of one call must have the same size")
        if other := {image.mode for image in images} - {"RGB", "L"}:  # Pillow drops transparency and clips 16 bits
            raise InputError(f"images must be RGB, not {', '.join(other)}: use minidistill.data.folders.to_rgb(image)")
        self._latent_size(*images[0].size[::-1])
        weight = next(self.vae.parameters())
        pixels = to_pixels(image.convert("RGB") for image in images).to(weight.device, weight.dtype)
        return torch.cat([self.vae.to_latents(part) for part in pixels.split(batch_size)]).float()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 8, tiled: bool = False) -> list[Image.Image]:
        """Scaled latents (B, C, h, w) -> images. InputError: another shape, or one is not finite.

        tiled: in overlapping tiles, which bounds the memory; colours may differ slightly between tiles.
        """
        weight, channels, shape = next(self.vae.parameters()), self.vae.config.latent_channels, _shape_of(latents)
        if len(shape) != 4 or shape[1] != channels:
            raise InputError(f"latents to decode must be a Tensor (B, {channels}, h, w), not {shape}")
        from_latents = partial(decode_tiled, self.vae) if tiled else self.vae.from_latents
        images: list[Image.Image] = []
        for batch in latents.split(max(1, batch_size)):
            pixels = from_latents(batch.to(weight.device, weight.dtype)).float()
            if (i := _find_nonfinite(pixels)) is not None:
                way = "its weights are damaged" if weight.dtype == torch.float32 else "use it in float32"
                raise InputError(f"image {len(images) + i} is not finite with the VAE in {weight.dtype}: {way}")
            images += map(_to_image, pixels)
        return images

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a pipeline folder, which `load_pipeline` and diffusers read, in a dtype, or that of each network.

        InputError: it cannot be written, or a weight is too large for the dtype.
        """
        folders.save_pipeline(folder, self, dtype)


def _shape_of(latents: object) -> tuple[int, ...] | str:
    """The shape of a Tensor, the type of anything else."""
    return tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__


def _find_nonfinite(samples: Tensor) -> int | None:
    """Index of the first sample that is not finite."""
    return next((i for i, sample in enumerate(samples) if not sample.isfinite().all()), None)


def _to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB. Rounded: truncation would darken every image by half a level."""
    levels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
