"""Small whole files of every kind that strangers give, and the function by which commands read each."""

import argparse
import copy
import functools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from conftest import CAPTIONS, save_images
from data_files import encoded, fill, rows
from torch import nn

from minidistill import cache
from minidistill.generate import read_image, read_latents
from minidistill.interop.lora_files import write_lora
from minidistill.interop.replace import merge_loras, replace_unet, replace_vae
from minidistill.interop.single_file import write_single_file
from minidistill.models.clip import CLIPTextConfig, CLIPTextModel
from minidistill.models.lora import add_lora
from minidistill.models.taesd import AutoencoderTiny, TinyConfig
from minidistill.models.tokenizer import train_bpe
from minidistill.models.unet import SD15, SDXL, UNet
from minidistill.models.vae import AutoencoderKL, VAEConfig
from minidistill.pipeline import Pipeline, ScheduleConfig, load_pipeline
from minidistill.training import inputs
from minidistill.training.ema import EMA
from minidistill.training.run_folder import RunFolder
from minidistill.weights.files import write_safetensors


def tiny(is_sdxl: bool = False) -> Pipeline:
    """A Stable Diffusion with random weights, some 50 kB."""
    torch.manual_seed(0)
    tokenizer = train_bpe(CAPTIONS, vocab_size=530, max_length=8)
    width = {"vocab_size": 530, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    width |= {"num_attention_heads": 1, "max_position_embeddings": 8, "projection_dim": 8, "eos_token_id": 2}
    config = replace(
        SDXL if is_sdxl else SD15, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=2,
        layers_per_block=1, cross_attention_dim=8 * (1 + is_sdxl), transformer_layers_per_block=1, sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32} if is_sdxl else {},
    )  # fmt: skip
    vae = AutoencoderKL(VAEConfig(block_out_channels=(4, 4), norm_num_groups=2, sample_size=8))
    encoders = [CLIPTextModel(CLIPTextConfig(**width), projection=bool(i)) for i in range(1 + is_sdxl)]
    return Pipeline(UNet(config), vae, encoders, [tokenizer] * len(encoders), ScheduleConfig(), None, is_sdxl)


def parts() -> dict:
    """What a run keeps in its checkpoints."""
    net = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {"student": net, "optimizer": optimizer, "ema": EMA(net)}


def with_header(data: bytes, change: Callable[[dict], object]) -> bytes:
    """A .safetensors file with another header, its metadata in order."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(change(header)).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def write_seeds() -> None:
    """All seeds, into the current folder: the same bytes each time."""
    pipe = tiny()
    pipe.save("folder")
    tiny(is_sdxl=True).save("sdxl")
    pipe.save("pickles")
    for path in Path("pickles").rglob("*.safetensors"):
        name = path.name.replace("model.", "pytorch_model.") if path.name == "model.safetensors" else path.name
        part = {"unet": pipe.unet, "vae": pipe.vae}.get(path.parent.name, pipe.text_encoders[0])
        torch.save(part.state_dict(), path.with_name(name).with_suffix(".bin"),
                   _use_new_zipfile_serialization=path.parent.name != "vae")  # fmt: skip
        path.unlink()
    write_single_file("single/model.safetensors", pipe)
    pipe.tokenizers[0].save(Path("single/tokenizer"))
    header = {"minidistill.unet_config": json.dumps(pipe.unet.config.to_dict())}
    write_safetensors("parts/unet.safetensors", pipe.unet.state_dict(), header)
    write_safetensors("parts/vae.safetensors", pipe.vae.state_dict())
    write_safetensors("parts/taesd.safetensors", AutoencoderTiny(TinyConfig(width=4)).state_dict())
    training = {"state_dict": pipe.vae.state_dict(), "epoch": 1, "hparams": argparse.Namespace(a=1)}
    torch.save(training, "parts/vae.ckpt")
    write_safetensors("latents/latents.safetensors", {"latents": torch.ones(1, 4, 4, 4)})
    add_lora(pipe.unet, rank=2)
    for form in ("kohya", "peft"):
        write_lora(f"loras/{form}.safetensors", {"unet": pipe.unet}, form)
    bare = with_header(Path("loras/peft.safetensors").read_bytes(), lambda header: header | {"__metadata__": {}})
    Path("loras/adapter_model.safetensors").write_bytes(bare)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"down_blocks.0": 4}, "use_rslora": False}
    fill(Path("loras"), {"adapter_config.json": config})
    for kind in ("jsonl", "csv", "txt"):
        save_images(Path("data") / kind, kind)
    fill(Path("data/txt"), {"0.json": {"caption": "a", "original_width": 640, "exif": {}}})
    suffixes = ("png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "tga", "ico")
    fill(Path("images"), {f"{kind}.{kind}": encoded(kind=kind) for kind in suffixes})
    fill(Path("images"), {"metadata.jsonl": rows(*(f"{kind}.{kind}" for kind in suffixes))})
    for number in range(2):
        members = {
            f"{i}.{suffix}": content for i in range(3) for suffix, content in (("jpg", encoded(i)), ("txt", "a"))
        }
        fill(Path("tars"), {f"{number}.tar/{name}": content for name, content in members.items()}, number)
    for path in Path().rglob("*.png"):
        os.utime(path, (1, 1))
    options = {"model": "folder", "data": "data/jsonl", "resolution": 8, "shard": 4, "batch_size": 2}
    cache.main(cache.CacheConfig(**options, out="cache", text_states=True))
    run = RunFolder.find("run", settings := {"steps": 3, "data": "scenes", "log_every": 1}).begin(dict(settings))
    run.save(2, parts())
    run.metrics.write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in (1, 2)))
    for path in Path().rglob("*.safetensors"):
        path.write_bytes(with_header(path.read_bytes(), lambda header: dict(sorted(header.items()))))


# readers, as commands call them


def sample(pipe: Pipeline) -> None:
    pipe(["a red ring"], steps=1, guidance=2, height=8, width=8)


def read_part(path: Path) -> None:
    pipe = copy.copy(tiny_pipe())
    (replace_unet if "unet" in path.name else replace_vae)(pipe, path)
    sample(pipe)


def read_lora(path: Path) -> None:
    pipe = copy.copy(tiny_pipe())
    pipe.unet = copy.deepcopy(pipe.unet)
    merge_loras(pipe, [(path.with_name("adapter_model.safetensors") if path.suffix == ".json" else path, 1.0)])


def read_data(path: Path) -> None:
    data = inputs.open_data(str(path.parent), 8, None)
    for i in range(min(len(data), 10)):
        _ = data[i]
    data.fingerprint(), data.summary()


def read_cache(path: Path) -> None:
    data = inputs.open_data("cache", 8, None)
    data.check(tiny_pipe(), flip=False)
    for i in range(len(data)):
        data.latents([i], [False]), data.origin(i)
        _ = data.text and data.text.text_states([*data.captions(i), None])
    data.fingerprint(), data.summary()


def read_run(path: Path) -> None:
    settings = {"steps": 3, "data": "scenes", "log_every": 1}
    RunFolder.find("run", settings, resume=True).restore(fresh := parts())
    fresh["optimizer"].step()


@functools.cache
def tiny_pipe() -> Pipeline:
    return load_pipeline("folder")


READERS: dict[str, Callable[[Path], object]] = {  # by folder of seeds
    "folder": lambda path: sample(load_pipeline("folder")),
    "sdxl": lambda path: sample(load_pipeline("sdxl")),
    "pickles": lambda path: sample(load_pipeline("pickles")),
    "single": lambda path: sample(load_pipeline("single/model.safetensors")),
    "parts": read_part,
    "latents": lambda path: tiny_pipe()(["a ring"], steps=1, latents=read_latents(str(path))),
    "loras": read_lora,
    "data": read_data,
    "images": lambda path: (read_data(path), read_image(str(path))),
    "tars": read_data,
    "cache": read_cache,
    "run": read_run,
}
