"""Seeded random numbers that depend only on (seed, purpose, step or sample index).

They do not depend on earlier draws, on the batch size or on the number of processes. Checkpoints need no random state,
and a resumed run draws the same numbers as an uninterrupted one.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator_for(seed: int, *keys: int | str) -> torch.Generator:
    """A new CPU generator for a seed and keys, e.g. `generator_for(seed, "noise", step)`.

    Keys are hashed with the seed: with seed + step, seed 1 at step 0 would repeat seed 0 at step 1. The CPU generator
    (mt19937) uses 32 bits of the hash, so among n of them two are equal with probability about n^2 / 2^33.
    """
    address = (int(seed), *(key if isinstance(key, str) else int(key) for key in keys))
    digest = hashlib.sha256(repr(address).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard-normal noise (N, *shape), float32, CPU, for N sample indices. Sample i depends on (seed, i) alone."""
    return torch.stack([torch.randn(shape, generator=generator_for(seed, "image", i)) for i in indices])
