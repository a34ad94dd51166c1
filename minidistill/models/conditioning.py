"""What a U-Net reads besides latents and timesteps: text states and, in SDXL, pooled text and image sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Origin = tuple[int, int, int, int]  # of an image: original height and width; what was cropped above and at the left


class TextStates(NamedTuple):
    """The text encoders' output for a batch of prompts."""

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


def micro_conditions(
    pooled: Tensor, height: int, width: int, origins: Sequence[Origin] | None = None
) -> dict[str, Tensor]:
    """SDXL's conditions for images of height x width pixels (arXiv 2307.01952, sec. 2.2): pooled text and sizes.

    pooled: (B, D'). origins: what each image was cut from; None: they are whole.
    """
    origins = origins or [(height, width, 0, 0)] * len(pooled)
    ids = [(*origin, height, width) for origin in origins]
    return {"text_embeds": pooled, "time_ids": torch.tensor(ids, dtype=torch.float32, device=pooled.device)}
