"""Text to image: prompts -> text states -> denoised latents -> images. Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minidistill.diffusion.noise import initial_noise
from minidistill.diffusion.samplers import Callback, Model, ddim, euler, guide, sigmas_at
from minidistill.diffusion.sampling import SAMPLERS, Sampling, default_solver
from minidistill.diffusion.schedule import ScheduleConfig, final_alpha_bar, make_alpha_bar, time_grid
from minidistill.errors import InputError
from minidistill.interop import sources
from minidistill.models.clip import CLIPTextModel
from minidistill.models.taesd import AutoencoderTiny
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet
from minidistill.models.vae import AutoencoderKL, decode_tiled

VAE = AutoencoderKL | AutoencoderTiny
Origin = tuple[int, int, int, int]  # of an image: original height and width; what was cropped above and at the left
STEPS, GUIDANCE = 25, 7.5  # where neither the caller nor the checkpoint says


def load_pipeline(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    ema: bool = False,
) -> Pipeline:
    """Load a SOURCE: a pipeline folder, a Hub id, a single file (.safetensors, .ckpt), or "miniature", in this package.

    `dtype` is for the U-Net and the text encoders. The VAE has its own: several of them overflow in float16.

    Args:
        unet: SOURCE of another U-Net for it, such as sdxl_lightning_4step_unet.safetensors.
        vae: SOURCE of another VAE for it; a TAESD is one.
        loras: (file, scale) of each LoRA to merge into it.
        ema: of a single file with both, take the averaged weights of the U-Net.

    Raises:
        InputError: something is missing, broken or does not fit together; the message says what.
    """
    return Pipeline(*sources.load_parts(source, device, dtype, vae_dtype, unet=unet, vae=vae, loras=loras, ema=ema))


def to_pixels(images: Iterable[Image.Image]) -> Tensor:
    """RGB images of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


class TextStates(NamedTuple):
    """What a U-Net reads of prompts."""

    context: Tensor  # (B, L, D)
    pooled: Tensor | None  # (B, D'), of SDXL only

    def map(self, change: Callable[[Tensor], Tensor]) -> TextStates:
        """The same states, each tensor changed: moved, say, or with other rows."""
        return TextStates(*(None if part is None else change(part) for part in self))

    @classmethod
    def join(cls, batches: Sequence[TextStates]) -> TextStates:
        """The states of several batches as one."""
        context, pooled = zip(*batches, strict=True)
        return cls(torch.cat(context), None if pooled[0] is None else torch.cat(pooled))


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
        vae: AutoencoderKL,
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
        self.sampling = sampling
        self.zero_unconditional = zero_unconditional
        if problem := next(self._misfits(), None):
            raise InputError(f"the parts of this pipeline do not fit: {problem}")

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
        return sources.named_networks(self.unet, self.text_encoders)

    def _misfits(self) -> Iterator[str]:
        """What keeps the parts from working together, the plainest first."""
        unet, vae, encoders = self.unet.config, self.vae.config, self.text_encoders
        if not len(encoders) == len(self.tokenizers) == 1 + self.is_sdxl:
            yield f"a U-Net of this kind needs {1 + self.is_sdxl} text encoder(s), there are {len(encoders)}"
        if unet.in_channels != vae.latent_channels:
            yield (
                f"the U-Net reads {unet.in_channels} channels, the VAE's latents have {vae.latent_channels} "
                "(inpainting and editing models are not supported)"
            )
        width = sum(encoder.config.hidden_size for encoder in encoders)
        if unet.cross_attention_dim != width:
            yield (
                f"the U-Net reads text states of width {unet.cross_attention_dim}, the text encoder makes "
                f"{width}: they are of different models"
            )
        for tokenizer, encoder in zip(self.tokenizers, encoders, strict=True):
            made, read = tokenizer.max_length, encoder.config.max_position_embeddings
            if made > read:
                yield f"the tokenizer makes {made} tokens, the text encoder reads {read}"
        if self.is_sdxl:
            projection = encoders[-1].text_projection
            pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
            if projection is None or projection.out_features != pooled:
                made = "none" if projection is None else f"one of {projection.out_features}"
                yield (
                    f"the U-Net reads a pooled text of width {pooled}, the last text encoder makes {made} "
                    "(an SDXL refiner is not supported)"
                )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str | None]) -> TextStates:
        """`text_states` without gradients."""
        return self.text_states(prompts)

    def text_states(self, prompts: Sequence[str | None]) -> TextStates:
        """Text states of any prompts; None is no prompt, the one place where that is defined.

        SD 1.x and 2.x: the encoder's last state after the final norm. SDXL (arXiv 2307.01952, sec. 2.1): both encoders'
        last state but one, without the final norm, side by side, and the second one's pooled state, projected.
        """
        if not self.text_encoders:
            raise InputError("the text encoders were freed (low_memory): load the pipeline again for more prompts")
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
        """SDXL's micro-conditions for images of height x width pixels (arXiv 2307.01952, sec. 2.2).

        origins: what each was cut from; None: they are whole. None for other models than SDXL.
        """
        if pooled is None:
            return None
        origins = origins or [(height, width, 0, 0)] * len(pooled)
        ids = [(*origin, height, width) for origin in origins]
        return {"text_embeds": pooled, "time_ids": torch.tensor(ids, dtype=torch.float32, device=pooled.device)}

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
        """One image for each prompt.

        Where steps, guidance, sampler or spacing are None, the checkpoint's own are taken (`sampling`, of a distilled
        model), else 25, 7.5, "ddim" and the schedule's spacing.

        Args:
            negative_prompts: one for all or one each, what guidance leads away from; None is no prompt.
            guidance: scale of classifier-free guidance; 1 and below switch it off.
            seed: with a sample's index it decides the sample's noise, whatever the batch size.
            sampler: "ddim" or "euler".
            spacing: "leading", "trailing" or "linspace" timesteps.
            latents: standard-normal initial noise (B, C, h, w), in place of `seed`, `height` and `width`.
            image: RGB image(s) to start from, one for all or one each (image to image, arXiv 2108.01073).
            strength: how much of the way to noise an image goes, (0, 1]: that share of the steps is done.
            height, width: of the images, in pixels; None takes the image's or the size the model was trained at.
            first_index: index of the first prompt: prompts split over calls then get the noise of one call.
            callback: called once per step of each batch with {"i", "t", "x", "x0"}: `diffusion.samplers`.
            low_memory: free the text encoders once the prompts are read, and decode each image in tiles.
            output: "images", or "latents": (B, C, h, w), float32, on the U-Net's device.

        Raises:
            InputError: settings that do not fit the model or each other, or a sample that is not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = _one_each(negative_prompts, len(prompts), "negative prompts")
        if not prompts or batch_size < 1:
            raise InputError("one prompt at least and a batch size of 1 or more are needed")
        if output not in ("images", "latents"):
            raise InputError(f"output must be images or latents, not {output!r}")
        self._warn_of_other_settings(steps, guidance, sampler, spacing)
        if self.schedule.ignored:
            left_out = ", ".join(self.schedule.ignored)
            warnings.warn(f"not supported in sampling, and ignored, of scheduler_config.json: {left_out}", stacklevel=2)
        own = self.sampling or Sampling(STEPS, *default_solver(self.schedule, sampler, spacing), GUIDANCE)
        guidance = own.guidance if guidance is None else guidance
        started = None
        if image is not None:
            started = self._encode_images(_one_each(image, len(prompts), "images"), batch_size)
            factor = self.vae.config.downscale
            self._check_latents(started, len(prompts), height, width)
            height, width = started.shape[2] * factor, started.shape[3] * factor
        if latents is None:
            shape = self._latent_shape(height, width)
            latents = initial_noise(seed, range(first_index, first_index + len(prompts)), shape)
        else:
            self._check_latents(latents, len(prompts), height, width)
        solve = self._solver(
            own.steps if steps is None else steps,
            sampler or own.sampler,
            spacing or own.spacing,
            callback,
            strength if image is not None else None,
        )
        batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
        states = [self.encode_prompts(prompts[batch]) for batch in batches]
        nothing = [self.encode_prompts(negatives[batch]) if guidance > 1 else None for batch in batches]
        if low_memory:
            self.text_encoders = []
        done = []
        for batch, text, no_text in zip(batches, states, nothing, strict=True):
            noise = latents[batch].to(self.device).float()
            model = self._guided(text, no_text, guidance, noise)
            try:
                x0 = solve(model, noise, None if started is None else started[batch].to(self.device))
            except ValueError as error:  # of a sampler or a network, about settings it cannot do
                raise InputError(str(error)) from error
            self._refuse_non_finite(x0, prompts, batch.start)
            done.append(x0)
        sampled = torch.cat(done)
        if output == "latents":
            return sampled
        return self.decode(sampled, 1 if low_memory else batch_size, tiled=low_memory)

    def _warn_of_other_settings(self, steps, guidance, sampler, spacing) -> None:
        """A distilled model sampled otherwise than it was made for gives poor images: say so."""
        if self.sampling is None:
            return
        own = self.sampling
        asked = replace(
            own,
            steps=own.steps if steps is None else max(1, steps),
            guidance=own.guidance if guidance is None or max(guidance, own.guidance) <= 1 else guidance,
            sampler=sampler if sampler in SAMPLERS else own.sampler,
            spacing=spacing or own.spacing,
        )
        if asked != own:
            warnings.warn(f"this model is made for {own}; you ask for {asked}: expect poor images", stacklevel=3)

    def _guided(self, text: TextStates, no_text: TextStates | None, guidance: float, noise: Tensor) -> Model:
        """model(x, t) with the prompts in it."""
        factor = self.vae.config.downscale
        size = noise.shape[2] * factor, noise.shape[3] * factor
        return guide(
            self._run_unet,
            text.context,
            None if no_text is None else no_text.context,
            guidance,
            added_cond=self.added_cond(text.pooled, *size),
            uncond_added_cond=None if no_text is None else self.added_cond(no_text.pooled, *size),
        )

    def _run_unet(self, x: Tensor, t: Tensor, context: Tensor, added_cond: dict[str, Tensor] | None = None) -> Tensor:
        """The samplers' view of the U-Net: state in float32, network in its own dtype."""
        return self.unet(x, t, context, added_cond)

    def trained_size(self) -> tuple[int, int]:
        """Height and width in pixels that the U-Net was trained at. InputError if its config does not say."""
        size = self.unet.config.sample_size
        if size is None:
            raise InputError("this model's config.json names no sample_size: give height and width")
        factor = self.vae.config.downscale
        return (size[0] * factor, size[1] * factor) if isinstance(size, tuple) else (size * factor, size * factor)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) for images of a size in pixels; None: the size the U-Net was trained at."""
        factor = self.vae.config.downscale
        if height is None or width is None:
            own_height, own_width = self.trained_size()
        h, w = (own_height if height is None else height), (own_width if width is None else width)
        if min(h, w) < factor or h % factor or w % factor:
            raise InputError(f"height and width must be multiples of {factor} for this model, got {h} and {w}")
        return self.unet.config.in_channels, h // factor, w // factor

    def _check_latents(self, latents: Tensor, count: int, height: int | None, width: int | None) -> None:
        channels, factor = self.unet.config.in_channels, self.vae.config.downscale
        if latents.ndim != 4 or tuple(latents.shape[:2]) != (count, channels):
            raise InputError(
                f"the initial latents must be ({count}, {channels}, h, w) for {count} prompts, "
                f"got {tuple(latents.shape)}"
            )
        h, w = latents.shape[2] * factor, latents.shape[3] * factor
        if (height or h, width or w) != (h, w):
            raise InputError(f"what you start from makes images {h} high and {w} wide: leave out height and width")
        if not latents.isfinite().all():
            raise InputError("the initial latents are not finite")

    def _refuse_non_finite(self, x0: Tensor, prompts: list[str], start: int) -> None:
        for i, sample in enumerate(x0, start):
            if not sample.isfinite().all():
                raise InputError(
                    f"the latents of sample {i} ({prompts[i]!r}) are not finite with the U-Net in {self.unet.dtype}: "
                    "try float32 or bfloat16, or check the weights"
                )

    def _encode_images(self, images: list[Image.Image], batch_size: int) -> Tensor:
        """RGB images of one size -> their latents (B, C, h, w): the posterior's mean."""
        factor, (width, height) = self.vae.config.downscale, images[0].size
        if any(image.size != (width, height) for image in images):
            raise InputError("all images of one call must have the same size")
        if min(width, height) < factor or width % factor or height % factor:
            raise InputError(
                f"the image is {width} wide and {height} high: both must be multiples of {factor}; resize or crop it"
            )
        weight = next(self.vae.parameters())
        pixels = to_pixels(image.convert("RGB") for image in images).to(weight.device, weight.dtype)
        return torch.cat([self.vae.to_latents(part) for part in pixels.split(batch_size)]).float()

    def _solver(
        self, steps: int, sampler: str, spacing: str, callback: Callback | None, strength: float | None
    ) -> Callable[[Model, Tensor, Tensor | None], Tensor]:
        """solver(model, noise, started) -> x0 latents, with everything else decided.

        With a `strength`, `started` are clean latents, and only the last steps of the grid are done.
        """
        schedule = self.schedule
        if sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
        total, offset, is_euler = schedule.num_train_timesteps, schedule.steps_offset, sampler == "euler"
        try:
            grid = time_grid(steps, spacing, total, offset, fractional=is_euler)
        except ValueError as error:
            raise InputError(str(error)) from error
        if strength is not None:
            done = min(math.floor(steps * strength), steps) if 0 < strength <= 1 else 0
            if done < 1:
                raise InputError(
                    f"strength must be above 0, at most 1 and 1 step at least: got {strength:g} of {steps}"
                )
            grid = grid[steps - done :]
        alpha_bar = make_alpha_bar(schedule)
        common = {"timesteps": grid, "alpha_bar": alpha_bar, "prediction": schedule.prediction_type}
        common |= {"callback": callback}
        if is_euler:
            # As in diffusers: start at variance 1 with leading steps, a little below with the others.
            solve = partial(euler, **common, pure_noise=spacing == "leading" or strength is not None)
        else:
            solve = partial(ddim, **common, final_alpha_bar=final_alpha_bar(schedule, alpha_bar))
        if strength is None:
            return lambda model, noise, started: solve(model, noise)
        sigma = sigmas_at(alpha_bar, grid[:1]).item()
        return lambda model, noise, started: solve(model, (started + sigma * noise) / math.hypot(1, sigma))

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
        """Write a pipeline folder that `load_pipeline` and diffusers read: `weights.sources.save_parts`."""
        sources.save_parts(
            folder,
            sources.Parts(
                self.unet,
                self.vae,
                self.text_encoders,
                self.tokenizers,
                self.schedule,
                self.sampling,
                self.zero_unconditional,
            ),
        )


def _one_each(given, count: int, what: str) -> list:
    """A list of `count`, from one for all or from one each."""
    if given is None or isinstance(given, str | Image.Image):
        return [given] * count
    if len(given) != count:
        raise InputError(f"{len(given)} {what} for {count} prompts: give one for all, or one each")
    return list(given)


def _to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB. Rounded: truncation would darken every image by half a level."""
    levels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
