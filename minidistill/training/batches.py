"""Batches for every diffusion loop: clean latents, text states, noise and timesteps, each sample drawn by its number.

Sample number n of a run has one random generator, seeded by (seed, n). Its timestep, its noise, its draw from the VAE's
posterior and whether its caption is dropped all come from there. So a batch depends on nothing that came before: it is
the same after a resume, for any batch size that covers the same numbers, and however many processes share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor

from minidistill.errors import InputError
from minidistill.models.vae import AutoencoderKL, posterior_std
from minidistill.pipeline import Pipeline, to_pixels
from minidistill.training.seeds import generator_for

CACHE_LIMIT = 2 * 2**30  # bytes of latents to keep in memory; larger data sets are encoded batch by batch


class Captioned(Protocol):
    """Any data set of pictures with captions: `data.scenes.Scenes`, `data.folders.ImageFolder`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, str]: ...


class Batch(NamedTuple):
    """One micro-batch, on the U-Net's device."""

    x0: Tensor  # clean latents (B, C, h, w), scaled
    context: Tensor  # text states (B, L, D)
    eps: Tensor  # standard-normal noise (B, C, h, w)
    t: Tensor  # timesteps (B,), uniform in 0 .. T-1
    captions: list[str]


class Batches:
    """`batches[k]` is micro-batch number k; an epoch is one random order of the data set."""

    def __init__(
        self,
        data: Captioned,
        pipe: Pipeline,
        *,
        batch_size: int,
        seed: int,
        caption_dropout: float = 0.0,
        cache: bool | None = None,
    ) -> None:
        """pipe: encodes pictures and captions. caption_dropout: share of samples trained on the empty caption.

        cache: keep all latents in memory, encoded now; None does so if they take less than CACHE_LIMIT.
        """
        self.data, self.pipe, self.batch_size, self.seed = data, pipe, batch_size, seed
        self.caption_dropout = caption_dropout
        self.device = pipe.device
        self._order: tuple[int | None, Tensor] = (None, torch.empty(0))
        self._cache: list[tuple[Tensor, Tensor, str]] | None = None
        width, height = data[0][0].size
        size = 8 * pipe.vae.config.latent_channels * width * height // pipe.vae.config.downscale**2
        if cache or (cache is None and size * len(data) <= CACHE_LIMIT):
            self._cache = encode_all(data, pipe.vae)

    def __getitem__(self, k: int) -> Batch:
        numbers = range(k * self.batch_size, (k + 1) * self.batch_size)
        generators = [generator_for(self.seed, "sample", n) for n in numbers]
        mean, std, captions = self._posteriors([self._index(n) for n in numbers])
        T = self.pipe.schedule.num_train_timesteps
        t = torch.stack([torch.randint(T, (), generator=g) for g in generators])
        eps = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        draw = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        dropped = [float(torch.rand((), generator=g)) < self.caption_dropout for g in generators]
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        x0 = (mean + std * draw) * self.pipe.vae.config.scaling_factor
        to_device = (tensor.to(self.device, non_blocking=True) for tensor in (x0, eps, t))
        x0, eps, t = to_device
        return Batch(x0, self.pipe.encode_prompts(captions).context.float(), eps, t, captions)

    def _index(self, n: int) -> int:
        """Which entry of the data set sample n is."""
        epoch, place = divmod(n, len(self.data))
        if self._order[0] != epoch:
            order = torch.randperm(len(self.data), generator=generator_for(self.seed, "order", epoch))
            self._order = (epoch, order)
        return int(self._order[1][place])

    def _posteriors(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        if self._cache is not None:
            found = [self._cache[i] for i in indices]
            return (
                torch.stack([m for m, _, _ in found]),
                torch.stack([s for _, s, _ in found]),
                [c for *_, c in found],
            )
        pictures, captions = zip(*(self.data[i] for i in indices), strict=True)
        return *_encode(self.pipe.vae, pictures), list(captions)


def encode_all(data: Captioned, vae: AutoencoderKL, batch_size: int = 32) -> list[tuple[Tensor, Tensor, str]]:
    """(posterior mean, deviation, caption) of every picture, unscaled, float32 on the CPU."""
    result: list[tuple[Tensor, Tensor, str]] = []
    bar = tqdm(total=len(data), desc="encoding pictures", unit="", disable=None, leave=False)
    for start in range(0, len(data), batch_size):
        chosen = [data[i] for i in range(start, min(start + batch_size, len(data)))]
        mean, std = _encode(vae, [picture for picture, _ in chosen])
        result += [(m, s, caption) for m, s, (_, caption) in zip(mean, std, chosen, strict=True)]
        bar.update(len(chosen))
    bar.close()
    return result


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    weight = next(vae.parameters())
    mean, logvar = vae.encode(to_pixels(pictures).to(weight))
    if not mean.isfinite().all():
        raise InputError(f"the VAE's latents are not finite in {weight.dtype}: use the VAE in float32")
    return mean.float().cpu(), posterior_std(logvar).float().cpu()
