"""The spellings of one tensor: which name in a file is which name in a model.

The names inside our models are the official ones, so most files need nothing. What differs is listed here and
nowhere else. A name that no rule explains is left alone: the strict loader then reports it.
"""

import re
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

# diffusers before 0.17 named the four linear layers of the VAE's one attention like this.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Wrappers that torch puts around a model leave their name in a state dict saved from inside.
WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")


def match_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a file to the names a model expects, as far as a known spelling explains them.

    Args:
        tensors: what the file holds.
        expected: the state dict of the model; only names and shapes are looked at, so `meta` is fine.

    Returns:
        the same tensors under the model's names; `*.position_ids`, a constant of old files, is dropped.

    Raises:
        ValueError: two tensors of the file mean the same tensor of the model.
    """
    matched: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == "position_ids" and name not in expected:
            continue
        ours = _find(name, expected)
        if ours in matched:
            raise ValueError(f"{origin[ours]} and {name} are two spellings of the same tensor")
        matched[ours] = _squeeze_attention(ours, tensor, expected)
        origin[ours] = name
    return matched


def without_wrappers(name: str) -> str:
    """`name` without what torch's wrappers (DDP, FSDP, compile, checkpointing) leave in it."""
    for wrapper in WRAPPER_NAMES:
        name = name.replace(wrapper, "") if name.startswith(wrapper) or f".{wrapper}" in name else name
    return name


def tiny_name(name: str) -> str:
    """A tensor of a TAESD in the names of its own code -> ours, which are diffusers'; other names stay.

    Both number the layers of one sequence, but the original's decoder starts with a layer without weights.
    """
    match = re.fullmatch(r"(?:taesd_)?(encoder|decoder)\.(\d{1,3})\.(.+)", name)
    if match is None:
        return name
    half, number, rest = match.groups()
    return f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}"


def _find(name: str, expected: Collection[str]) -> str:
    return next((spelling for spelling in _spellings(name) if spelling in expected), name)


def _spellings(name: str) -> Iterator[str]:
    """The names that `name` may have in a model, the most literal first."""
    name = without_wrappers(name)
    yield name
    # transformers 5.6 dropped this prefix from CLIPTextModel, and only from it; its older files all have it.
    yield "text_model." + name
    yield name.removeprefix("text_model.")
    head, _, tail = name.rpartition(".mid_block.attentions.0.")
    part, _, leaf = tail.rpartition(".")
    if head and part in OLD_ATTENTION_NAMES:
        yield f"{head}.mid_block.attentions.0.{OLD_ATTENTION_NAMES[part]}.{leaf}"


def _squeeze_attention(name: str, tensor: Tensor, expected: Mapping[str, Tensor]) -> Tensor:
    """A VAE attention stored as 1x1 convolutions, (O, I, 1, 1) -> (O, I). Other ranks must fit."""
    is_attention = ".mid_block.attentions.0.to_" in name and name in expected
    if is_attention and tensor.ndim == 4 and expected[name].ndim == 2 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor
