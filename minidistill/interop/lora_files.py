"""LoRA files: every common spelling in, kohya's and diffusers' out.

    kohya      lora_unet_down_blocks_..._to_q.lora_down.weight, .lora_up.weight, .alpha; lora_te_, lora_te1_, lora_te2_
    sgm        lora_unet_input_blocks_1_1_... and so on: the same with the block names of Stability AI's own code
    PEFT       unet.down_blocks.0....to_q.lora_A.weight, .lora_B.weight; base_model.model.down_blocks.0....
    diffusers  unet.down_blocks.0....to_q.lora.down.weight; ...attn1.processor.to_q_lora.down.weight

kohya's underscores cannot be undone: "to_out_0" may be to_out.0 or to.out_0. So no name is taken apart here. All the
spellings of all the layers of the networks at hand are written down in a table, and a file's names are looked up in it.
Where no network is at hand, the table is that of all layers that any Stable Diffusion or student has (`every_name`).
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidistill.errors import InputError
from minidistill.interop.ldm import ldm_unet_names
from minidistill.models.clip import SDXL_TEXT_2, CLIPTextModel
from minidistill.models.lora import LoRAWeights, attach_lora, candidates, fit, lora_weights, merge_weights
from minidistill.models.unet import SD15, SDXL, UNet, UNetConfig
from minidistill.weights.files import on_meta, read_json, read_metadata, read_tensors, write_safetensors

Loras = dict[str, dict[str, LoRAWeights]]  # by part of the pipeline ("unet", "text_encoder", ...), by layer

FORMS = ("kohya", "peft")  # that are written
KOHYA_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}

# The end of a tensor's name -> what it is. The first that fits counts.
ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")  # PEFT's own: .lora_A.default.weight

# The end of a layer's name -> what it was in diffusers' first LoRA files, the same for U-Net and text encoder.
OLD_ENDS = {".to_out.0": ".to_out", ".q_proj": ".to_q", ".k_proj": ".to_k", ".v_proj": ".to_v", ".out_proj": ".to_out"}

# What adds something else than a low-rank product to the weights.
OTHER_KINDS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".lora_mid": "LoCon with a core tensor (lora_mid)",
    ".oft_": "OFT",
    ".lora_embedding_": "LoRA of an embedding",
    ".diff.": "whole differences (diff)",
}

METADATA_KEY = "lora_adapter_metadata"  # diffusers' since mid-2025: the LoraConfig, as json, in the header of the file
KEEPS_BASE = (True, False, None, "gaussian", "eva", "mica")  # PEFT's init_lora_weights that leave the base weights

# What a model is, by the width of its text states; and what A1111 looks for in the header before it lists a file.
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
KOHYA_FAMILIES = {
    768: {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    1024: {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    2048: {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}
# kohya's scripts give alpha the type of the weights, or that of the number they were told, and others float32.
ALPHA_DTYPE = "minidistill.alpha_dtype"  # in the header of a PEFT form that was a kohya form: what alpha's was there
ALPHA_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
}
# A U-Net that has every layer of SD 1.x, 2.x, SDXL and the students of them; its widths mean nothing.
WIDEST = replace(
    SDXL,
    block_out_channels=(4, 8, 12, 16),  # not two are equal, so that every stage starts with a conv_shortcut
    down_block_types=("CrossAttnDownBlock2D",) * 4,
    up_block_types=("CrossAttnUpBlock2D",) * 4,
    layers_per_block=2,
    transformer_layers_per_block=10,
    attention_head_dim=1,
    norm_num_groups=4,
)
TRANSFORMERS = ("transformer.", "lora_transformer_", "lora_unet_double_", "lora_unet_single_", "lora_unet_joint_")


# names


def sgm_names(config: UNetConfig) -> dict[str, str]:
    """Name of every layer of a U-Net -> its name in Stability AI's code (ldm, sgm), which numbers blocks through."""
    pairs = ldm_unet_names(config).items()
    return {name.removesuffix(".weight"): sgm.removesuffix(".weight") for name, sgm in pairs}


def name_table(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Every spelling of every layer of the networks -> (part, name of the layer)."""
    table = {}
    for part in KOHYA_PREFIXES:
        if part in networks:
            sgm = sgm_names(networks[part].config) if part == "unet" else {}
            for name in candidates(networks[part]):
                for spelling in _spellings(part, name, sgm.get(name, name)):
                    table.setdefault(spelling, (part, name))  # a bare name of both text encoders is the first one's
    return table


@functools.cache
def every_name() -> dict[str, tuple[str, str]]:
    """`name_table` of all models at once: SD 1.x, 2.x, SDXL and their students.

    That is possible since they number their blocks alike. Only the upsampler of a stage without attention has a place
    of its own in sgm's names, hence the table of SD 1.x beside that of `WIDEST`. (sgm's names of a student, which
    hardly anyone uses, have other numbers; they need the network.)
    """
    with on_meta():
        encoders = {"text_encoder": CLIPTextModel(SDXL_TEXT_2), "text_encoder_2": CLIPTextModel(SDXL_TEXT_2, True)}
        return name_table({"unet": UNet(SD15)}) | name_table({"unet": UNet(WIDEST), **encoders})


def _spellings(part: str, name: str, sgm: str) -> Iterator[str]:
    dotted = [name, name.removeprefix("text_model.")]  # transformers 5.6 dropped that prefix
    for end, old in OLD_ENDS.items():
        dotted += [d.removesuffix(end) + old for d in dotted if d.endswith(end)]
    for d in dotted:
        yield from (f"{part}.{d}", d)
    for official in (name, sgm):
        for prefix in KOHYA_PREFIXES[part]:
            yield prefix + official.replace(".", "_")


# reading


def read_lora(path: str | Path, networks: Mapping[str, nn.Module]) -> Loras:
    """Read a LoRA for these networks: {"unet": UNet, "text_encoder": ..., "text_encoder_2": ...}, as many as there are.

    Every tensor of the file is used or it is refused. An alpha that is nowhere given is the rank, so that the scale
    alpha / r is 1; PEFT keeps it in the file's header or in an adapter_config.json beside the file.

    Raises:
        InputError: the file is broken, is no LoRA, is of a kind that is not supported, or is for another model.
    """
    path = Path(path)
    modules, loras = _read(path, read_tensors(path), name_table(networks), networks)
    misfits = []
    for part, layers in loras.items():
        for name, weights in layers.items():
            try:
                layers[name] = fit(weights, networks[part].get_submodule(name))
            except ValueError as error:
                misfits.append(f"{part}.{name}: {error}")
    if misfits:
        what = f"{len(misfits)} of {len(modules)} modules have another shape in this model ({misfits[0]})"
        raise InputError(f"{path}: {what}: {_verdict(modules, networks)}")
    return loras


def rewrite_lora(
    source: str | Path,
    dest: str | Path,
    form: str,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the LoRA of one file into another in kohya's or PEFT's form, without its model: `write_lora` says which.

    The tensors are the same, bit by bit, in diffusers' block names, and what the header says is kept. From kohya's
    form to PEFT's and back, all is as it was; only an alpha that was nowhere given, and means the rank, is written out.

    Args:
        dtype: of the tensors in the file, but for alpha; as they are if not given.
        metadata: text for the header, beside what is there and what the form needs.

    Raises:
        InputError: as in `read_lora`; or a layer that is in no Stable Diffusion and no student of one.
    """
    source = Path(source)
    tensors = read_tensors(source)
    modules, loras = _read(source, tensors, every_name(), {})
    header = read_metadata(source) if source.suffix == ".safetensors" else {}
    halves = {f"{part}.{name}": found for part, layers in loras.items() for name, found in layers.items()}
    torn = [n for n, w in halves.items() if min(w.down.dim(), w.up.dim()) < 2 or not len(w.down) == w.up.shape[1] > 0]
    if torn:
        what = f"the halves of {len(torn)} of {len(modules)} modules do not fit each other ({_first_few(torn)})"
        raise InputError(f"{source}: {what}; download or save it again")
    alpha_dtype = next((t.dtype for name, t in tensors.items() if name.endswith(".alpha")), None)
    if alpha_dtype is None:
        alpha_dtype = ALPHA_DTYPES.get(header.get(ALPHA_DTYPE), torch.float32)
    is_sdxl = (
        _text_width({name: roles["down"] for name, roles in modules.items()}) == SDXL.cross_attention_dim
        or any(name.startswith("lora_te1_") for name in modules)
        or header.get("ss_base_model_version", "").startswith("sdxl")
    )
    if is_sdxl:
        loras.setdefault("text_encoder_2", {})  # kohya's name of the first encoder depends on there being a second
    kept = {key: text for key, text in header.items() if key not in (METADATA_KEY, ALPHA_DTYPE, "format")}
    write_lora(dest, loras, form, dtype, {**kept, **(metadata or {})}, alpha_dtype)


def _read(
    path: Path,
    tensors: Mapping[str, Tensor],
    table: Mapping[str, tuple[str, str]],
    networks: Mapping[str, nn.Module],
) -> tuple[dict[str, dict[str, Tensor]], Loras]:
    """The modules of a file as it spells them, and the same by the names in `table`, in the shapes of the file.

    networks: those that the table is of, for messages; none if it is `every_name`.
    """
    modules, foreign = _by_module(path, tensors)
    _check(path, modules, foreign, networks, table)
    config = _peft_config(path, tensors)
    loras: Loras = {}
    for spelling, roles in modules.items():
        part, name = table[spelling]
        if name in loras.setdefault(part, {}):
            raise InputError(f"{path}: {part}.{name} is there twice, once as {spelling}")
        alpha = _alpha(path, roles, spelling.removeprefix(f"{part}."), _settings(config, part))
        loras[part][name] = LoRAWeights(roles["down"], roles["up"], alpha)
    return modules, loras


def _by_module(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors by module, as the file spells it, and by role; and the names that belong to no LoRA."""
    modules: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        for mark, kind in OTHER_KINDS.items():
            if mark in f"{key}.":
                raise InputError(f"{path}: it holds {kind} ({key}), which is not supported; plain LoRA is")
        name = ADAPTER_NAME.sub(r".\1.weight", key).replace("base_model.model.", "").replace(".processor.", ".")
        end = next((end for end in ROLES if name.endswith(end)), None)
        if end is None:
            foreign.append(key)
            continue
        roles = modules.setdefault(name.removesuffix(end), {})
        if ROLES[end] in roles:
            raise InputError(f"{path}: {key} is there twice, in two spellings or of two adapters")
        roles[ROLES[end]] = tensor
    return modules, foreign


def _check(
    path: Path,
    modules: Mapping[str, Mapping[str, Tensor]],
    foreign: list[str],
    networks: Mapping[str, nn.Module],
    table: Mapping[str, tuple[str, str]],
) -> None:
    """Refuse a file that is not, whole and in all its names, a LoRA for the networks that the table is of."""
    if not any("down" in roles or "up" in roles for roles in modules.values()):
        names = _first_few(foreign or list(modules)) or "none"
        raise InputError(f"{path} is not a LoRA: none of its tensors ({names}) is a lora_down, lora_A or the like")
    count = len(modules)
    unknown = [spelling for spelling in modules if spelling not in table]
    if unknown:
        where = "this model" if networks else "any Stable Diffusion or student of one"
        some = f"{len(unknown)} of {count} modules do not exist in {where}"
        what = f"0 of {count} modules matched" if len(unknown) == count else some
        raise InputError(f"{path}: {what} ({_first_few(unknown)}): {_verdict(modules, networks)}")
    if foreign:
        total = len(foreign) + sum(map(len, modules.values()))
        raise InputError(f"{path}: {len(foreign)} of {total} tensors are no part of a LoRA ({_first_few(foreign)})")
    half = [spelling for spelling, roles in modules.items() if not {"down", "up"} <= roles.keys()]
    if half:
        what = f"{len(half)} of {count} modules have only one half, down or up ({_first_few(half)})"
        raise InputError(f"{path}: {what}; download or save it again")


def _verdict(modules: Mapping[str, Mapping[str, Tensor]], networks: Mapping[str, nn.Module]) -> str:
    """What the file is for and what the model is, as far as names and shapes tell."""
    width = _text_width({name: roles["down"] for name, roles in modules.items() if "down" in roles})
    theirs = _family(width)
    if any(name.startswith(TRANSFORMERS) for name in modules):
        theirs = "a diffusion transformer (SD 3, FLUX)"
    elif width is None and any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in modules):
        theirs = "SDXL"
    ours = _family(networks["unet"].config.cross_attention_dim) if "unet" in networks else None
    if theirs is None:
        return "it looks like a LoRA for another model"
    if ours is None:
        return f"it looks like a LoRA for {theirs}"
    if theirs == ours:
        return f"it is a LoRA for {theirs}, as this model is, but for one with other layers"
    return f"it is a LoRA for {theirs}, this model is {ours}"


def _text_width(downs: Mapping[str, Tensor]) -> int | None:
    """The width of the text states that a LoRA's cross-attention takes; None if it has none."""
    ends = ("attn2.to_k", "attn2.to_v", "attn2_to_k", "attn2_to_v")
    return next((down.shape[1] for name, down in downs.items() if name.endswith(ends) and down.dim() > 1), None)


def _family(width: int | None) -> str | None:
    return FAMILIES.get(width, f"a model of text width {width}") if width else None


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:3] + ["..."] * (len(names) > 3))


# alpha


def _peft_config(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """PEFT's LoraConfig: from the file's header, else from adapter_config.json beside it; {} if there is none."""
    text = read_metadata(path).get(METADATA_KEY) if path.suffix == ".safetensors" else None
    beside = path.with_name("adapter_config.json")
    if text is None:
        is_peft = any(".lora_A." in key for key in tensors)
        return read_json(beside) if is_peft and beside.is_file() else {}
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: its {METADATA_KEY} is not valid json ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: its {METADATA_KEY} is not a json object")
    return config


def _settings(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a LoraConfig says of one part: all of it, or, where it is for several, what is under the part's name."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    return {key: value for key, value in config.items() if "." not in key} | own


def _alpha(path: Path, roles: Mapping[str, Tensor], module: str, settings: Mapping[str, Any]) -> float:
    """From the file's own tensor, else from PEFT's settings, else the rank. With rank-stabilised LoRA, in whose
    place the scale is alpha / sqrt(r), the alpha that gives the same scale here."""
    rank = len(roles["down"]) if roles["down"].dim() else 0
    kind, init = settings.get("peft_type") or "LORA", settings.get("init_lora_weights")
    if kind != "LORA" or init not in KEEPS_BASE:
        raise InputError(f"{path}: it is a {kind} started by {init}, which is not supported; plain LoRA is")
    try:
        if "alpha" in roles:
            alpha = roles["alpha"].item()
        else:
            patterns = (settings.get("alpha_pattern") or {}).items()
            own = [value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
            alpha = float([*own, settings.get("lora_alpha", rank)][0])
            alpha *= math.sqrt(rank) if settings.get("use_rslora") else 1
    except (RuntimeError, TypeError, ValueError, AttributeError, re.error) as error:
        raise InputError(f"{path}: the alpha of {module} cannot be read ({error})") from error
    if not math.isfinite(alpha):
        raise InputError(f"{path}: the alpha of {module} is {alpha}")
    return alpha


# into networks


def merge_into(networks: Mapping[str, nn.Module], loras: Loras, scale: float = 1.0) -> dict[str, int]:
    """Add a LoRA to the weights, in place, one after the other if there are several. Returns layers by part."""
    return {part: merge_weights(networks[part], weights, scale) for part, weights in loras.items()}


def attach(
    networks: Mapping[str, nn.Module], loras: Loras, scale: float = 1.0, dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Make a LoRA live, in place: see `attach_lora`. Returns layers by part."""
    return {part: attach_lora(networks[part], weights, scale, dtype) for part, weights in loras.items()}


def matched_line(loras: Loras, counts: Mapping[str, int]) -> str:
    """ "788/788 modules matched", from what was read and what `merge_into` or `attach` found a place for."""
    parts = ", ".join(f"{part} {count}" for part, count in counts.items())
    line = f"{sum(counts.values())}/{sum(map(len, loras.values()))} modules matched"
    return f"{line} ({parts})" if len(counts) > 1 else line


# writing


def write_lora(
    path: str | Path,
    loras: Mapping[str, nn.Module | Mapping[str, LoRAWeights]],
    form: str = "kohya",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    alpha_dtype: torch.dtype = torch.float32,
) -> None:
    """Write a LoRA, atomically; a network stands for its live LoRA, without the scale that is set there.

    Args:
        loras: by part of the pipeline. Name all its text encoders, if only with {}: kohya's names depend on that.
        form: "kohya" is read by diffusers, ComfyUI and A1111 alike. "peft" is diffusers' own; its alpha is in the
            header, where other programs and diffusers before mid-2025 do not look: they take alpha = rank.
        dtype: of the tensors in the file; as they are if not given.
        metadata: text for the header, beside what the form needs, and before it where both say something.
        alpha_dtype: of kohya's alpha. PEFT's form, where alpha is text, keeps a note of it.

    Raises:
        InputError: there is no LoRA to write, or the file cannot be written.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}")
    found = {part: lora_weights(lora) if isinstance(lora, nn.Module) else lora for part, lora in loras.items()}
    if not any(found.values()):
        raise InputError(f"there is no LoRA to write to {path}: no layer has one")
    tensors, header = _to_kohya(found, alpha_dtype) if form == "kohya" else _to_peft(found, alpha_dtype)
    cast = {n: t if dtype is None or n.endswith(".alpha") else t.to(dtype) for n, t in tensors.items()}
    write_safetensors(path, cast, {**header, **(metadata or {})})


def _to_kohya(
    loras: Mapping[str, Mapping[str, LoRAWeights]], alpha_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    for part, weights in loras.items():
        # SD's one text encoder is te, SDXL's two are te1 and te2
        prefix = KOHYA_PREFIXES[part][-1 if "text_encoder_2" in loras else 0]
        for name, (down, up, alpha) in weights.items():
            key = prefix + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha), dtype=alpha_dtype)
    every = [found for weights in loras.values() for found in weights.values()]
    ranks, alphas = {len(found.down) for found in every}, {found.alpha for found in every}
    width = _text_width({name: found.down for name, found in loras.get("unet", {}).items()})
    return tensors, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        **KOHYA_FAMILIES.get(width, {}),
    }


def _to_peft(
    loras: Mapping[str, Mapping[str, LoRAWeights]], alpha_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, config = {}, {}
    for part, weights in loras.items():
        for name, (down, up, _) in weights.items():
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
        if weights:
            config |= {f"{part}.{key}": value for key, value in _lora_config(weights).items()}
    note = {} if alpha_dtype == torch.float32 else {ALPHA_DTYPE: str(alpha_dtype).removeprefix("torch.")}
    return tensors, {METADATA_KEY: json.dumps(config), **note}


def _lora_config(weights: Mapping[str, LoRAWeights]) -> dict[str, Any]:
    """PEFT's LoraConfig of one part: the commonest rank and alpha, and the layers that differ."""
    # Without transformers' prefix that comes and goes: PEFT looks for the end of a name.
    named = {name.removeprefix("text_model."): found for name, found in weights.items()}
    ranks = {name: len(found.down) for name, found in named.items()}
    alphas = {name: int(a) if (a := found.alpha) == int(a) else a for name, found in named.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(named),
    }
