"""Batches for every diffusion loop: clean latents, text states, noise and timesteps, each sample drawn by its number.

Sample number n of a run has one random generator, seeded by (seed, n). Its timestep, its noise, its draw from the VAE's
posterior and whether its caption is dropped all come from there. So a batch depends on nothing that came before: it is
the same after a resume, for any batch size that covers the same numbers, and however many processes share the work.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from PIL import ImageOps
from torch import Tensor, nn

from minidistill.data.cache import LatentCache
from minidistill.data.folders import ImageFolder, Sample
from minidistill.diffusion.noise import generator_for
from minidistill.errors import InputError
from minidistill.miniature.scenes import Scenes
from minidistill.models.vae import posterior_std
from minidistill.pipeline import VAE, Origin, Pipeline, TextStates, to_pixels
from minidistill.training import parallel

# Pixels that pass the VAE together: on a CPU more are no faster, and one of 512 x 512 takes 0.8 GiB.
AT_ONCE_ON_CPU, AT_ONCE = 8 * 64**2, 2 * 512**2
TOGETHER = 8  # captions that are encoded at once, and images read at once, where all are
AHEAD = 2  # batches whose images are read before they are needed
CACHE_LIMIT = 2 * 2**30  # bytes of latents, and of text states, to keep in memory; beyond it: encoded batch by batch
Images = Scenes | ImageFolder  # or any sequence of (image, caption) with a fingerprint()
EncodeText = Callable[[Sequence[str | None]], TextStates]


class Batch(NamedTuple):
    """One micro-batch, on the U-Net's device."""

    x0: Tensor  # clean latents (B, C, h, w), scaled
    context: Tensor  # text states (B, L, D)
    eps: Tensor  # standard-normal noise (B, C, h, w)
    t: Tensor  # timesteps (B,), uniform in 0 .. T-1
    captions: list[str | None]  # None: trained without a prompt
    added_cond: dict[str, Tensor] | None  # of SDXL: pooled text, and the sizes of the images

    def with_text(self, text: TextStates) -> Batch:
        """The same images, noise and timesteps under other text states."""
        added_cond = self.added_cond
        if added_cond is not None and text.pooled is not None:
            added_cond = {**added_cond, "text_embeds": text.pooled}
        return self._replace(context=text.context, added_cond=added_cond)


@dataclass(frozen=True)
class Latents:
    """A whole data set, encoded, in memory, with the methods of a LatentCache, which is the same on the disk."""

    mean: Tensor  # (N, 1 or 2, C, h, w), unscaled float32 on the CPU; the second is the mirror image's
    std: Tensor
    all_captions: list[tuple[str, ...]]
    origins: list[Origin]
    size: tuple[int, int]  # width and height of the images

    def __len__(self) -> int:
        return len(self.all_captions)

    @staticmethod
    def join(parts: Sequence[Latents]) -> Latents:
        """The entries of several, one after the other."""
        mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
        captions = [captions for part in parts for captions in part.all_captions]
        return Latents(mean, std, captions, [origin for part in parts for origin in part.origins], parts[0].size)

    def latents(self, numbers: Sequence[int], flipped: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Posterior mean and deviation (B, C, h, w) of these entries or their mirror images."""
        which = torch.tensor(numbers), torch.tensor(flipped, dtype=torch.int64)
        return self.mean[which], self.std[which]

    def captions(self, i: int) -> tuple[str, ...]:
        """All captions of entry i."""
        return self.all_captions[i]

    def origin(self, i: int) -> Origin:
        """Original size and crop of entry i."""
        return self.origins[i]


class Batches:
    """`batches[k]` is micro-batch number k; an epoch is one random order of the data set."""

    def __init__(
        self,
        data: Images | LatentCache | Latents,
        pipe: Pipeline,
        *,
        batch_size: int,
        seed: int,
        caption_dropout: float = 0.0,
        flip: bool = False,
        cache: bool | None = None,
        keep_text: bool = True,
        autocast: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        """pipe: encodes images and captions. caption_dropout: share of samples trained without a prompt.

        flip: random horizontal flip, p = 0.5; not where captions say left and right.
        cache: keep all latents in memory, encoded now; None does so if they take less than CACHE_LIMIT.
        keep_text: keep text states beside latents that are encoded already, if they take less than CACHE_LIMIT.
        autocast: the precision of text states that are not kept.
        """
        self.data, self.pipe, self.batch_size, self.seed = data, pipe, batch_size, seed
        self.caption_dropout, self.flip, self.device = caption_dropout, flip, pipe.device
        self.autocast = autocast or contextlib.nullcontext()
        self.whole, self._part = self, (0, 1)  # of a share: all of each batch; which share, of how many
        self._order: tuple[int | None, Tensor] = (None, torch.empty(0))
        self._cache: Latents | LatentCache | None = None
        self._text: EncodeText | None = None
        self._threads = ThreadPoolExecutor(os.cpu_count())
        self._reading: dict[int, Future[Sample]] = {}  # by sample number
        if isinstance(data, LatentCache):
            data.check(pipe, flip)
        if isinstance(data, LatentCache | Latents):
            self._cache, self.size = data, data.size
        else:
            self._images, self.size = data, data[0][0].size
            width, height = self.size
            size = 8 * pipe.vae.config.latent_channels * width * height // pipe.vae.config.downscale**2 * (1 + flip)
            if cache or (cache is None and size * len(data) <= CACHE_LIMIT):
                self._cache = encode_all(data, pipe.vae, flip)
        if isinstance(data, LatentCache) and data.text:
            self._text = data.text.text_states
        elif self._cache is not None and keep_text:
            self._text = encode_captions(self._cache, pipe)

    def __getitem__(self, k: int) -> Batch:
        numbers = self.numbers(k)
        generators = [generator_for(self.seed, "sample", n) for n in numbers]
        mean, std, all_captions, origins = self._examples(numbers)
        T = self.pipe.schedule.num_train_timesteps
        t = torch.stack([torch.randint(T, (), generator=g) for g in generators])
        eps = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        draw = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        dropped = [float(torch.rand((), generator=g)) < self.caption_dropout for g in generators]
        kept = [None if drop else caption for caption, drop in zip(all_captions, dropped, strict=True)]
        x0 = (mean + std * draw) * self.pipe.vae.config.scaling_factor
        x0, eps, t = (tensor.to(self.device, non_blocking=True) for tensor in (x0, eps, t))
        captions = self._shown(kept, numbers, t)
        with self.autocast:
            text = (self._text or self.pipe.encode_prompts)(captions).map(lambda part: part.to(self.device).float())
        width, height = self.size
        return Batch(x0, text.context, eps, t, captions, self.pipe.added_cond(text.pooled, height, width, origins))

    def share(self) -> Batches:
        """These batches, of which this process gets its part of each. InputError: they cannot be split evenly."""
        size = parallel.share_of(self.batch_size)
        part = copy.copy(self)
        part.whole, part._reading = self, {}
        part.batch_size, part._part = size, (parallel.rank(), parallel.count())
        return part

    @property
    def part(self) -> slice:
        """Where in a whole micro-batch these samples are."""
        return slice(self._part[0] * self.batch_size, (self._part[0] + 1) * self.batch_size)

    def numbers(self, k: int) -> range:
        """The numbers of the samples that micro-batch k has here."""
        part, parts = self._part
        start = (k * parts + part) * self.batch_size
        return range(start, start + self.batch_size)

    def captions(self, count: int) -> list[str]:
        """The (first) captions of the first entries of the data set."""
        return [captions_of(self.data, i)[0] for i in range(min(count, len(self.data)))]

    @property
    def idle(self) -> list[nn.Module]:
        """The networks that no batch needs any more, since their outputs are in memory or in a cache."""
        vae = [] if self._cache is None else [self.pipe.vae]
        return [*vae, *([] if self._text is None else self.pipe.text_encoders)]

    def _shown(self, captions: list[str | None], numbers: Sequence[int], t: Tensor) -> list[str | None]:
        """The captions that these samples are shown with; a subclass may choose others."""
        return captions

    def _index(self, n: int) -> int:
        """Which entry of the data set sample n is."""
        epoch, place = divmod(n, len(self.data))
        if self._order[0] != epoch:
            order = torch.randperm(len(self.data), generator=generator_for(self.seed, "order", epoch))
            self._order = (epoch, order)
        return int(self._order[1][place])

    def _read(self, numbers: range) -> list[Sample]:
        """The images of these samples. Threads go on to those of the next batches, while this one trains."""
        step = self._part[1] * len(numbers)
        wanted = [n + i * step for i in range(1 + AHEAD) for n in numbers]
        for n in wanted:
            if n not in self._reading:
                self._reading[n] = self._threads.submit(_sample, self._images, self._index(n))
        found = [self._reading.pop(n).result() for n in numbers]
        self._reading = {n: self._reading[n] for n in wanted[len(numbers) :]}
        return found

    def _examples(self, numbers: range) -> tuple[Tensor, Tensor, list[str], list[Origin]]:
        """Posterior means, deviations, captions and origins of these samples, each with draws of its own."""
        indices = [self._index(n) for n in numbers]
        flipped = [self.flip and bool(_draw(2, self.seed, "flip", n)) for n in numbers]
        if self._cache is not None:
            mean, std = self._cache.latents(indices, flipped)
            found = [self._cache.captions(i) for i in indices]
            origins = [self._cache.origin(i) for i in indices]
        else:
            samples = self._read(numbers)
            mean, std = _encode(self.pipe.vae, samples, flipped)
            found, origins = [sample.captions for sample in samples], _origins(samples)
        captions = [
            several[_draw(len(several), self.seed, "caption", n)] if len(several) > 1 else several[0]
            for n, several in zip(numbers, found, strict=True)
        ]
        return mean, std, captions, origins


def captions_of(data: Images | LatentCache | Latents, i: int) -> tuple[str, ...]:
    """All captions of entry i, without reading its image if that can be helped."""
    if isinstance(data, ImageFolder | LatentCache | Latents):
        return data.captions(i)
    return (data.caption(i),) if isinstance(data, Scenes) else (data[i][1],)


def encode_all(data: Images, vae: VAE, flip: bool = False) -> Latents:
    """Encode a data set into memory, with a progress bar on terminals. Of several processes, each encodes a part."""
    part, parts = (parallel.rank(), parallel.count()) if len(data) >= parallel.count() else (0, 1)
    own = range(len(data) * part // parts, len(data) * (part + 1) // parts)
    encoded, captions, origins = [], [], []
    with tqdm(total=len(own), desc="encoding images", unit="", disable=None, leave=False) as bar:
        for chosen, mean, std in encode_samples((_sample(data, i) for i in own), vae, flip):
            encoded.append((mean, std))
            captions += [sample.captions for sample in chosen]
            origins += _origins(chosen)
            bar.update(len(chosen))
    mean, std = (torch.cat(some) for some in zip(*encoded, strict=True))
    found = Latents(mean, std, captions, origins, chosen[0].image.size)
    return found if parts == 1 else Latents.join(parallel.gather(found))


def encode_captions(data: Latents | LatentCache, pipe: Pipeline, batch_size: int = 64) -> EncodeText | None:
    """Encode all captions of a data set, and None, into memory -> a function that looks them up.

    None: they would take more than CACHE_LIMIT.
    """
    captions = list(dict.fromkeys([None, *(caption for i in range(len(data)) for caption in data.captions(i))]))
    size = sum(part.nbytes for part in pipe.encode_prompts(captions[:1]) if part is not None)
    if size * len(captions) > CACHE_LIMIT:
        return None
    done = []
    with tqdm(total=len(captions), desc="encoding captions", unit="", disable=None, leave=False) as bar:
        for first in range(0, len(captions), batch_size):
            some = captions[first : first + batch_size]
            done.append(pipe.encode_prompts(some).map(Tensor.cpu))
            bar.update(len(some))
    row, states = {caption: i for i, caption in enumerate(captions)}, TextStates.join(done)
    return lambda asked: states.map(lambda part: part[[row[caption] for caption in asked]])


def encode_samples(
    samples: Iterable[Sample], vae: VAE, flip: bool, batch_size: int | None = None
) -> Iterator[tuple[list[Sample], Tensor, Tensor]]:
    """(samples, posterior means, deviations) of one batch after the other; (n, 1 or 2, C, h, w), as in Latents.

    batch_size: images that are encoded at once; None: `at_once`.
    """
    samples = iter(samples)
    while chosen := list(islice(samples, batch_size or TOGETHER)):
        sides = [_encode(vae, chosen, [s] * len(chosen), batch_size) for s in ((False, True) if flip else (False,))]
        mean, std = (torch.stack(parts, dim=1) for parts in zip(*sides, strict=True))
        yield chosen, mean, std


def at_once(size: tuple[int, int], device: torch.device) -> int:
    """How many images of (width, height) pixels go through the VAE at a time on this device."""
    pixels = AT_ONCE_ON_CPU if device.type == "cpu" else AT_ONCE
    return max(1, pixels // (size[0] * size[1]))


def _draw(count: int, seed: int, what: str, n: int) -> int:
    return int(torch.randint(count, (), generator=generator_for(seed, what, n)))


def _sample(data: Images, i: int) -> Sample:
    if isinstance(data, ImageFolder):
        return data.sample(i)
    image, caption = data[i]
    return Sample(image, (caption,), f"image {i}", original=(image.height, image.width))


def _origins(samples: Sequence[Sample]) -> list[Origin]:
    return [(*sample.original, *sample.crop) for sample in samples]


@torch.no_grad()
def _encode(
    vae: VAE, samples: Sequence[Sample], flipped: Sequence[bool], batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Posterior mean and deviation (B, C, h, w), unscaled, float32 on the CPU. batch_size: as in `encode_samples`."""
    images = [ImageOps.mirror(s.image) if flip else s.image for s, flip in zip(samples, flipped, strict=True)]
    weight = next(vae.parameters())
    few = to_pixels(images).split(batch_size or at_once(images[0].size, weight.device))
    encoded = [vae.encode(pixels.to(weight)) for pixels in few]
    mean, logvar = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    mean, std = mean.float().cpu(), posterior_std(logvar).float().cpu()
    for sample, finite in zip(samples, (mean + std).flatten(1).isfinite().all(1).tolist(), strict=True):
        if not finite:
            what = f"the VAE's latents of {sample.name} are not finite in {weight.dtype}"
            raise InputError(f"{what}: use the VAE in float32")
    return mean, std
