"""Training on several devices: torchrun starts a process for each, and each trains on its share of every micro-batch.

    torchrun --nproc-per-node 2 -m minidistill.train_kd --parallel fsdp

Micro-batches are split evenly (`Batches.share`), and gradients are averaged over processes. So the result is that of
one process but for its last bits, and a run may be resumed with another number of processes, or in another mode:

    ddp     every process holds everything; gradients are averaged before each optimizer step (`average_gradients`:
            DistributedDataParallel wraps `forward`, and knows neither encoders called alone nor two losses of one pass)
    zero1   gradients, AdamW's averages and the EMA are shared out, weights between steps too (ZeRO, arXiv 1910.02054)
    fsdp    that, and weights are gathered layer by layer, when they are needed; those of a frozen U-Net too

The last two are PyTorch's `fully_shard`, in place (`shard`). The first process alone draws, measures, prints and
writes, with a copy of what is shared out (`whole`, which all gather); the others wait at the next optimizer step.
"""

from __future__ import annotations

import atexit
import copy
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minidistill.errors import InputError, Stopped
from minidistill.models.clip import EncoderLayer
from minidistill.models.discriminator import Head
from minidistill.models.layers import ResnetBlock, TransformerBlock
from minidistill.pipeline import Pipeline

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MODES = ("ddp", "zero1", "fsdp")
PATIENCE = timedelta(hours=12)  # of processes that wait for the first one
BUCKET = 2**24  # gradients averaged at a time: few calls, little memory
LAYERS = (ResnetBlock, TransformerBlock, EncoderLayer, Head)  # whose weights are gathered together
Network = TypeVar("Network", bound=nn.Module)
_plain: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # what is shared out -> itself, on `meta`


def join(device: torch.device, mode: str = "ddp") -> torch.device:
    """Join the processes that torchrun started -> the device of this one. Alone: nothing is done.

    mode: of MODES; a warning that it does nothing without torchrun.
    """
    if not dist.is_torchelastic_launched():
        if mode != "ddp":
            what = f"--parallel {mode}: one process has all the work, and nothing is shared out"
            warnings.warn(f"{what}; torchrun --nproc-per-node K -m ... starts several", stacklevel=2)
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


class Held(NamedTuple):
    """The shares that one of several processes holds."""

    frozen: float = 1.0  # of U-Nets that do not train
    trained: float = 1.0  # of weights that train, in a step
    states: float = 1.0  # of their gradients, averages of Adam and EMA


def held(mode: str) -> Held:
    """What each process holds in a mode of MODES. In a step `zero1` has trained weights whole, beside its part."""
    part = 1 / count()
    return {"ddp": Held(), "zero1": Held(1.0, 1.0 + part * (part < 1), part), "fsdp": Held(part, part, part)}[mode]


def share_of(batch_size: int) -> int:
    """Samples of a micro-batch that each process takes. InputError: it cannot be split evenly."""
    if batch_size % count():
        split = f"cannot be split over {count()} processes"
        raise InputError(f"--batch-size {batch_size} {split}: it counts the samples of all; give a multiple")
    return batch_size // count()


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
    """Replace gradients by their means over all processes. None, where others have one, counts as zero.

    Weights that are shared out are left as they are: their gradients are means already.
    """
    if count() == 1:
        return
    trained = [weight for weight in weights if weight.requires_grad and not is_part(weight)]
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


def shard(network: nn.Module, mode: str, method: str = "forward") -> None:
    """Leave each process a part of every weight, in place; `network` gathers them while it computes.

    Alone, with ddp, and for a frozen network with zero1, nothing is done. Optimizers and EMAs are made after it.

    Args:
        network: the same on all processes; of a ModuleDict, each of its networks apart.
        method: the one that is called, of networks that are not called themselves.
    """
    if isinstance(network, nn.ModuleDict):
        for one in network.values():
            shard(one, mode, method)
        return
    weights = list(network.parameters())
    is_frozen = not any(weight.requires_grad for weight in weights)
    if count() == 1 or mode == "ddp" or (mode == "zero1" and is_frozen) or network in _plain:
        return
    # not before it is needed: it takes a second to import
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    is_cpu = weights[0].device.type == "cpu"
    if is_cpu and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise InputError(f"--parallel {mode} on CPUs needs PyTorch 2.8 or later: take ddp")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here computes in place
    on_meta = {id(w): nn.Parameter(torch.empty_like(w, device="meta"), w.requires_grad) for w in weights}
    _plain[network] = copy.deepcopy(network, on_meta)
    mesh = init_device_mesh(weights[0].device.type, (count(),))
    layers = [module for module in network.modules() if isinstance(module, LAYERS) and module is not network]
    for module in [*layers, network]:
        part = fully_shard(module, mesh=mesh, reshard_after_forward=mode == "fsdp")
        if is_cpu:  # a sum, divided: gloo's own mean is a sum in some versions (pytorch/pytorch issue 162338)
            part.set_force_sum_reduction_for_comms(True)
    if method != "forward":
        register_fsdp_forward_method(network, method)


def is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is shared out: this process has a part of it."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, whether it is shared out or not. All processes call it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a value, which all processes have, into a tensor, or into the parts of it. All processes call it."""
    if is_part(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def whole(network: Network) -> Network:
    """A copy of a network that is shared out, with all its weights; any other one itself. All processes call it."""
    if network not in _plain:
        return network
    found: Any = copy.deepcopy(_plain[network])
    found.load_state_dict({name: full(tensor) for name, tensor in network.state_dict().items()}, assign=True)
    return found


def whole_pipeline(pipe: Pipeline) -> Pipeline:
    """A pipeline of the whole networks. All processes call it."""
    found = copy.copy(pipe)
    found.unet, found.text_encoders = whole(pipe.unet), [whole(encoder) for encoder in pipe.text_encoders]
    return found


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
