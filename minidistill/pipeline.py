"""Text to image: prompts -> text states -> denoised latents -> pictures. Stable Diffusion 1.x and 2.x."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minidistill.diffusion.samplers import Callback, Model, ddim, euler, guide
from minidistill.diffusion.schedule import ScheduleConfig, final_alpha_bar, make_alpha_bar, time_grid
from minidistill.errors import InputError
from minidistill.models.clip import CLIPTextModel
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet
from minidistill.models.vae import AutoencoderKL
from minidistill.training.seeds import generator_for
from minidistill.weights import folders

SAMPLERS = ("ddim", "euler")


def load_pipeline(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
) -> "Pipeline":
    """Load a SOURCE: a pipeline folder in the diffusers layout, or "miniature", which is in this package.

    `dtype` is for the U-Net and the text encoder. The VAE has its own: several of them overflow in float16.

    Raises:
        InputError: something is missing, broken or does not fit together; the message says what.
    """
    folder = folders.find_model(source)
    return Pipeline(
        unet=folders.load_unet(folder, dtype, device),
        vae=folders.load_vae(folder, vae_dtype, device),
        text_encoders=[folders.load_text_encoder(folder, dtype, device)],
        tokenizers=[folders.load_tokenizer(folder)],
        schedule=folders.load_schedule(folder),
    )


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard-normal noise (N, *shape), float32, CPU, for N indices. Sample i depends on (seed, i) alone."""
    return torch.stack([torch.randn(shape, generator=generator_for(seed, "image", i)) for i in indices])


class Pipeline:
    """The parts of a Stable Diffusion, and the way through them.

    Attributes:
        unet, vae: the networks.
        text_encoders, tokenizers: lists, for the models that have two of each.
        schedule: the noise schedule, with the checkpoint's prediction type and its usual timestep spacing.
    """

    def __init__(
        self,
        unet: UNet,
        vae: AutoencoderKL,
        text_encoders: list[CLIPTextModel],
        tokenizers: list[CLIPTokenizer],
        schedule: ScheduleConfig,
    ):
        self.unet = unet
        self.vae = vae
        self.text_encoders = text_encoders
        self.tokenizers = tokenizers
        self.schedule = schedule
        self._check_parts_fit()

    def _check_parts_fit(self) -> None:
        unet, vae, text = self.unet.config, self.vae.config, self.text_encoders[0].config
        length = self.tokenizers[0].max_length
        for fits, problem in (
            (len(self.text_encoders) == 1, "two text encoders (SDXL) are not supported so far"),
            (
                unet.in_channels == vae.latent_channels,
                f"the U-Net reads {unet.in_channels} channels, the VAE's latents have {vae.latent_channels} "
                "(inpainting and editing models are not supported)",
            ),
            (
                unet.cross_attention_dim == text.hidden_size,
                f"the U-Net reads text states of width {unet.cross_attention_dim}, the text encoder makes "
                f"{text.hidden_size}: they are of different models",
            ),
            (
                length <= text.max_position_embeddings,
                f"the tokenizer makes {length} tokens, the text encoder reads {text.max_position_embeddings}",
            ),
        ):
            if not fits:
                raise InputError(f"the parts of this pipeline do not fit: {problem}")

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text states (B, L, D) of any prompts; unconditional states are those of the prompt ""."""
        encoder = self.text_encoders[0]
        ids = self.tokenizers[0](list(prompts))
        return encoder(ids.to(next(encoder.parameters()).device)).last_hidden_state

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        *,
        steps: int = 25,
        guidance: float = 7.5,
        seed: int = 0,
        sampler: str = "ddim",
        spacing: str | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        first_index: int = 0,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """One picture for each prompt. The arguments are those of `sample_latents`."""
        sampled = self.sample_latents(
            prompts,
            negative_prompts,
            steps=steps,
            guidance=guidance,
            seed=seed,
            sampler=sampler,
            spacing=spacing,
            latents=latents,
            height=height,
            width=width,
            batch_size=batch_size,
            first_index=first_index,
            callback=callback,
        )
        return self.decode(sampled, batch_size)

    @torch.no_grad()
    def sample_latents(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        *,
        steps: int = 25,
        guidance: float = 7.5,
        seed: int = 0,
        sampler: str = "ddim",
        spacing: str | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        first_index: int = 0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Sample the latents (B, C, h, w), float32 on the U-Net's device, of one picture for each prompt.

        Args:
            negative_prompts: one for all or one each, what guidance leads away from; None is "".
            guidance: scale of classifier-free guidance; 1 and below switch it off.
            seed: with a sample's index it decides the sample's noise, whatever the batch size.
            sampler: "ddim" or "euler".
            spacing: "leading", "trailing" or "linspace" timesteps; None takes the checkpoint's.
            latents: standard-normal initial noise (B, C, h, w), in place of `seed`, `height` and `width`.
            height, width: of the pictures, in pixels; None takes the size the model was trained at.
            first_index: index of the first prompt: prompts split over calls then get the noise of one call.
            callback: called once per step of each batch with {"i", "t", "x", "x0"}: `diffusion.samplers`.

        Raises:
            InputError: settings that do not fit the model or each other, or a sample that is not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = _one_each(negative_prompts, len(prompts))
        if not prompts or batch_size < 1:
            raise InputError("one prompt at least and a batch size of 1 or more are needed")
        if latents is None:
            shape = self._latent_shape(height, width)
            latents = initial_noise(seed, range(first_index, first_index + len(prompts)), shape)
        else:
            self._check_latents(latents, len(prompts), height, width)
        solve = self._solver(steps, sampler, spacing, callback)
        done = []
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            context = self.encode_prompts(prompts[batch])
            uncond = self.encode_prompts(negatives[batch]) if guidance > 1 else None
            try:
                x0 = solve(guide(self._run_unet, context, uncond, guidance), latents[batch].to(self.device).float())
            except ValueError as error:  # of a sampler or a network, about settings it cannot do
                raise InputError(str(error)) from error
            self._refuse_non_finite(x0, prompts, start)
            done.append(x0)
        return torch.cat(done)

    def trained_size(self) -> tuple[int, int]:
        """Height and width in pixels that the U-Net was trained at. InputError if its config does not say."""
        size = self.unet.config.sample_size
        if size is None:
            raise InputError("this model's config.json names no sample_size: give height and width")
        factor = self.vae.config.downscale
        return (size[0] * factor, size[1] * factor) if isinstance(size, tuple) else (size * factor, size * factor)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) for pictures of a size in pixels; None: the size the U-Net was trained at."""
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
            raise InputError(f"the initial latents make pictures {h} high and {w} wide: leave out height and width")
        if not latents.isfinite().all():
            raise InputError("the initial latents are not finite")

    def _refuse_non_finite(self, x0: Tensor, prompts: list[str], start: int) -> None:
        for i, sample in enumerate(x0, start):
            if not sample.isfinite().all():
                dtype = next(self.unet.parameters()).dtype
                raise InputError(
                    f"the latents of sample {i} ({prompts[i]!r}) are not finite with the U-Net in {dtype}: "
                    "try float32 or bfloat16, or check the weights"
                )

    def _run_unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The samplers' view of the U-Net: state in float32, network in its own dtype."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(x.to(dtype), t, context.to(dtype))

    def _solver(
        self, steps: int, sampler: str, spacing: str | None, callback: Callback | None
    ) -> Callable[[Model, Tensor], Tensor]:
        """solver(model, noise) -> x0 latents, with everything else decided."""
        schedule = self.schedule
        if sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
        spacing = spacing or schedule.timestep_spacing
        total, offset, is_euler = schedule.num_train_timesteps, schedule.steps_offset, sampler == "euler"
        try:
            grid = time_grid(steps, spacing, total, offset, fractional=is_euler)
        except ValueError as error:
            raise InputError(str(error)) from error
        alpha_bar = make_alpha_bar(schedule)
        common = {"timesteps": grid, "alpha_bar": alpha_bar, "prediction": schedule.prediction_type}
        if is_euler:
            # As in diffusers: start at variance 1 with leading steps, a little below with the others.
            return partial(euler, **common, pure_noise=spacing == "leading", callback=callback)
        return partial(ddim, **common, final_alpha_bar=final_alpha_bar(schedule, alpha_bar), callback=callback)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 8) -> list[Image.Image]:
        """Latents (B, C, h, w), scaled as the U-Net has them -> pictures. InputError: one is not finite."""
        weight = next(self.vae.parameters())
        pictures: list[Image.Image] = []
        for batch in latents.split(max(1, batch_size)):
            images = self.vae.from_latents(batch.to(weight.device, weight.dtype)).float()
            for image in images:
                if not image.isfinite().all():
                    raise InputError(
                        f"picture {len(pictures)} is not finite with the VAE in {weight.dtype}: use float32"
                    )
                pictures.append(_to_picture(image))
        return pictures

    def save(self, folder: str | Path) -> None:
        """Write a pipeline folder that `load_pipeline` and diffusers' StableDiffusionPipeline read.

        The index goes first and comes last: a folder without it is one that was not finished.
        """
        index = Path(folder) / "model_index.json"
        if index.is_file():
            index.unlink()
        folders.save_unet(folder, self.unet)
        folders.save_vae(folder, self.vae)
        folders.save_text_encoder(folder, self.text_encoders[0])
        folders.save_tokenizer(folder, self.tokenizers[0])
        folders.save_schedule(folder, self.schedule)
        folders.save_model_index(folder)


def _one_each(negative_prompts: str | Sequence[str] | None, count: int) -> list[str]:
    if negative_prompts is None or isinstance(negative_prompts, str):
        return [negative_prompts or ""] * count
    if len(negative_prompts) != count:
        raise InputError(f"{len(negative_prompts)} negative prompts for {count} prompts: give one for all, or one each")
    return list(negative_prompts)


def _to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB. Rounded: truncation would darken every picture by half a level."""
    levels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
