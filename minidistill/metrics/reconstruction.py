"""What survives a VAE: held-out scenes, encoded and decoded again."""

from __future__ import annotations

import torch

from minidistill.miniature.judge import judge
from minidistill.miniature.scenes import Scenes
from minidistill.pipeline import VAE, to_pixels


@torch.no_grad()
def evaluate_vae(vae: VAE, count: int) -> dict[str, float]:
    """On held-out scenes: PSNR in dB, on all and on plain grounds (if any are), and the share judged all correct."""
    data = Scenes("test", length=count)
    psnr, right = [], []
    for start in range(0, count, 50):
        images, captions = zip(*(data[i] for i in range(start, min(start + 50, count))), strict=True)
        x = to_pixels(images).to(next(vae.parameters()).device)
        y = vae.from_latents(vae.to_latents(x)).clamp(-1, 1)
        psnr += (-10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()).tolist()
        pixels = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        right += [judge(p, caption).all_correct for p, caption in zip(pixels, captions, strict=True)]
    plain = [psnr[i] for i in range(count) if data.scene(i).full.texture == "plain"]
    result = {"psnr": sum(psnr) / len(psnr), "judged_right": sum(right) / len(right)}
    return {**result, "psnr_plain": sum(plain) / len(plain)} if plain else result
