"""Where a network computes, and in which number format."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from minidistill.errors import InputError
from minidistill.models.lora import LORA_PARAMETERS

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """`with autocast:` around the forward pass; `scaler` around backward and step (idle unless fp16)."""

    autocast: contextlib.AbstractContextManager[Any]
    scaler: torch.amp.GradScaler


def get_device(name: str, deterministic: bool = False, report: bool = True) -> torch.device:
    """cpu, cuda, cuda:N, mps or auto -> device. InputError: another name, or a device that is not there.

    auto: cuda if there is one, else mps, else cpu; `report` prints which. deterministic: let PyTorch use no CUDA
    kernel that adds in no fixed order; a RuntimeError of its own names an operation that has no other.
    """
    if deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (":" in name and not (kind == "cuda" and index.isdigit())):
        raise InputError(f"--device takes cpu, cuda, cuda:N, mps or auto, not '{name}'")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if kind == "auto":
        name = next(found for found, number in count.items() if number)
        if report:
            print(f"device: {name}", flush=True)  # not on stderr, where a refusal has one line
    elif int(index or 0) >= count[kind]:
        raise InputError(f"--device {name}: PyTorch sees {count[kind]} {kind} devices here; use --device cpu")
    return torch.device(name)


def get_precision(name: str, device: torch.device, smallest: int = 2) -> Precision:
    """Mixed precision: weights stay float32, the forward pass runs in `name` ("fp32", "bf16", "fp16").

    fp16 gradients underflow without loss scaling. smallest: pixels across the smallest feature map that is downsampled,
    as `inputs.smallest_map` counts them.

    InputError: as in `get_dtype`; fp16 not on CUDA; bf16 on a CPU where its gradients are wrong.
    """
    dtype = get_dtype(name, device)
    if name == "fp16" and device.type != "cuda":
        raise InputError("--precision fp16: training in fp16 needs a CUDA device; use fp32")
    if name == "bf16" and not _has_bf16_gradients(device, smallest):
        what = "PyTorch's bf16 gradients on a CPU are wrong where feature maps of one pixel are downsampled, as here"
        raise InputError(f"--precision bf16: {what}; use fp32, or a larger --resolution")
    scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
    if name == "fp32":
        return Precision(contextlib.nullcontext(), scaler)
    return Precision(torch.autocast(device.type, dtype=dtype), scaler)


@torch.no_grad()
def to_precision(network: nn.Module, name: str) -> None:
    """Round the frozen weights of a network to "fp32", "bf16" or "fp16", in place: half the memory in the last two.

    Autocast would round them anew in every pass. LoRA weights stay, as copies of them train.
    """
    for path, weight in network.named_parameters():
        if not weight.requires_grad and not path.endswith(LORA_PARAMETERS):
            weight.data = weight.data.to(PRECISIONS[name])


def check_compiler(device: torch.device, mode: str) -> None:
    """InputError: --compile lacks what PyTorch compiles with, or weights are shared out (mode: of --parallel)."""
    if mode != "ddp":
        raise InputError(f"--compile takes --parallel ddp, not {mode}, which gathers weights layer by layer")
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise InputError(f"--compile needs a C++ compiler on a CPU: {compiler} is not found; install it, or set CXX")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("--compile needs triton on a GPU: pip install triton, or leave it out")


def compiled(network: nn.Module) -> Callable[..., Any]:
    """A network that is compiled at its first call, apart for each shape of its inputs; itself, it stays as it is."""
    return torch.compile(network, dynamic=False)  # shapes as variables can make inductor fail (PyTorch 2.13, CPU)


def best_precision(device: torch.device, smallest: int = 2) -> str:
    """Name of the fastest safe one. smallest: as in `get_precision`."""
    return "bf16" if _computes_bf16(device) and _has_bf16_gradients(device, smallest) else "fp32"


def get_dtype(name: str, device: torch.device, flag: str = "--precision") -> torch.dtype:
    """fp32, bf16 or fp16 -> type. InputError, naming `flag`: an unknown name, or a type the device cannot do well."""
    if name not in PRECISIONS:
        raise InputError(f"{flag} takes {', '.join(PRECISIONS)}, not '{name}'")
    if name == "fp16" and device.type == "cpu":
        raise InputError(f"{flag} fp16 needs a CUDA device; on a CPU use bf16 or fp32")
    if name == "bf16" and device.type == "cuda" and not _computes_bf16(device):
        raise InputError(f"{flag} bf16: this GPU has no bf16; use fp16 or fp32")
    return PRECISIONS[name]


def _has_bf16_gradients(device: torch.device, smallest: int) -> bool:
    """Not those of a stride-2 convolution of a map one pixel wide on a CPU: findings/torch_bf16_conv_1x1_cpu.sh."""
    return device.type != "cpu" or smallest > 1


def _computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed, not emulated: by GPUs since Ampere, by CPUs with AVX-512."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
