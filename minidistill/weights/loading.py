"""Weights of files into models: built without memory, filled by name, strictly."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidistill.errors import InputError
from minidistill.weights.files import some

Model = TypeVar("Model", bound=nn.Module)
# diffusers before 0.17 named the four linear layers of the VAE's one attention like this.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION = re.compile(r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
# Wrappers that torch puts around a model leave their name in a state dict saved from inside.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")


class _SkipInit(TorchFunctionMode):
    """Leaves out every `torch.nn.init` call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without memory and without drawing random weights: for `load_into`.

    Drawing costs nothing on `meta`, but torch loads its compiler for it, which takes over a second.
    """
    with torch.device("meta"), _SkipInit():
        yield


def load_into(
    model: Model,
    tensors: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> Model:
    """Give every parameter and buffer of `model`, normally built on `meta`, its value from a file. Strict.

    Floating-point tensors become `dtype`; None keeps the file's. What needs no change is the mapped file itself: there
    is no second copy in memory, and a page that training writes to becomes the process's own. (Never write into a
    weights file in place while a model uses it; `atomic_path` replaces files instead.)

    what: the file or folder, for messages. Returns the same model, in eval mode.
    InputError: names or shapes differ; the message counts them and names the first few of each kind.
    """
    expected = model.state_dict()
    found = _match_names(tensors, expected, what)
    if differences := _differences(found, expected):
        raise InputError(f"{what} does not fit its configuration: {differences}")
    values = {}
    for name, tensor in found.items():
        new_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        values[name] = tensor.to(device, new_dtype).contiguous()
    model.load_state_dict(values, strict=True, assign=True)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(model).__name__} keeps {left[0]} out of its state dict, so no file can fill it")
    return model.eval()


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected, or of another shape, in one line; empty when all fits."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} is {tuple(found[name].shape)} in the file, {tuple(expected[name].shape)} by the config"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    retyped = [
        f"{name} is {found[name].dtype}"
        for name in expected
        if name in found and found[name].is_floating_point() != expected[name].is_floating_point()
    ]
    kinds = (
        (missing, f"of {len(expected)} tensors are missing"),
        (unexpected, f"of {len(found)} tensors are not expected"),
        (reshaped, f"of {len(expected)} tensors have another shape"),
        (retyped, f"of {len(expected)} tensors are of another type"),
    )
    return "; ".join(f"{len(names)} {problem} ({some(names, 3)})" for names, problem in kinds if names)


# The names in our models are the official ones, so most files need nothing; what differs is here and in `interop`.


def _match_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a file under the names of a state dict, as far as a known spelling explains them.

    `*.position_ids`, a constant of old files, is dropped. A VAE's attention may be 1x1 convolutions: (O, I, 1, 1) ->
    (O, I). InputError: two tensors of the file mean the same tensor of the model.
    """
    matched: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == "position_ids" and name not in expected:
            continue
        ours = next((spelling for spelling in _spellings(name) if spelling in expected), name)
        if ours in matched:
            raise InputError(f"{what}: {ours} is there twice, in two spellings, one of them {name}")
        is_convolution = ".mid_block.attentions.0.to_" in ours and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        matched[ours] = tensor[:, :, 0, 0] if is_convolution else tensor
    return matched


def without_wrappers(name: str) -> str:
    """`name` without what torch's wrappers (DDP, FSDP, compile, checkpointing) leave in it."""
    return WRAPPERS.sub("", name)


def _spellings(name: str) -> Iterator[str]:
    """The names that `name` may have in a model, the most literal first."""
    name = without_wrappers(name)
    yield name
    # transformers 5.6 dropped this prefix from CLIPTextModel, and only from it; its older files all have it.
    yield "text_model." + name
    yield name.removeprefix("text_model.")
    yield OLD_ATTENTION.sub(lambda found: OLD_NAMES[found[0]], name)
