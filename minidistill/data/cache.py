"""A folder of images as the VAE sees them, with their captions: what training reads in place of images.

    cache.json                   what decided the content (CacheKey), where from, how many examples, whether complete
    latents-00000.safetensors    `key.shard` examples each:
        mean, std                (n, 1 or 2, C, h, w): the posterior of the image and, with flip, of its mirror image
        original, crop           (n, 2): height and width it had; rows above, columns left of the square (Sample)
        shown                    (n,): which example the image is of, another one where a file could not be read
        stat, digest             (n, 2) bytes and time of the last change, (n, 16) BLAKE2b of the file's content
        text                     JSON in UTF-8: names, captions
    text-00000.safetensors       text states of the captions, of "" and of None (no prompt), if they are cached too:
        context, pooled          (n, L, D), and for SDXL (n, D')
        text                     JSON in UTF-8: captions

The draw from the posterior is left to training. A shard is written under another name and renamed, so what is there is
whole, and an interrupted run resumes after the last one. Shards are memory-mapped: an example costs its own bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidistill.data.folders import ImageFolder, Sample
from minidistill.data.listing import fingerprint
from minidistill.errors import InputError, shown
from minidistill.pipeline import Origin, Pipeline, TextStates
from minidistill.weights.files import read_json, read_safetensors, write_json, write_safetensors
from minidistill.weights.typed import MISSHAPEN, check_types

FORMAT = "minidistill latents, version 2"
INDEX_NAME = "cache.json"
AGAIN = "make it again with python -m minidistill.cache, in another --out"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
FLOATS, INTEGERS = tuple(DTYPES.values()), (torch.int32, torch.int64, torch.uint8)
TENSORS = {  # in shards: dimensions and types
    **{"mean": (5, FLOATS), "std": (5, FLOATS), "context": (3, FLOATS), "pooled": (2, FLOATS), "shown": (1, INTEGERS)},
    **{name: (2, INTEGERS) for name in ("original", "crop", "stat", "digest")},
}
LATENTS, TEXTS = ("mean", "std", "original", "crop", "shown", "stat", "digest"), ("context",)


@dataclass(frozen=True)
class CacheKey:
    """All settings that decide what is in a cache. The data themselves are compared example by example."""

    resolution: int
    split: str | None  # of the data folder, as is the next
    caption_column: str | None
    flip: bool
    store: str  # fp32 or fp16, on the disk
    precision: str  # of the VAE while encoding
    shard: int  # examples in a file
    vae: str  # `vae_digest`


@dataclass
class _TextIndex:
    digest: str
    count: int


@dataclass
class _Index:
    """What cache.json holds beside its format."""

    key: CacheKey
    data: str
    count: int
    complete: bool
    text: _TextIndex | None


class LatentCache:
    """The examples of a finished cache, in the data folder's order.

    `latents(numbers, flipped)` and `captions(i)` are what batches are made of. InputError: not a cache, not finished, a
    damaged shard, or data that have changed: if the folder it was made from is still there, it is compared.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int | None = None,
        split: str | None = None,
        caption_column: str | None = None,
        *,
        unfinished: bool = False,
    ) -> None:
        """resolution, split, caption_column: that training asks for; None: any.

        unfinished: take the shards there are, and look at no data folder.
        """
        self.path = Path(path)
        self.index = read_index(self.path)
        self.key: CacheKey = self.index["key"]
        if not unfinished and not self.index["complete"]:
            raise InputError(f"{self.path}: this cache is not finished: give the command that makes it once more")
        asked = {"resolution": resolution, "split": split, "caption_column": caption_column}
        for name, value in asked.items():
            if value not in (None, made := getattr(self.key, name)):
                raise InputError(f"{self.path} was made with {name} {made or 'not set'}, not {value}: {AGAIN}")
        self.text: TextCache | None = None
        self._shards: list[dict[str, Tensor]] = []
        self.names: list[str] = []
        self._captions: list[list[str]] = []
        for number in range(-(-self.index["count"] // self.key.shard)):
            file = shard_path(self.path, number)
            if unfinished and not file.exists():
                break
            text = _read_shard(file, LATENTS, self._shards)
            self.names += text["names"]
            self._captions += text["captions"]
        if unfinished:
            return
        if len(self) != self.index["count"]:
            raise InputError(f"{self.path}: {len(self)} examples where {self.index['count']} should be: {AGAIN}")
        if Path(self.index["data"]).is_dir():
            key = self.key
            self.refuse_stale(ImageFolder(self.index["data"], key.resolution, key.split, key.caption_column))
        if self.index["text"]:
            self.text = TextCache(self.path, self.index["text"]["count"], self.key.shard)
            if lacking := {None, "", *chain(*self._captions)} - self.text.captions:
                raise InputError(f"{self.path} has no text states of {shown(lacking.pop())}: {AGAIN}")

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, i: int) -> tuple[str, ...]:
        """All captions of example i."""
        return tuple(self._captions[i])

    def latents(self, numbers: Sequence[int], flipped: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Posterior mean and deviation (B, C, h, w) of examples or their mirror images, unscaled, as stored."""
        found = [(*self._place(i), int(flip)) for i, flip in zip(numbers, flipped, strict=True)]
        mean, std = (torch.stack([shard[name][row, flip] for shard, row, flip in found]) for name in ("mean", "std"))
        return mean, std

    def origin(self, i: int) -> Origin:
        """What example i was cut from."""
        shard, row = self._place(i)
        return (*shard["original"][row].tolist(), *shard["crop"][row].tolist())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images."""
        return self.key.resolution, self.key.resolution

    def check(self, pipe: Pipeline, flip: bool = False) -> None:
        """InputError unless the cache was made with this VAE, these text encoders, and flips if they are asked for."""
        side = self.key.resolution // pipe.vae.config.downscale
        shape = (1 + self.key.flip, pipe.vae.config.latent_channels, side, side)
        if vae_digest(pipe.vae) != self.key.vae or self._shards[0]["mean"].shape[1:] != shape:
            raise InputError(f"{self.path} was made with another VAE than this model's: {AGAIN}")
        if self.text and (text_digest(pipe) != self.index["text"]["digest"] or not self.text.fits(pipe)):
            raise InputError(f"{self.path} holds text states of other text encoders than this model's: {AGAIN}")
        if flip and not self.key.flip:
            raise InputError(f"{self.path} holds no mirror images: turn flips off, or {AGAIN}, with --flip")

    def refuse_stale(self, folder: ImageFolder) -> None:
        """InputError that names the first example in which a data folder is not the one that was cached.

        A file of the same size and time is taken for unchanged; of any other the content decides.
        """
        differences = (self._difference(folder, i) for i in range(min(len(self), len(folder))))
        problem = next(filter(None, differences), "")
        if not problem and len(folder) != self.index["count"]:
            problem = f"it holds {len(folder)} examples, then {self.index['count']}"
        if problem:
            raise InputError(f"{self.path} no longer fits the images in {folder.report.path}: {problem}; {AGAIN}")

    def _difference(self, folder: ImageFolder, i: int) -> str:
        name = self.names[i]
        if folder.name(i) != name:
            return f"{name} was removed or moved, {folder.name(i)} is in its place"
        shard, row = self._place(i)
        shown = int(shard["shown"][row])
        if 0 <= shown < len(folder) and folder.captions(shown) != self.captions(i):
            return f"another caption for {name}"
        stat, digest = (shard[name][row].tolist() for name in ("stat", "digest"))
        if list(folder.stat(i)) != stat and list(_digest(folder, i)) != digest:
            return f"{name} has changed"
        return ""

    def _place(self, i: int) -> tuple[dict[str, Tensor], int]:
        shard, row = divmod(i, self.key.shard)
        return self._shards[shard], row

    def fingerprint(self) -> str:
        """Which files, captions and settings these are of, in a few words."""
        return fingerprint(len(self), (asdict(self.key), *zip(self.names, self._captions, strict=True)))

    def summary(self) -> str:
        """What there is, in one sentence for people."""
        also = " and their mirror images" * self.key.flip + ", text states" * bool(self.text)
        made_of = f"{len(self)} images of {self.index['data']} at {self.key.resolution} pixels"
        return f"{self.path}: latents of {made_of}{also}."


class TextCache:
    """The text states of all captions of a cache."""

    def __init__(self, path: Path, count: int, shard: int) -> None:
        """path: folder of the cache. count: of captions, `shard` in a file. InputError: a shard cannot be read."""
        self._shards: list[dict[str, Tensor]] = []
        self._places: dict[str | None, tuple[int, int]] = {}  # caption -> shard and row
        for number in range(-(-count // shard)):
            for row, caption in enumerate(_read_shard(text_path(path, number), TEXTS, self._shards)["captions"]):
                self._places[caption if isinstance(caption, str) else None] = (number, row)

    @property
    def captions(self) -> set[str | None]:
        """Those whose states are there."""
        return set(self._places)

    def fits(self, pipe: Pipeline) -> bool:
        """Whether the states have the shapes that this model reads."""
        unet, first = pipe.unet.config, self._shards[0]
        shapes = [(pipe.tokenizers[0].max_length, unet.cross_attention_dim)]
        if pipe.is_sdxl:
            shapes.append((unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim,))
        return shapes == [first[name].shape[1:] for name in TextStates._fields if name in first]

    def text_states(self, captions: Sequence[str | None]) -> TextStates:
        """Text states of captions of this cache, "" and None; as they are stored, on the CPU."""
        found = [(self._shards[shard], row) for shard, row in (self._places[caption] for caption in captions)]
        parts = {
            name: torch.stack([shard[name][row] for shard, row in found])
            for name in TextStates._fields
            if name in self._shards[0]
        }
        return TextStates(parts["context"], parts.get("pooled"))


def _read_shard(file: Path, names: Sequence[str], shards: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Add the tensors of a shard to `shards`, and return its text. InputError: damaged, or unlike the first shard."""
    tensors = read_safetensors(file)
    first = shards[0] if shards else tensors
    try:
        text = from_json(tensors["text"])
        count = len(text["captions"])
        for name in (*names, *(["pooled"] if "pooled" in first else [])):
            tensor, (dimensions, dtypes) = tensors[name], TENSORS[name]
            same = tensor.dtype == first[name].dtype and tensor.shape[1:] == first[name].shape[1:]
            if not same or len(tensor) != count or tensor.ndim != dimensions or tensor.dtype not in dtypes:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} of {count} examples")
        if names is LATENTS:
            texts = [*text["names"], *chain(*text["captions"])]
            if len(text["names"]) != count or not all(text["captions"]) or not all(isinstance(t, str) for t in texts):
                raise ValueError("names or captions that are no text")
            pairs = tensors["original"].shape[1], tensors["crop"].shape[1]
            if tensors["mean"].shape != tensors["std"].shape or pairs != (2, 2):
                raise ValueError("tensors that do not fit")
    except MISSHAPEN as error:
        raise InputError(f"{file} is damaged ({error}): {AGAIN}") from error
    shards.append(tensors)
    return text


def is_cache(path: str | Path) -> bool:
    """Whether a folder is a cache, of any version, and not one of images."""
    file = Path(path) / INDEX_NAME
    return file.is_file() and str(read_json(file).get("format", "")).startswith("minidistill latents")


def shard_path(path: Path, number: int) -> Path:
    """The file of one shard of latents."""
    return path / f"latents-{number:05d}.safetensors"


def text_path(path: Path, number: int) -> Path:
    """The file of one shard."""
    return path / f"text-{number:05d}.safetensors"


def read_index(path: Path) -> dict:
    """cache.json, its `key` as a CacheKey. InputError: it is of another version, or not as `write_index` writes it."""
    content = read_json(path / INDEX_NAME)
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        key, text = CacheKey(**content["key"]), content["text"]
        check_types(_Index(**{**content, "key": key, "text": None if text is None else _TextIndex(**text)}))
        if min(key.resolution, key.shard, content["count"]) < 1 or key.store not in DTYPES:
            raise ValueError("an empty cache")
    except MISSHAPEN as error:
        raise InputError(f"{path} is not a cache that this version reads ({FORMAT}): {AGAIN}") from error
    return {**content, "key": key}


def write_index(path: Path, index: Mapping) -> None:
    """Write cache.json, as `read_index` gives it.

    key; data: the folder it is made of; count: of examples; complete: whether all are there; text: None, or {"digest",
    "count"} of finished text states.
    """
    write_json(path / INDEX_NAME, {"format": FORMAT, **index, "key": asdict(index["key"])})


def write_shard(
    path: Path, number: int, key: CacheKey, folder: ImageFolder, samples: Sequence[Sample], mean: Tensor, std: Tensor
) -> None:
    """Write shard `number`, from its samples and their posteriors (n, 1 or 2, C, h, w), float32."""
    numbers = range(number * key.shard, number * key.shard + len(samples))
    stat = [folder.stat(i) for i in numbers]  # before the content is read: what changes later, looks changed
    text = {"names": [folder.name(i) for i in numbers], "captions": [list(sample.captions) for sample in samples]}
    tensors = {
        "mean": mean.to(DTYPES[key.store]),
        "std": std.to(DTYPES[key.store]),
        "original": torch.tensor([sample.original for sample in samples], dtype=torch.int32),
        "crop": torch.tensor([sample.crop for sample in samples], dtype=torch.int32),
        "shown": torch.tensor([sample.number for sample in samples]),
        "stat": torch.tensor(stat, dtype=torch.int64),
        "digest": torch.tensor([list(_digest(folder, i)) for i in numbers], dtype=torch.uint8),
        "text": to_json(text),
    }
    if not tensors["mean"].isfinite().all():
        worst = samples[int(mean.flatten(1).abs().amax(1).argmax())].name
        raise InputError(f"the latents of {worst} are too large for --store {key.store}: use --store fp32")
    write_safetensors(shard_path(path, number), tensors)


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


def vae_digest(vae: nn.Module) -> str:
    """SHA-256 of a VAE's configuration and of all weights that latents depend on."""
    weights = {n: w for n, w in vae.state_dict().items() if not n.startswith(("decoder.", "post_quant_conv."))}
    digest = hashlib.sha256(repr(vae.config).encode())
    hash_weights(digest, weights)
    return digest.hexdigest()


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


def _digest(folder: ImageFolder, i: int) -> bytes:
    """Of the content of example i's file; of nothing if it cannot be read."""
    try:
        content = folder.read_bytes(i)
    except OSError:
        content = b""
    return hashlib.blake2b(content, digest_size=16).digest()
