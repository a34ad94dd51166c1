"""How much memory a step takes, before it takes any: networks run on fake tensors, which have shapes and no data."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is active: `now` alive, `peak` at the most.

    A storage counts once, however many views there are of it, until its last tensor is gone.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """known: tensors that are there already, such as weights: views of them are not counted."""
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


def peak_bytes(build: Callable[[], tuple[list[nn.Module], Callable[[], None]]]) -> int:
    """The most memory that a computation has in use at a time, beyond its networks' own weights.

    `build` makes (networks, what to run with them); both happen on fake tensors. Backward passes and checkpointing are
    counted as they are. Attention is counted as the fused kernels do it, without its (L, L) matrices, half precision as
    autocast makes it, with its copies of the weights.
    """
    with FakeTensorMode():
        networks, run = build()
        with MemoryCount(weight for network in networks for weight in network.parameters()) as count:
            run()
    return count.peak


@contextlib.contextmanager
def on_device(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Networks that mostly wait on the CPU, on the device for as long as this lasts."""
    for network in networks:
        network.to(device)
    yield
    for network in networks:
        network.to("cpu")


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next step, on Linux with glibc; elsewhere nothing is done.

    By default it gives blocks back to the system at once, and gets them again page by page: a training step of the
    miniature waits for 11,000 page faults, a twentieth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # 32 MiB, the most that glibc takes: larger blocks still come and go
        mallopt(M_TRIM_THRESHOLD, 2**30)


def format_bytes(count: int) -> str:
    """12.3 GiB; MiB below one."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
