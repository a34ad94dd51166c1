"""The live objects of a run <-> named tensors and JSON, exactly: no pickle, no name unused on either side.

    parts = {"student": student, "optimizer": optimizer, "ema": ema, "scaler": scaler}
    run.save(step, parts)
    ...
    step = run.restore(parts)

Tensors are named part/name: "student/conv_in.weight", "optimizer/student.conv_in.weight/exp_avg". Optimizer
state goes by the name of its parameter, so every trained network must be among the parts: the bare one, not
its DDP or compile wrapper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minidistill.errors import InputError, shown
from minidistill.training import parallel
from minidistill.training.ema import EMA

Part = nn.Module | Optimizer | EMA | torch.amp.GradScaler | Mapping[str, Tensor]
ANOTHER_KIND = "the checkpoint is of another kind of run"


def pack(parts: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parts of a run -> (tensors, JSON-able meta). A Mapping is a set of named tensors, e.g. LoRA weights.

    The tensors are the live ones, not copies: write them before the next step.
    """
    names = _parameter_names(parts)
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for part, thing in parts.items():
        if isinstance(thing, Optimizer):
            found, meta[part] = _pack_optimizer(thing, names)
        elif isinstance(thing, torch.amp.GradScaler):
            found, meta[part] = {}, thing.state_dict()
        elif isinstance(thing, EMA):
            found, meta[part] = thing.shadow, {"updates": thing.updates}
        else:
            found = _tensors_of(thing)
        tensors |= {f"{part}/{name}": tensor for name, tensor in found.items()}
    return tensors, meta


def unpack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Put the state back into freshly built parts, in place.

    Raises:
        InputError: a tensor or a part is missing, unknown, or of another shape or dtype; it is named.
    """
    optimizers = [part for part, thing in parts.items() if isinstance(thing, Optimizer)]
    wanted, wanted_meta = pack({part: thing for part, thing in parts.items() if part not in optimizers})
    if different := {*wanted_meta, *optimizers} ^ set(meta):
        raise InputError(f"{ANOTHER_KIND}: only one of the two has {sorted(different)[0]}")
    found = {key: tensor for key, tensor in tensors.items() if key.partition("/")[0] not in optimizers}
    _copy_all(found, wanted)
    names = _parameter_names(parts)
    for part, thing in parts.items():
        if isinstance(thing, Optimizer):
            states = {key.removeprefix(f"{part}/"): t for key, t in tensors.items() if key.startswith(f"{part}/")}
            _unpack_optimizer(part, states, meta[part], thing, names)
        elif isinstance(thing, torch.amp.GradScaler):
            if bool(meta[part]) != thing.is_enabled():
                raise InputError(f"{ANOTHER_KIND}: only one of the two scales its loss, as fp16 does")
            _check_numbers(part, meta[part], wanted_meta[part])
            thing.load_state_dict(dict(meta[part]))
        elif isinstance(thing, EMA):
            _check_numbers(part, meta[part], wanted_meta[part])
            thing.updates = max(0, meta[part]["updates"])


def _check_numbers(part: str, found: Any, like: Mapping[str, Any]) -> None:
    """InputError: what the checkpoint says of a part are not the finite numbers that `like` has."""
    is_alike = isinstance(found, dict) and found.keys() == like.keys()
    if not is_alike or not all(type(number) in (int, float) and math.isfinite(number) for number in found.values()):
        raise InputError(f"{ANOTHER_KIND}: of its {part} it says {shown(found)}, where this run says {shown(like)}")


def _tensors_of(thing: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(thing.state_dict() if isinstance(thing, nn.Module) else thing)


def _parameter_names(parts: Mapping[str, Part]) -> dict[Tensor, str]:
    """Parameter -> "part.name", over all networks and tensor sets among the parts."""
    names: dict[Tensor, str] = {}
    for part, thing in parts.items():
        if isinstance(thing, nn.Module | Mapping):
            # state_dict first gives back what a network that is shared out has gathered; named_parameters does not.
            named = thing.state_dict(keep_vars=True) if isinstance(thing, nn.Module) else thing
            names |= {p: f"{part}.{name}" for name, p in named.items()}
    return names


@torch.no_grad()
def _copy_all(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in dict.fromkeys([*wanted, *found]):
        has, wants = ((t[name].dtype, tuple(t[name].shape)) if name in t else "nothing" for t in (found, wanted))
        if has != wants:
            raise InputError(f"{ANOTHER_KIND}: its {name} is {has}, not {wants}")
    for name, tensor in wanted.items():
        parallel.fill(tensor, found[name])


def _group_names(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[list[str]]:
    groups = [group["params"] for group in optimizer.param_groups]
    if any(p not in names for group in groups for p in group):
        raise ValueError("the optimizer trains a parameter of a network that is not among the parts")
    return [[names[p] for p in group] for group in groups]


def _pack_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """exp_avg, exp_avg_sq and step by parameter name; lr, betas, ... of each group as JSON."""
    groups = _group_names(optimizer, names)
    tensors = {f"{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "settings": settings}


def _unpack_optimizer(
    part: str, found: Mapping[str, Tensor], meta: Mapping[str, Any], optimizer: Optimizer, names: Mapping[Tensor, str]
) -> None:
    """Back through load_state_dict, which numbers the parameters through all groups."""
    groups = _group_names(optimizer, names)
    if not isinstance(meta, dict) or groups != meta.get("groups"):
        raise InputError(f"{ANOTHER_KIND}: its {part} trains other parameters")
    stored = meta.get("settings")
    if not isinstance(stored, list) or len(stored) != len(groups):
        raise InputError(f"{ANOTHER_KIND}: its {part} has other settings")
    number = {name: i for i, name in enumerate(name for group in groups for name in group)}
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}

    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        name, _, field = key.rpartition("/")
        if name not in number:
            raise InputError(f"{ANOTHER_KIND}: only the checkpoint has {part}/{key}")
        # In the parameter's memory layout (channels_last, say), which a file does not keep.
        like = tensor if field == "step" else parameters[name]
        if not tensor.is_floating_point() or tensor.shape != like.shape or (field == "step" and tensor.ndim):
            raise InputError(f"{ANOTHER_KIND}: its {part}/{key} is {tensor.dtype}, {tuple(tensor.shape)}")
        value = state.setdefault(number[name], {})[field] = torch.empty_like(like, dtype=tensor.dtype)
        parallel.fill(value, tensor)

    param_groups = []
    for group, group_names, settings in zip(optimizer.param_groups, groups, stored, strict=True):
        own = {key: value for key, value in group.items() if key != "params"}  # the rate is set anew in every step
        if not isinstance(settings, dict) or set(settings) != set(own):
            raise InputError(f"{ANOTHER_KIND}: its {part} is of another class, or of another PyTorch version")
        param_groups.append({**own, "params": [number[name] for name in group_names]})
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})
