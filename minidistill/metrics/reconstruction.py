"""Reconstruction quality of a VAE on held-out scenes."""

from __future__ import annotations

import torch

from minidistill.miniature.judge import judge
from minidistill.miniature.scenes import Scenes
from minidistill.pipeline import VAE, to_pixels


@torch.no_grad()
def evaluate_vae(vae: VAE, count: int) -> dict[str, float]:
    """PSNR in dB of reconstructions, of all scenes and of those on plain grounds (if any); share all correct."""
    data = Scenes("test", length=count)
    psnr, correct = [], []
    for start in range(0, count, 50):
        images, captions = zip(*(data[i] for i in range(start, min(start + 50, count))), strict=True)
        x = to_pixels(images).to(next(vae.parameters()).device)
        y = vae.from_latents(vae.to_latents(x)).clamp(-1, 1)
        psnr += (-10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()).tolist()
        pixels = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        correct += [judge(p, caption).all_correct for p, caption in zip(pixels, captions, strict=True)]
    plain = [psnr[i] for i in range(count) if data.scene(i).full.texture == "plain"]
    result = {"psnr": sum(psnr) / len(psnr), "all_correct": sum(correct) / len(correct)}
    return {**result, "psnr_plain": sum(plain) / len(plain)} if plain else result
