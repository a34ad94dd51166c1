"""Layers of Stable Diffusion's U-Net. Attribute names are those of diffusers, so that official weights load."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps, or of SDXL's sizes in pixels (DDPM, arXiv 2006.11239, appendix B).

    t (N,) of any dtype, dim even -> (N, dim), cosines first. Computed in float32: bfloat16 rounds 999 to 1000.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (N,) -> (N, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them: (B, in_dim) -> (B, dim)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Residual block: x (B, C_in, h, w), SiLU of the time embedding (B, emb_dim) -> (B, C_out, h, w).

    All blocks share that SiLU, so the U-Net applies it once. Those of the VAE have no time embedding: emb_dim None.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if emb_dim is None else nn.Linear(emb_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention from x (B, L, C) to context (B, M, D), or to x itself without a context.

    upcast: compute attention in float32 in any precision of the network (the scores of SD 2.1 overflow float16).
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, upcast: bool = False):
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list only for its official name, to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        # (B, L, C) -> (B, heads, L, C/heads)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        if self.upcast:
            wide = torch.promote_types(q.dtype, torch.float32)
            with torch.autocast(q.device.type, enabled=False):
                h = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide)).to(q.dtype)
        elif q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] <= 256:
            # The fused kernel is slower here, its backward pass 2 to 6 times. Longer sequences need it for memory.
            h = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))  # -> (B, L, C)


class GEGLU(nn.Module):
    """Gated linear unit: the first half of the projection, times the exact GELU of the second half."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden * 2)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back: (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int):
        super().__init__()
        # Index 1 is a dropout in diffusers, so that the last layer is named net.2.
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each with its LayerNorm and residual."""

    def __init__(self, dim: int, heads: int, context_dim: int, upcast: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim, upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over the positions of a feature map: x (B, C, h, w), context (B, L, D) -> (B, C, h, w).

    Returns the output of `proj_out`, to which the caller adds the residual x: a feature that BK-SDM-Tiny distils, and
    which as an output keeps its gradient under activation checkpointing. linear: project by nn.Linear (SD 2.x, SDXL)
    instead of 1x1 convolutions (SD 1.x).
    """

    def __init__(self, dim: int, heads: int, depth: int, context_dim: int, *, groups: int, linear: bool, upcast: bool):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)  # all other norms of the U-Net have 1e-5
        self.proj_in = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(dim, heads, context_dim, upcast) for _ in range(depth))
        self.proj_out = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, C, h, w) -> (B, h*w, C)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, x.shape[-2:])  # (B, h*w, C) -> (B, C, h, w)
        return h if self.linear else self.proj_out(h)


class Downsample(nn.Module):
    """Halve height and width (rounded up) by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour interpolation to `size` = (height, width), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
