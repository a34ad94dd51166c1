"""Which files make a model, and which to take where there are several: one rule for folders and for the Hub."""

import re
from collections.abc import Collection
from pathlib import Path

import torch

from minidistill.errors import InputError
from minidistill.weights.files import read_json, some

# Names of weights files without their suffixes: {suffix: name}, of diffusers and of transformers
DIFFUSERS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
TRANSFORMERS = {"safetensors": "model", "bin": "pytorch_model"}

# The parts of a pipeline that are read here; `clip` is not in the index: it lies beside a pipeline.
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "clip")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")
TOKENIZER_FILES += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
INDEX, SCHEDULE = "model_index.json", "scheduler/scheduler_config.json"
SINGLE_FILES = (".safetensors", ".ckpt")

# Which weights to take where there are several, best first: (variant, suffix).
FULL_FIRST = (("", "safetensors"), ("", "bin"), (".fp16", "safetensors"), (".fp16", "bin"))
HALF_FIRST = ((".fp16", "safetensors"), ("", "safetensors"), (".fp16", "bin"), ("", "bin"))


def pick_weights(names: Collection[str], dtype: torch.dtype | None = None) -> list[str]:
    """The weights of one part among the files in its folder: a file, or an index and its shards; [] if there are none.

    Full precision comes before half, with float16 the other way round; .safetensors before .bin; whole before sharded.
    Shards are recognised by their names, the variant before or after their number; the index has the last word on them.
    """
    for stems in (DIFFUSERS, TRANSFORMERS):
        for variant, suffix in HALF_FIRST if dtype == torch.float16 else FULL_FIRST:
            stem = stems[suffix]
            single, index = f"{stem}{variant}.{suffix}", f"{stem}.{suffix}.index{variant}.json"
            if single in names:
                return [single]
            if index in names:
                number, tag = r"-\d+-of-\d+", re.escape(variant)
                shard = re.compile(rf"{stem}({tag}{number}|{number}{tag})\.{suffix}")
                return [index, *sorted(name for name in names if shard.fullmatch(name))]
    return []


def is_poorer(weights: str, dtype: torch.dtype | None) -> bool:
    """Whether a file that `pick_weights` found is worse than what `dtype` asks for; None asks for nothing."""
    return ".fp16" in weights and dtype not in (None, torch.float16)


def shards(index: str | Path) -> list[Path]:
    """The files that an index names. InputError: it is not the index of a sharded file, or names files elsewhere."""
    index = Path(index)
    weight_map = read_json(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
    if any(Path(name).name != name or not name for name in names):
        raise InputError(f"{index} is no index of a sharded file: it has no weight_map, or files outside of its folder")
    return [index.parent / name for name in sorted(names)]


def choose_files(names: Collection[str], dtype: torch.dtype | None = torch.float32, what: str = "it") -> list[str]:
    """Of all files of a repository, those that a model is loaded from, each thing in one form only.

    A pipeline begins with model_index.json; one part of a pipeline begins with config.json; a single file is alone.

    names: paths in the repository, with "/". what: the repository, for messages.
    dtype: float16 prefers the half-precision weights. Not of the VAE, which is computed in float32.
    InputError: nothing here can be loaded, or which file is meant is not clear; the message says what there is.
    """
    names = set(names)
    if INDEX in names:
        chosen = [INDEX]
        for part in NETWORKS:
            inside = _inside(names, part)
            weights = pick_weights(inside, torch.float32 if part == "vae" else dtype)
            if "config.json" in inside and not weights:
                only = some(inside - {"config.json"})
                raise InputError(f"{what} has no weights of its {part} as .safetensors or .bin, only {only}")
            chosen += [f"{part}/{name}" for name in ("config.json", *weights) if name in inside]
        beside = [f"{part}/{name}" for part in TOKENIZERS for name in TOKENIZER_FILES]
        return chosen + [name for name in (*beside, SCHEDULE) if name in names]
    weights = pick_weights(names, dtype)
    if weights and "config.json" in names:
        return ["config.json", *weights, *(name for name in TOKENIZER_FILES if name in names)]
    kinds = [[name for name in sorted(names) if name.endswith(suffix)] for suffix in SINGLE_FILES]
    singles = next(filter(None, kinds), [])
    if not singles:
        raise InputError(
            f"{what} holds no model that is read here (a pipeline or a part of one in the diffusers layout, "
            f"{' or '.join(SINGLE_FILES)}); its files are {some(names)}"
        )
    if len(singles) > 1:
        raise InputError(f"{what} holds several files; give one of {some(f'{what}/{name}' for name in singles)}")
    return singles


def missing_files(folder: Path, dtype: torch.dtype | None = None) -> list[str]:
    """What a pipeline folder, or the folder of one part, lacks to be loaded; [] if nothing.

    Weights that are poorer than `dtype` asks for count as missing, those of a pipeline's VAE excepted.
    """
    if not (folder / INDEX).is_file():
        return _missing_of_network(folder, dtype)
    # Not parts: what is no [library, class], or both null where the pipeline has none
    parts = [part for part, kind in read_json(folder / INDEX).items() if isinstance(kind, list) and kind and all(kind)]
    missing, needed = [], [SCHEDULE] * ("scheduler" in parts)
    for part in parts:
        if part in NETWORKS:
            lacking = _missing_of_network(folder / part, None if part == "vae" else dtype)
            missing += [f"{part}/{name}" for name in lacking]
        elif part in TOKENIZERS and not (folder / part / "tokenizer.json").is_file():
            needed += [f"{part}/{name}" for name in TOKENIZER_FILES[:2]]
    return missing + [name for name in needed if not (folder / name).is_file()]


def _missing_of_network(folder: Path, dtype: torch.dtype | None) -> list[str]:
    names = {path.name for path in folder.glob("*") if path.is_file()}
    weights = pick_weights(names, dtype)
    missing = ["config.json"] * ("config.json" not in names) + ["weights"] * (not weights)
    if weights and is_poorer(weights[0], dtype):
        missing.append(f"weights in {dtype}".replace("torch.", ""))
    elif weights and weights[0].endswith(".json"):
        missing += [path.name for path in shards(folder / weights[0]) if not path.is_file()]
    return missing


def _inside(names: Collection[str], part: str) -> set[str]:
    return {name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")}
