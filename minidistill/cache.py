"""Encode a folder of captioned images once, for any number of trainings: latents, and text states if asked for.

    python -m minidistill.cache --model DIR --data DIR --out CACHE --device cuda
    python -m minidistill.train_kd --data CACHE ...                                  as with --data DIR, only faster
    python -m minidistill.cache --data DIR --scan-only                               what is in a folder, what is broken

The same command resumes a cache that was interrupted. Images are cropped to their central square and resized.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minidistill.cli import REQUIRED, option, run_command
from minidistill.data import cache
from minidistill.data.cache import CacheKey, LatentCache
from minidistill.data.folders import ImageFolder, read_ahead
from minidistill.data.listing import CAPTION_COLUMN_HELP, SPLIT_CHOICES, SPLIT_HELP
from minidistill.errors import InputError
from minidistill.pipeline import Pipeline, TextStates, load_pipeline
from minidistill.training.batches import TOGETHER, at_once, encode_samples
from minidistill.training.device import PRECISIONS, get_device, get_dtype
from minidistill.training.inputs import resolution_for
from minidistill.training.run_folder import RunFolder


@dataclass(frozen=True)
class CacheConfig:
    """The flags of this command."""

    model: str = option("miniature", "SOURCE whose VAE and text encoders are used")
    data: str = option(REQUIRED, "folder of images with captions, or of img2dataset tars")
    split: str | None = option(None, SPLIT_HELP, choices=SPLIT_CHOICES)
    caption_column: str | None = option(None, CAPTION_COLUMN_HELP)
    out: str | None = option(None, "folder of the cache; --scan-only needs none")
    resolution: int | None = option(None, "resolution in pixels (default: the model's own)", minimum=8)
    flip: bool = option(False, "encode mirrored images too, for training with --flip; not if captions say left, right")
    store: str = option(
        "fp32",
        "precision on the disk; fp16 takes half the space, fp32 trains to the same bits as without a cache",
        choices=("fp32", "fp16"),
    )
    batch_size: int | None = option(
        None,
        "images encoded at once; the last bits of latents may depend on it (default: as training does, by their size)",
        minimum=1,
    )
    text_states: bool = option(False, "cache the text states of all captions too (SD 1.x: 236 kB each in fp32)")
    shard: int = option(1024, "images in each file of the cache", minimum=1)
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    precision: str = option("fp32", "precision of the VAE; several VAEs overflow in fp16", choices=PRECISIONS)
    scan_only: bool = option(False, "encode nothing: decode every image once, and name the broken ones")


def main(config: CacheConfig) -> None:
    """Scan, or make or finish a cache."""
    if config.data == "scenes":
        raise InputError("--data scenes: they are drawn for each training, which needs no cache of them")
    if config.scan_only:
        folder = ImageFolder(config.data, 1, config.split, config.caption_column)
        for _ in tqdm(read_ahead(folder.sample, range(len(folder)), 256), "scan", len(folder), disable=None):
            pass  # broken images are named as they are met
        print(folder.summary())
        return
    if not config.out:
        raise InputError("--out is required: folder of the cache")
    device = get_device(config.device)
    dtype = get_dtype(config.precision, device)
    pipe = load_pipeline(config.model)
    resolution = resolution_for(pipe, config.resolution, config.model)
    batch_size = config.batch_size or at_once((resolution, resolution), device)
    if config.shard % batch_size:
        raise InputError(f"--shard {config.shard} must be a multiple of --batch-size {batch_size}")
    names = ("split", "caption_column", "flip", "store", "precision", "shard")
    own = {name: getattr(config, name) for name in names}
    key = CacheKey(resolution=resolution, vae=cache.vae_digest(pipe.vae), **own)
    pipe.unet.to("meta")  # not needed
    folder = ImageFolder(config.data, resolution, config.split, config.caption_column)
    print(folder.summary(), flush=True)
    out = Path(config.out)
    done = begin(out, key, config, folder)
    if done < len(folder):
        pipe.vae.to(device, dtype)
        write_latents(out, key, folder, pipe, done, batch_size)
    cache.write_index(out, {**cache.read_index(out), "complete": True})
    if config.text_states:
        write_text_states(out, pipe, device, config.batch_size or TOGETHER)
    print(LatentCache(out).summary())


def begin(out: Path, key: CacheKey, config: CacheConfig, folder: ImageFolder) -> int:
    """Start a cache, or check that the one in `out` is of the same settings and data; how many examples are done."""
    if not (out / cache.INDEX_NAME).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not a cache: take another --out")
        data = os.path.abspath(config.data)
        cache.write_index(out, {"key": key, "data": data, "count": len(folder), "complete": False, "text": None})
        RunFolder(out).lock()
        return 0
    RunFolder(out).lock()
    there = LatentCache(out, unfinished=True)
    old, new = asdict(there.key), asdict(key)
    if changed := [name for name in new if new[name] != old[name]]:
        told = [f"{name} {new[name]} (was {old[name]})" if name != "vae" else "another VAE" for name in changed]
        raise InputError(f"{out} holds a cache of other settings: {', '.join(told)}; take another --out, or delete it")
    there.refuse_stale(folder)
    for leftover in out.glob(".*.safetensors"):  # half written by a run that was killed
        leftover.unlink()
    if 0 < len(there) < len(folder):
        print(f"resuming after {len(there)} of {len(folder)} examples", flush=True)
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
    """Add the text states of no prompt, of the empty caption and of every other one; all anew if it was interrupted."""
    latents = LatentCache(out)
    if latents.text:
        latents.check(pipe)
        return
    digest = cache.text_digest(pipe)
    every = (caption for i in range(len(latents)) for caption in latents.captions(i))
    captions, size = list(dict.fromkeys([None, "", *every])), latents.key.shard
    for encoder in pipe.text_encoders:
        encoder.to(device)
    with tqdm(total=len(captions), desc="encoding captions", unit="", disable=None) as bar:
        for number, start in enumerate(range(0, len(captions), size)):
            chosen, parts = captions[start : start + size], []
            for i in range(0, len(chosen), batch_size):
                parts.append(pipe.encode_prompts(chosen[i : i + batch_size]).map(Tensor.cpu))
                bar.update(len(parts[-1].context))
            cache.write_text_shard(out, number, chosen, TextStates.join(parts), cache.DTYPES[latents.key.store])
    cache.write_index(out, {**latents.index, "text": {"digest": digest, "count": len(captions)}})


if __name__ == "__main__":
    run_command(main, CacheConfig, prog="python -m minidistill.cache", description=__doc__)
