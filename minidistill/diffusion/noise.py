"""Every random draw has an address: (seed, what it is for, step or sample index).

A draw depends on its address alone: not on what was drawn before, nor on the batch size, nor on the number of
processes. Hence checkpoints hold no random state, and after a resume step 300 draws what it would have drawn.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator_for(seed: int, *keys: int | str) -> torch.Generator:
    """A fresh CPU generator for one address, e.g. `generator_for(seed, "noise", step)`.

    Seeding with seed + step would make seed 1 at step 0 draw what seed 0 draws at step 1; hence a hash. The
    CPU generator (mt19937) uses 32 bits of it: two of n addresses draw alike with a chance of n^2 / 2^33.
    """
    address = (int(seed), *(key if isinstance(key, str) else int(key) for key in keys))
    digest = hashlib.sha256(repr(address).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard-normal noise (N, *shape), float32, CPU, for N indices. Sample i depends on (seed, i) alone."""
    return torch.stack([torch.randn(shape, generator=generator_for(seed, "image", i)) for i in indices])
