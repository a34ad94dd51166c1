"""Training on several devices: torchrun starts a process for each, and each trains on its share of every micro-batch.

    torchrun --nproc-per-node 2 -m minidistill.train_kd

Micro-batches are split evenly (`Batches.share`), and gradients are averaged before every optimizer step
(`optim.optimizer_step`). So the result is that of one process but for its last bits, and a run may be resumed with
another number of processes. The first one alone draws, measures, prints and writes; the others wait for it at the next
optimizer step.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minidistill.errors import InputError, Stopped

PATIENCE = timedelta(hours=12)  # of processes that wait for the first one
BUCKET = 2**24  # gradients averaged at a time: few calls, little memory


def join(device: torch.device) -> torch.device:
    """Join the processes that torchrun started -> the device of this one. Alone: nothing is done."""
    if not dist.is_torchelastic_launched():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        warnings.simplefilter("ignore")
    return device


def refuse(command: str) -> None:
    """InputError: torchrun was used for a command that trains on one device."""
    if dist.is_torchelastic_launched():
        raise InputError(f"{command} trains on one device: start it without torchrun")


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that draws, measures, prints and writes."""
    return rank() == 0


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        with _with_the_others():
            dist.barrier()


def gather(value: Any) -> list[Any]:
    """The values that all processes give, in their order."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _with_the_others():
        dist.all_gather_object(found, value)
    return found


@contextmanager
def _with_the_others() -> Iterator[None]:
    """Stopped: one of the other processes is gone, so what is to be done together cannot be."""
    try:
        yield
    except RuntimeError as error:  # PyTorch has no class of its own for a connection that is closed
        reason = (str(error).strip().splitlines() or ["no reason is given"])[0]
        raise Stopped(f"another process of this training has ended or cannot be reached ({reason})") from error


@torch.no_grad()
def average_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over all processes. None, where others have one, counts as zero."""
    if count() == 1:
        return
    trained = [weight for weight in weights if weight.requires_grad]
    if not trained:
        return
    has = torch.tensor([weight.grad is not None for weight in trained], dtype=torch.int32, device=trained[0].device)
    with _with_the_others():
        dist.all_reduce(has)
    reached = [weight for weight, number in zip(trained, has.tolist(), strict=True) if number]
    for weight in reached:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    for bucket in _buckets([weight.grad for weight in reached if weight.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        with _with_the_others():
            dist.all_reduce(flat)
        flat /= count()
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in their order, about BUCKET numbers of one dtype at a time."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size >= BUCKET or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
