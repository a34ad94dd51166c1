"""Cost of a network: multiply-accumulates and time of a call, and the peak memory of a computation."""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidistill.models.layers import Attention
from minidistill.models.unet import UNet, UNetConfig, random_inputs

GIB = 2**30


def count_macs(unet_or_config: UNet | UNetConfig, height: int, width: int, tokens: int = 77) -> dict[str, int]:
    """Multiply-accumulates of one call on one latent of height x width, with `tokens` text tokens.

    Returns {"conv_linear", "attention"}: convolutions and linear layers, as counted in the BK-SDM paper (and by
    `thop`), and the two matrix products of attention.
    """
    config = unet_or_config.config if isinstance(unet_or_config, UNet) else unet_or_config
    linear, attention = _macs(config, height, width, tokens)
    return {"conv_linear": linear[""], "attention": attention[""]}


def macs_by_module(config: UNetConfig, height: int, width: int, tokens: int = 77) -> dict[str, int]:
    """MACs of convolutions and linear layers in each module, by its name; "" is the whole network."""
    return dict(_macs(config, height, width, tokens)[0])


@lru_cache
def _macs(config: UNetConfig, height: int, width: int, tokens: int) -> tuple[Counter[str], Counter[str]]:
    """MACs by module of convolutions and linear layers, and of attention, counted on the meta device."""
    linear, attention = Counter(), Counter()

    def count(counter: Counter[str], name: str, macs: int) -> None:
        while name:  # the module and all modules that contain it
            counter[name] += macs
            name = name.rpartition(".")[0]
        counter[""] += macs

    with torch.device("meta"):
        unet = UNet(replace(config, upcast_attention=False))  # no effect on MACs; the meta device has no autocast
        inputs = random_inputs(config, 1, height, width, tokens)
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda module, _, out, name=name: count(linear, name, out.numel() * module.weight[0].numel())
            )
        elif isinstance(module, Attention):  # q k^T and the product with v: L x M x C each
            module.register_forward_hook(
                lambda module, args, out, name=name: count(attention, name, 2 * out.numel() * args[-1].shape[1])
            )
    with torch.no_grad():
        unet(*inputs)
    return linear, attention


@torch.no_grad()
def milliseconds(network: nn.Module, inputs: Sequence[Any], rounds: int = 7) -> float:
    """Median time of one call network(*inputs). Timings on a busy machine compare only within one run."""
    is_cuda = next(network.parameters()).is_cuda
    times = []
    for _ in range(rounds + 2):  # the first two warm up
        if is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        network(*inputs)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def in_turns(works: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of each work in each round; a first round more warms up and does not count."""
    times: list[list[float]] = [[] for _ in works]
    for _ in tqdm(range(rounds + 1), desc="timing", unit="round", disable=None, leave=False):
        for work, found in zip(works, times, strict=True):
            begin = time.perf_counter()
            work()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            found.append(1000 * (time.perf_counter() - begin))
    return [found[1:] for found in times]


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of tensors created while it is active: `now` allocated, `peak` at most.

    A storage counts once, regardless of its views, until its last tensor is freed.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """known: existing tensors, such as weights, whose views are not counted."""
        super().__init__()
        self.now = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def peak_memory(tensors: Sequence[Tensor], work: Callable[[], object], device: torch.device) -> int:
    """Bytes on the device at most during a work: its tensors, and those it makes (CUDA: as its allocator counts)."""
    resting = sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return resting + torch.cuda.max_memory_allocated(device) - before
    with MemoryCount(tensors) as count:
        work()
    return resting + count.peak


def peak_bytes(build: Callable[[], tuple[list[nn.Module], Callable[[], None]]]) -> int:
    """Peak memory of a computation in bytes, without the weights of its networks.

    build: returns (networks, function to run); both run on fake tensors. Backward passes and checkpointing are
    included. Attention is counted as in fused kernels, without its (L, L) matrices; half precision as with autocast,
    including its copies of the weights.
    """
    with FakeTensorMode():
        networks, run = build()
        with MemoryCount(weight for network in networks for weight in network.parameters()) as count:
            run()
    return count.peak


@contextlib.contextmanager
def on_device(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within this context, networks that are kept on the CPU are on the device."""
    for network in networks:
        network.to(device)
    yield
    for network in networks:
        network.to("cpu")


def format_bytes(count: int) -> str:
    """12.3 GiB; MiB below one."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def format_count(n: float) -> str:
    """859.5 M, 338.6 G, 12.3 k: three to four digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.1f} {unit}" if n < 1e13 else f"{n / size:.0f} {unit}"
    return f"{n:.0f}"
