"""Text states of a cache's captions, on disk beside its latents: what the text encoders make of each caption, once.

    text-00000.safetensors    context (n, L, D), for SDXL pooled (n, D'), text: JSON in UTF-8, the captions they are of

The captions are those of the data, "" and None (no prompt). The index of the cache names them last: what it does not
name is not there. Shards are memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidistill.errors import InputError
from minidistill.pipeline import Pipeline, TextStates
from minidistill.weights.files import read_safetensors, write_safetensors


class TextCache:
    """The text states of all captions of a cache."""

    def __init__(self, path: Path, count: int, shard: int) -> None:
        """path: folder of the cache. count: of captions, `shard` in a file. InputError: a shard cannot be read."""
        self._shards: list[dict[str, Tensor]] = []
        self._places: dict[str | None, tuple[int, int]] = {}  # caption -> shard and row
        for number in range(-(-count // shard)):
            tensors = read_safetensors(text_path(path, number))
            for row, caption in enumerate(from_json(tensors["text"])["captions"]):
                self._places[caption] = (number, row)
            self._shards.append(tensors)

    def text_states(self, captions: Sequence[str | None]) -> TextStates:
        """Text states of captions of this cache, "" and None; float32 on the CPU."""
        found = [(self._shards[shard], row) for shard, row in (self._places[caption] for caption in captions)]
        parts = {
            name: torch.stack([shard[name][row] for shard, row in found]).float()
            for name in TextStates._fields
            if name in self._shards[0]
        }
        return TextStates(parts["context"], parts.get("pooled"))


def text_path(path: Path, number: int) -> Path:
    """The file of one shard."""
    return path / f"text-{number:05d}.safetensors"


def write_text_shard(
    path: Path, number: int, captions: Sequence[str | None], states: TextStates, dtype: torch.dtype
) -> None:
    """Write one shard. InputError: a value is not finite in `dtype`."""
    parts = {name: part.to(dtype) for name, part in states._asdict().items() if part is not None}
    for name, part in parts.items():
        if not part.isfinite().all():
            raise InputError(f"the text states ({name}) of shard {number} are not finite in {dtype}: use --store fp32")
    write_safetensors(text_path(path, number), {**parts, "text": to_json({"captions": list(captions)})})


def to_json(content: object) -> Tensor:
    """JSON in UTF-8 as a tensor: safetensors has metadata for text, but writes them in a random order."""
    return torch.frombuffer(bytearray(json.dumps(content, ensure_ascii=False).encode()), dtype=torch.uint8)


def from_json(text: Tensor) -> Any:
    """What `to_json` made a tensor of."""
    return json.loads(text.numpy().tobytes())


def text_digest(pipe: Pipeline) -> str:
    """SHA-256 of the tokenizers and text encoders, with all that decides what they make of a caption."""
    digest = hashlib.sha256(repr((pipe.is_sdxl, pipe.zero_unconditional)).encode())
    for tokenizer in pipe.tokenizers:
        known = (sorted(tokenizer.vocab.items()), tokenizer.merges, tokenizer.max_length, tokenizer.pad_token)
        digest.update(repr(known).encode())
    for encoder in pipe.text_encoders:
        digest.update(repr(encoder.config).encode())
        hash_weights(digest, encoder.state_dict())
    return digest.hexdigest()


def hash_weights(digest: hashlib._Hash, weights: Mapping[str, Tensor]) -> None:
    """Add the name, dtype, shape and every byte of all weights to a digest, in the order of their names."""
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(repr((name, weight.dtype, tuple(weight.shape))).encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
