"""Random Conditioning (arXiv 2504.02011): distillation on more captions than there are images for.

    random conditioning     at timestep t the caption is that of another image, with probability exp(-5 (1 - t/T))
    image-free              x_0 is sampled by the teacher from a caption, with guidance, in place of an encoded image

The teacher's prediction is a target for any pair of x_t and caption. At high t, x_t contains little of x_0, so the
caption need not describe its image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minidistill.diffusion.noise import generator_for
from minidistill.pipeline import Pipeline
from minidistill.training.batches import Batches, Latents, captions_of


def random_caption_probability(t: Tensor, num_train_timesteps: int = 1000) -> Tensor:
    """p(t) = exp(-5 (1 - t/T)), (B,) -> (B,): 0.7 % at t = 0, 8 % half way, nearly 1 at the end."""
    return torch.exp(-5 * (1 - t.float() / num_train_timesteps))


class RandomCaptions(Batches):
    """Batches with random conditioning: some captions are replaced by those of other samples.

    Dropped captions stay dropped, as in the original, where captions are dropped last.
    """

    def _shown(self, captions: list[str | None], numbers: Sequence[int], t: Tensor) -> list[str | None]:
        chances = random_caption_probability(t, self.pipe.schedule.num_train_timesteps).tolist()
        return [
            caption if caption is None else self._other(n, p) or caption
            for n, p, caption in zip(numbers, chances, captions, strict=True)
        ]

    def _other(self, n: int, chance: float) -> str | None:
        """A random caption of the data set for sample n, with probability `chance`, else None."""
        generator = generator_for(self.seed, "random caption", n)
        if float(torch.rand((), generator=generator)) >= chance:
            return None
        several = captions_of(self.data, int(torch.randint(len(self.data), (), generator=generator)))
        return several[int(torch.randint(len(several), (), generator=generator))]


def sample_latents(
    teacher: Pipeline, captions: Sequence[str], side: int, seed: int, guidance: float, batch_size: int = 16
) -> Latents:
    """Latents sampled by the teacher, one for each caption, in place of encoded images; posteriors without variance.

    A step-distilled teacher is sampled with its own settings, others in 25 steps with this guidance. Latent i depends
    on (seed, i) alone. side: of the square images, in pixels.
    """
    done = []
    guidance = guidance if teacher.sampling is None else None
    settings = {"seed": seed, "guidance": guidance, "height": side, "width": side}
    with tqdm(total=len(captions), desc="sampling latents", unit="", disable=None, leave=False) as bar:
        for first in range(0, len(captions), batch_size):
            some = captions[first : first + batch_size]
            done.append(teacher(some, first_index=first, batch_size=batch_size, output="latents", **settings).cpu())
            bar.update(len(some))
    mean = torch.cat(done)[:, None] / teacher.vae.config.scaling_factor  # (N, C, h, w) -> (N, 1, C, h, w)
    origins = [(side, side, 0, 0)] * len(captions)
    return Latents(mean, torch.zeros_like(mean), [(caption,) for caption in captions], origins, (side, side))
