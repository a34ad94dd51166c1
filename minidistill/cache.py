"""Encode a folder of captioned images once, for any number of trainings: latents, and text states if wanted.

    python -m minidistill.cache --model DIR --data DIR --out CACHE --device cuda
    python -m minidistill.train_kd --data CACHE ...                                  as with --data DIR, only faster
    python -m minidistill.cache --data DIR --scan-only                               what is in a folder, what is broken

The same command goes on with a cache that was interrupted. Images are cropped to their central square and resized.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minidistill.cli import REQUIRED, option, run_command
from minidistill.data import cache
from minidistill.data.cache import CacheKey, LatentCache
from minidistill.data.folders import ImageFolder, Sample, scan
from minidistill.errors import InputError
from minidistill.pipeline import Pipeline, TextStates, load_pipeline
from minidistill.training.batches import SMALL, TOGETHER, at_once, encode_samples
from minidistill.training.device import PRECISIONS, get_device, get_dtype
from minidistill.training.inputs import resolution_for


@dataclass(frozen=True)
class CacheConfig:
    """The flags of this command."""

    model: str = option("miniature", "SOURCE whose VAE, and text encoders, are used")
    data: str = option(REQUIRED, "folder of images with captions, or of img2dataset tars")
    out: str | None = option(None, "folder of the cache")
    resolution: int | None = option(None, "pixels; none takes the model's own", minimum=8)
    flip: bool = option(False, "mirror images too, for trainings with flips; not if captions say left or right")
    text_states: bool = option(False, "also what the text encoders make of each caption (SD 1.x: 236 kB each in fp32)")
    store: str = option(
        "fp32", "on the disk; fp16 halves it, fp32 trains bit for bit as without", choices=("fp32", "fp16")
    )
    batch_size: int | None = option(
        None,
        f"images encoded at once; the last bits of latents may depend on it; none: as training does, "
        f"{TOGETHER} of up to {SMALL} pixels, larger ones alone",
        minimum=1,
    )
    shard: int = option(1024, "examples in a file", minimum=1)
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    precision: str = option("fp32", "of the VAE; several overflow in fp16", choices=PRECISIONS)
    scan_only: bool = option(
        False, "encode nothing: decode every image once, and leave a list of the broken ones in DATA"
    )


def main(config: CacheConfig) -> None:
    """Scan, or make, finish or extend a cache."""
    if config.scan_only:
        print(scan(config.data, config.resolution).summary())
        return
    if not config.out:
        raise InputError("--out is required: folder of the cache")
    device = get_device(config.device)
    dtype = get_dtype(config.precision, device)
    pipe = load_pipeline(config.model)
    resolution = resolution_for(pipe, config.resolution, config.model)
    batch_size = config.batch_size or at_once((resolution, resolution))
    if config.shard % batch_size:
        raise InputError(f"--shard {config.shard} must be a multiple of --batch-size {batch_size}")
    key = CacheKey(
        resolution=resolution,
        crop="center",
        flip=config.flip,
        store=config.store,
        precision=config.precision,
        shard=config.shard,
        vae=cache.vae_digest(pipe.vae),
    )
    pipe.unet.to("meta")  # not needed
    folder = ImageFolder(config.data, resolution)
    print(folder.summary(), flush=True)
    out = Path(config.out)
    done = begin(out, key, config, folder)
    if done < len(folder):
        pipe.vae.to(device, dtype)
        write_latents(out, key, folder, pipe, done, batch_size)
    index = cache.read_index(out)
    if not index["complete"]:
        cache.write_index(out, {**index, "model": config.model, "complete": True})
    if config.text_states:
        write_text_states(out, pipe, device, config.batch_size or TOGETHER)
    print(LatentCache(out).summary())


def begin(out: Path, key: CacheKey, config: CacheConfig, folder: ImageFolder) -> int:
    """Start a cache, or check that the one in `out` is of the same settings and data; how many examples are done."""
    if not (out / cache.INDEX_NAME).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not a cache: take another --out")
        asked = {name: getattr(config, name) for name in ("batch_size", "device", "text_states")}
        where = {"model": config.model, "data": os.path.abspath(config.data), "asked": asked}
        cache.write_index(out, {"key": key, **where, "count": len(folder), "complete": False, "text": None})
        return 0
    there = LatentCache(out, unfinished=True)
    old, new = asdict(there.key), asdict(key)
    if changed := [name for name in new if new[name] != old[name]]:
        told = ", ".join(
            "another VAE" if name == "vae" else f"{name} {new[name]} (was {old[name]})" for name in changed
        )
        raise InputError(f"{out} holds a cache made otherwise: {told}; take another --out, or delete this one")
    there.refuse_stale(folder)
    for leftover in out.glob(".*.safetensors"):  # half written by a run that was killed
        leftover.unlink()
    if 0 < len(there) < len(folder):
        print(f"going on after {len(there)} of {len(folder)} examples", flush=True)
    return len(there)


def write_latents(out: Path, key: CacheKey, folder: ImageFolder, pipe: Pipeline, done: int, batch_size: int) -> None:
    """Write all shards from example `done` on."""
    samples = read_ahead(folder.sample, range(done, len(folder)), 2 * batch_size)
    with tqdm(total=len(folder), initial=done, desc="encoding images", unit="", disable=None) as bar:
        for number in range(done // key.shard, -(-len(folder) // key.shard)):
            facts, means, stds = [], [], []
            for chosen, mean, std in encode_samples(islice(samples, key.shard), pipe.vae, key.flip, batch_size):
                facts += [sample._replace(image=None) for sample in chosen]  # a shard of images fills the memory
                means.append(mean)
                stds.append(std)
                bar.update(len(chosen))
            cache.write_shard(out, number, key, folder, facts, torch.cat(means), torch.cat(stds))


def write_text_states(out: Path, pipe: Pipeline, device: torch.device, batch_size: int) -> None:
    """Add the text states of no prompt, of the empty caption and of each other one; all anew if it was interrupted."""
    there = LatentCache(out)
    if there.has_text:
        there.check(pipe)
        return
    digest = cache.text_digest(pipe)
    captions = list(dict.fromkeys([None, "", *(caption for i in range(len(there)) for caption in there.captions(i))]))
    for encoder in pipe.text_encoders:
        encoder.to(device)
    with tqdm(total=len(captions), desc="encoding captions", unit="", disable=None) as bar:
        for number, start in enumerate(range(0, len(captions), there.key.shard)):
            chosen = captions[start : start + there.key.shard]
            parts = []
            for i in range(0, len(chosen), batch_size):
                parts.append(pipe.encode_prompts(chosen[i : i + batch_size]).map(Tensor.cpu))
                bar.update(len(parts[-1].context))
            cache.write_text_shard(out, number, chosen, TextStates.join(parts), there.key.store)
    # The index last: what it does not name is not there.
    marker = {"digest": digest, "count": len(captions)}
    cache.write_index(out, {**there.index, "text": marker})


def read_ahead(read: Callable[[int], Sample], numbers: Iterable[int], ahead: int) -> Iterator[Sample]:
    """read(n) for each number, in order, while threads read the next `ahead` ones."""
    queue: deque = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for n in numbers:
            queue.append(pool.submit(read, n))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


if __name__ == "__main__":
    run_command(main, CacheConfig, prog="python -m minidistill.cache", description=__doc__)
