"""CLIP score: cosine similarity of image and caption (arXiv 2104.08718, without its factor 2.5), and retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidistill.miniature.scenes import Scenes
from minidistill.models.clip import CLIPModel
from minidistill.models.tokenizer import CLIPTokenizer

# CLIP's normalisation of RGB in [0, 1]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: Sequence[Image.Image], size: int = 64) -> Tensor:
    """RGB images -> CLIP's input (B, 3, size, size) float32.

    The short side is resized to `size` (bicubic), then the image is centre-cropped and normalised.
    """
    rows = []
    for image in images:
        short = min(image.size)
        if short != size:
            shape = [side * size // short for side in image.size]  # rounded down, as in OpenAI's code
            image = image.resize(shape, Image.Resampling.BICUBIC)  # noqa: PLW2901
        left, top = ((side - size) // 2 for side in image.size)
        rows.append(np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255)
    pixels = (np.stack(rows) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@torch.no_grad()
def clip_scores(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: Sequence[Image.Image], captions: list[str]
) -> Tensor:
    """Cosine similarity of N images with M captions: (N, M) float32."""
    device = next(clip.parameters()).device
    states = clip.encode_image(clip_pixels(images, clip.config.vision_config.image_size).to(device))
    return (states @ clip.encode_text(tokenizer(captions).to(device)).T).float().cpu()


def retrieval(clip: CLIPModel, tokenizer: CLIPTokenizer, rounds: int = 10, choices: int = 100) -> float:
    """Top-1 accuracy in retrieving the captions of held-out scenes, over `rounds` sets of `choices` distinct ones."""
    data = Scenes("test")
    correct, index = 0, 0
    for _ in range(rounds):
        chosen: dict[str, Image.Image] = {}
        while len(chosen) < choices:
            image, caption = data[index]
            chosen.setdefault(caption, image)
            index += 1
        scores = clip_scores(clip, tokenizer, list(chosen.values()), list(chosen))
        correct += int((scores.argmax(1) == torch.arange(choices)).sum())
    return correct / (rounds * choices)
