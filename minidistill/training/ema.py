"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- d * shadow + (1 - d) * weights, once per optimizer step, for the parameters that are trained.

    d at update n (from 0) is min(decay, (1 + n) / (10 + n)), so that the first weights, random or just pruned, are
    forgotten quickly, and short runs get an average of fitting length. The shadow is float32 whatever the network is:
    with decay 0.9999 a bf16 or fp16 shadow rounds every update away and never moves.

    Args:
        decay: in [0, 1); 0 averages nothing: the average is the weights themselves.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        self.decay, self._swapped = decay, False
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad and decay > 0}
        self.restart()

    def restart(self) -> None:
        """Forget the weights averaged so far: the average is that of the weights from now on."""
        self.updates = 0
        self.shadow = {name: p.detach().to(torch.float32, copy=True) for name, p in self._weights.items()}

    def decay_now(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Average in the current weights: once per optimizer step, not per micro-batch."""
        if self._swapped:
            raise RuntimeError("EMA.update inside EMA.swap would average the average")
        weight = 1 - self.decay_now()
        for name, shadow in self.shadow.items():
            shadow.lerp_(self._weights[name].detach().to(shadow), weight)
        self.updates += 1

    @contextmanager
    def swap(self) -> Iterator[None]:
        """In the `with` block the network has the averaged weights; after it, or an exception, its own."""
        if self._swapped:
            raise RuntimeError("EMA.swap is already active")
        own = {name: p.detach().clone() for name, p in self._weights.items()}
        try:
            self._swapped = True
            self._copy_into_weights(self.shadow)
            yield
        finally:
            self._copy_into_weights(own)
            self._swapped = False

    @torch.no_grad()
    def _copy_into_weights(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._weights.items():
            p.copy_(values[name])
