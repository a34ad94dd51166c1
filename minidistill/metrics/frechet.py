"""Frechet distance of two sets of images in a CLIP's features (FID, arXiv 1706.08500, with CLIP: arXiv 2203.06026)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from minidistill.metrics.clip_score import clip_pixels
from minidistill.models.clip import CLIPModel


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D), as of two Gaussians.

    Biased upwards where there are few samples for the dimension: compare only distances of equally many.

    Raises:
        ValueError: not more samples than dimensions.
    """
    if min(len(a), len(b)) <= a.shape[1]:
        raise ValueError(f"{min(len(a), len(b))} samples do not have a covariance in {a.shape[1]} dimensions")
    a, b = a.double(), b.double()
    first, second = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_a C_b has the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed).item()


@torch.no_grad()
def image_features(clip: CLIPModel, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
    """Unit vectors (N, D) of N images, float32 on the CPU."""
    device, size = next(clip.parameters()).device, clip.config.vision_config.image_size
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return torch.cat([clip.encode_image(clip_pixels(part, size).to(device)).float().cpu() for part in parts])
