"""The conditions of a U-Net: text states and, for SDXL, pooled text and image sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Origin = tuple[int, int, int, int]  # of an image: original height and width, crop top and left


class TextStates(NamedTuple):
    """The text encoders' output for a batch of prompts."""

    context: Tensor  # (B, L, D)
    pooled: Tensor | None  # (B, D'), of SDXL only

    def map(self, change: Callable[[Tensor], Tensor]) -> TextStates:
        """change applied to each tensor, e.g. to move it to a device."""
        return TextStates(*(None if part is None else change(part) for part in self))

    @classmethod
    def join(cls, batches: Sequence[TextStates]) -> TextStates:
        """Concatenation of batches."""
        context, pooled = zip(*batches, strict=True)
        return cls(torch.cat(context), None if pooled[0] is None else torch.cat(pooled))


def encode_text(
    prompts: Sequence[str | None],
    tokenizers: Sequence[Callable[[list[str]], Tensor]],
    encoders: Sequence[nn.Module],
    is_sdxl: bool,
    zero_unconditional: bool,
) -> TextStates:
    """Text states of prompts; None is the unconditional prompt: "", or with `zero_unconditional` states of zeros.

    SD 1.x and 2.x: the encoder's last hidden state, after the final norm. SDXL (arXiv 2307.01952, sec. 2.1): the
    penultimate hidden states of both encoders, without the final norm, concatenated, and the projected pooled state of
    the second.
    """
    texts = [prompt or "" for prompt in prompts]
    outputs = [
        encoder(tokenizer(texts).to(next(encoder.parameters()).device))
        for encoder, tokenizer in zip(encoders, tokenizers, strict=True)
    ]
    if not is_sdxl:
        return TextStates(outputs[0].last_hidden_state, None)
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = outputs[-1].pooled
    if zero_unconditional:
        absent = torch.tensor([prompt is None for prompt in prompts], device=context.device)
        context = context.masked_fill(absent[:, None, None], 0)
        pooled = pooled.masked_fill(absent[:, None], 0)
    return TextStates(context, pooled)


def micro_conditions(
    pooled: Tensor, height: int, width: int, origins: Sequence[Origin] | None = None
) -> dict[str, Tensor]:
    """SDXL's `added_cond` for images of height x width pixels (arXiv 2307.01952, sec. 2.2): pooled text and sizes.

    pooled: (B, D'). origins: original sizes and crops of the images; None: neither resized nor cropped.
    """
    origins = origins or [(height, width, 0, 0)] * len(pooled)
    ids = [(*origin, height, width) for origin in origins]
    return {"text_embeds": pooled, "time_ids": torch.tensor(ids, dtype=torch.float32, device=pooled.device)}
