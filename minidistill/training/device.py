"""Where a network computes, and in which number format."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NamedTuple

import torch

from minidistill.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """`with autocast:` around the forward pass; `scaler` around backward and step (idle unless fp16)."""

    autocast: contextlib.AbstractContextManager[Any]
    scaler: torch.amp.GradScaler


def get_device(name: str) -> torch.device:
    """cpu, cuda, cuda:N, mps or auto -> device. InputError: another name, or a device that is not there.

    auto: cuda if there is one, else mps, else cpu; a line on stderr says which.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (":" in name and not (kind == "cuda" and index.isdigit())):
        raise InputError(f"--device takes cpu, cuda, cuda:N, mps or auto, not '{name}'")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if kind == "auto":
        name = next(found for found, number in count.items() if number)
        print(f"device: {name}", file=sys.stderr, flush=True)
    elif int(index or 0) >= count[kind]:
        raise InputError(f"--device {name}: PyTorch sees {count[kind]} {kind} devices here; use --device cpu")
    return torch.device(name)


def get_precision(name: str, device: torch.device) -> Precision:
    """Mixed precision: weights stay float32, the forward pass runs in `name` ("fp32", "bf16", "fp16").

    fp16 gradients underflow without loss scaling. InputError: as in `get_dtype`, or fp16 not on CUDA.
    """
    dtype = get_dtype(name, device)
    if name == "fp16" and device.type != "cuda":
        raise InputError("--precision fp16: training in fp16 needs a CUDA device; use fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
    if name == "fp32":
        return Precision(contextlib.nullcontext(), scaler)
    return Precision(torch.autocast(device.type, dtype=dtype), scaler)


def best_precision(device: torch.device) -> str:
    """Name of the fastest safe one."""
    return "bf16" if _computes_bf16(device) else "fp32"


def get_dtype(name: str, device: torch.device, flag: str = "--precision") -> torch.dtype:
    """fp32, bf16 or fp16 -> type. InputError, naming `flag`: an unknown name, or a type the device cannot do well."""
    if name not in PRECISIONS:
        raise InputError(f"{flag} takes {', '.join(PRECISIONS)}, not '{name}'")
    if name == "fp16" and device.type == "cpu":
        raise InputError(f"{flag} fp16 needs a CUDA device; on a CPU use bf16 or fp32")
    if name == "bf16" and device.type == "cuda" and not _computes_bf16(device):
        raise InputError(f"{flag} bf16: this GPU has no bf16; use fp16 or fp32")
    return PRECISIONS[name]


def _computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed, not emulated: by GPUs since Ampere, by CPUs with AVX-512."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
