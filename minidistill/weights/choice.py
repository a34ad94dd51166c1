"""Which files make a model, and which to take where there are several: one rule for folders and for the Hub."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from minidistill.errors import InputError
from minidistill.weights.files import read_json

# The name of a weights file without its suffix: (.safetensors, .bin)
DIFFUSERS_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS_STEMS = ("model", "pytorch_model")

# The parts of a pipeline that are read here. All else in a repository stays there: the safety checker, the weights
# of other frameworks, single files beside a pipeline.
NETWORKS = {
    "unet": DIFFUSERS_STEMS,
    "vae": DIFFUSERS_STEMS,
    "text_encoder": TRANSFORMERS_STEMS,
    "text_encoder_2": TRANSFORMERS_STEMS,
    "clip": TRANSFORMERS_STEMS,  # not in the index: it lies beside a pipeline, for metrics
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")
TOKENIZER_FILES += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SCHEDULE = "scheduler/scheduler_config.json"
SINGLE_FILES = (".safetensors", ".ckpt")

# Which weights to take where there are several, best first: (variant, suffix).
FULL_FIRST = (("", "safetensors"), ("", "bin"), (".fp16", "safetensors"), (".fp16", "bin"))
HALF_FIRST = ((".fp16", "safetensors"), ("", "safetensors"), (".fp16", "bin"), ("", "bin"))
LAST_RESORT = ((".non_ema", "safetensors"), (".non_ema", "bin"))  # weights without their average: worse images

SHOWN = 12  # files named in a message; the rest are counted


def pick_weights(names: Collection[str], stems: tuple[str, str], dtype: torch.dtype | None = None) -> list[str]:
    """The weights of one part among the files in its folder: a file, or an index and its shards; [] if there are none.

    Full precision comes before half, with float16 the other way round; .safetensors before .bin; whole before sharded.
    Shards are told by their names, the variant before or after their number; the index has the last word on them.
    """
    for variant, suffix in (HALF_FIRST if dtype == torch.float16 else FULL_FIRST) + LAST_RESORT:
        stem = stems[suffix == "bin"]
        single, index = f"{stem}{variant}.{suffix}", f"{stem}.{suffix}.index{variant}.json"
        if single in names:
            return [single]
        if index in names:
            number, tag = r"-\d+-of-\d+", re.escape(variant)
            shard = re.compile(rf"{re.escape(stem)}({tag}{number}|{number}{tag})\.{suffix}")
            return [index, *sorted(name for name in names if shard.fullmatch(name))]
    return []


def is_poorer(weights: str, dtype: torch.dtype | None) -> bool:
    """Whether a file that `pick_weights` found is worse than what `dtype` asks for; None asks for nothing."""
    return dtype is not None and (".non_ema" in weights or (".fp16" in weights and dtype != torch.float16))


def shards(index: str | Path) -> list[Path]:
    """The files that an index names. InputError: it is not the index of a sharded file, or names files elsewhere."""
    index = Path(index)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map: it is not the index of a sharded file")
    names = sorted(set(weight_map.values()))
    if any(Path(name).name != name for name in names):
        raise InputError(f"{index} names files outside of its folder")
    return [index.parent / name for name in names]


def choose_files(names: Collection[str], dtype: torch.dtype | None = torch.float32, what: str = "it") -> list[str]:
    """Of all files of a repository, those that a model is loaded from, each thing in one form only.

    A pipeline begins with model_index.json; one part of a pipeline begins with config.json; a single file is alone.

    Args:
        names: paths in the repository, with "/".
        dtype: float16 prefers the half-precision weights. Not of the VAE, which is computed in float32.
        what: the repository, for messages.

    Raises:
        InputError: nothing here can be loaded, or which file is meant is not clear; the message says what there is.
    """
    names = set(names)
    if "model_index.json" in names:
        chosen = ["model_index.json"]
        for part in NETWORKS:
            chosen += _of_network(names, part, torch.float32 if part == "vae" else dtype, what)
        beside = [f"{part}/{name}" for part in TOKENIZERS for name in TOKENIZER_FILES]
        return chosen + [name for name in (*beside, SCHEDULE) if name in names]
    weights = pick_root_weights(names, dtype)
    if weights and "config.json" in names:
        return ["config.json", *weights, *(name for name in TOKENIZER_FILES if name in names)]
    kinds = [[name for name in names if name.endswith(suffix)] for suffix in SINGLE_FILES]
    singles = next(filter(None, kinds), [])
    if not singles:
        raise InputError(
            f"{what} holds no model in a form that is read here (a pipeline or a part of one in the diffusers layout, "
            f"{' or '.join(SINGLE_FILES)}); its files are {some(names)}"
        )
    if len(singles) > 1:
        raise InputError(f"{what} holds several files; give one of {some(f'{what}/{name}' for name in singles)}")
    return singles


def missing_files(folder: Path, dtype: torch.dtype | None = None) -> list[str]:
    """What a pipeline folder, or the folder of one part, lacks to be loaded; [] if nothing.

    Weights that are poorer than `dtype` asks for count as missing, those of a pipeline's VAE excepted.
    """
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if "model_index.json" not in names:
        return _missing_weights(folder, pick_root_weights(names, dtype), dtype)
    missing: list[str] = []
    for part, kind in read_json(folder / "model_index.json").items():
        if not (isinstance(kind, list) and kind and all(kind)):
            continue  # no part: those are [library, class], or both null where the pipeline goes without
        inside = _inside(names, part)
        if part in NETWORKS:
            wanted = None if part == "vae" else dtype
            lacking = _missing_weights(folder / part, pick_weights(inside, NETWORKS[part], wanted), wanted)
            missing += [f"{part}/{name}" for name in lacking + ["config.json"] * ("config.json" not in inside)]
        elif part in TOKENIZERS and not ({"vocab.json", "merges.txt"} <= inside or "tokenizer.json" in inside):
            missing.append(f"{part}/vocab.json")
        elif part == "scheduler" and SCHEDULE not in names:
            missing.append(SCHEDULE)
    return missing


def pick_root_weights(names: Collection[str], dtype: torch.dtype | None = None) -> list[str]:
    """`pick_weights` of a folder whose model may be diffusers' or transformers'."""
    return pick_weights(names, DIFFUSERS_STEMS, dtype) or pick_weights(names, TRANSFORMERS_STEMS, dtype)


def some(names: Iterable[str]) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more


def _of_network(names: Collection[str], part: str, dtype: torch.dtype, what: str) -> list[str]:
    """config.json and weights of one part, with its folder's name; [] where there is no such part."""
    inside = _inside(names, part)
    config = ["config.json"] if "config.json" in inside else []
    weights = pick_weights(inside, NETWORKS[part], dtype)
    if config and not weights:
        form = "in a form that is read here (.safetensors or .bin)"
        raise InputError(f"{what} has no weights of its {part} {form}, only {some(inside - {'config.json'})}")
    return [f"{part}/{name}" for name in (*config, *weights)]


def _inside(names: Collection[str], part: str) -> set[str]:
    return {name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")}


def _missing_weights(folder: Path, weights: list[str], dtype: torch.dtype | None) -> list[str]:
    if not weights:
        return ["weights"]
    if is_poorer(weights[0], dtype):
        return [f"weights in {dtype}".replace("torch.", "")]
    if not weights[0].endswith(".json"):
        return []
    return [path.name for path in shards(folder / weights[0]) if not path.is_file()]
