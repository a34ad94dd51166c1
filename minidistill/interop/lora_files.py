"""LoRA files: every common spelling in, kohya's and PEFT's out.

    kohya      lora_unet_down_blocks_..._to_q.lora_down.weight, .lora_up.weight, .alpha; lora_te_, lora_te1_, lora_te2_
    sgm        lora_unet_input_blocks_1_1_... and so on: the same with the block names of Stability AI's own code
    PEFT       unet.down_blocks.0....to_q.lora_A.weight, .lora_B.weight; base_model.model.down_blocks.0....
    diffusers  unet.down_blocks.0....to_q.lora.down.weight; ...attn1.processor.to_q_lora.down.weight
    ComfyUI    diffusion_model.input_blocks.1.1....to_q.lora_down.weight; text_encoders.clip_l.transformer....
    LyCORIS    lycoris_down_blocks_..._to_q.lora_down.weight, the names its own wrapper gives (of these, plain LoCon)

kohya's underscores cannot be undone: "to_out_0" may be to_out.0 or to.out_0. So a file's names are looked up in a table
of all spellings of all layers of the networks at hand, or of any Stable Diffusion and student (`every_name`).
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidistill.errors import InputError
from minidistill.interop.configs import read_config
from minidistill.interop.ldm import Pairs, swap, unet_pairs
from minidistill.models.clip import SDXL_TEXT_2, CLIPTextModel
from minidistill.models.lora import LoRAWeights, candidates, fit, lora_weights, merge_weights
from minidistill.models.unet import SD15, SDXL, UNet
from minidistill.weights.files import read_json, read_metadata, read_tensors, some, write_safetensors
from minidistill.weights.loading import on_meta
from minidistill.weights.typed import MISSHAPEN

Modules = dict[str, dict[str, Tensor]]  # the tensors of a file by module, as it spells them, and by role
Loras = dict[str, dict[str, LoRAWeights]]  # by part of the pipeline ("unet", "text_encoder", ...), by layer

FORMS = ("kohya", "peft")  # that are written
# Before the name of a layer with its dots: of PEFT and diffusers (or nothing), and of ComfyUI.
DOTTED = {
    "unet": ("unet.", "", "diffusion_model."),
    "text_encoder": ("text_encoder.", "", "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
    "text_encoder_2": ("text_encoder_2.", "", "text_encoders.clip_g.transformer."),
}
# Before one with underscores: of kohya's scripts, and of LyCORIS.
FLAT = {
    "unet": ("lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_"),
    "text_encoder_2": ("lora_te2_", "lycoris_"),
}
ROLES = {"down": "down", "A": "down", "up": "up", "B": "up", "alpha": "alpha"}
TENSOR = re.compile(  # the module and the role; PEFT's own state has the adapter's name too: .lora_A.default.weight
    r"(?P<module>.+?)(?:(?:[._]lora\.|\.lora_linear_layer\.|\.lora_)(?P<role>down|up|A|B)(?:\.[^.]+)?\.weight|\.alpha)"
)
# The end of a layer's name -> what it was in diffusers' first LoRA files, the same for U-Net and text encoder.
OLD_ENDS = {".to_out.0": ".to_out", ".q_proj": ".to_q", ".k_proj": ".to_k", ".v_proj": ".to_v", ".out_proj": ".to_out"}

METADATA_KEY = "lora_adapter_metadata"  # diffusers' since mid-2025: the LoraConfig, as json, in the header of the file
# PEFT's patterns are regular expressions. Those with one * or +, and one group, cannot take for ever on any name.
QUICK = re.compile(r"[\w.\\^$|-]*[*+]?[\w.\\^$|-]*(\([\w.\\^$|-]*\))?[\w.\\^$|-]*")
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # init_lora_weights that leave the base
# By the width of a model's text states: its name, and what A1111 looks for in the header before it lists a file.
FAMILIES = {768: ("SD 1.x", "sd_v1"), 1024: ("SD 2.x", "sd_v2"), 2048: ("SDXL", "sdxl_base_v1-0")}


def name_table(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Every spelling of every layer of the networks -> (part, name of the layer)."""
    table: dict[str, tuple[str, str]] = {}
    for part, network in networks.items():
        pairs = unet_pairs(network.config) if part == "unet" else {}
        for name in candidates(network):
            for spelling in _spellings(part, name, pairs):
                table.setdefault(spelling, (part, name))  # a bare name of both text encoders is the first one's
    return table


@functools.cache
def every_name() -> dict[str, tuple[str, str]]:
    """`name_table` of SD 1.x, 2.x, SDXL and their students at once: they number their blocks alike.

    (Not sgm's names of a student: they have other numbers, and need the network.)
    """
    with on_meta():
        encoders = {"text_encoder": CLIPTextModel(SDXL_TEXT_2), "text_encoder_2": CLIPTextModel(SDXL_TEXT_2, True)}
        return name_table({"unet": UNet(SD15)}) | name_table({"unet": UNet(SDXL), **encoders})


def _spellings(part: str, name: str, pairs: Pairs) -> Iterator[str]:
    dotted = [name, name.removeprefix("text_model.")]  # transformers 5.6 dropped that prefix
    for end, old in OLD_ENDS.items():
        dotted += [d.removesuffix(end) + old for d in dotted if d.endswith(end)]
    sgm = swap(name, pairs)
    yield from (prefix + spelling for prefix in DOTTED[part] for spelling in (*dotted, sgm))
    yield from (prefix + spelling.replace(".", "_") for prefix in FLAT[part] for spelling in (name, sgm))


def read_lora(path: str | Path, networks: Mapping[str, nn.Module]) -> Loras:
    """Read a LoRA for these networks: {"unet": UNet, "text_encoder": ..., "text_encoder_2": ...}, as many as there are.

    Every tensor of the file is used or it is refused. An alpha that is nowhere given is the rank, so that the scale
    alpha / r is 1; PEFT keeps it in the file's header or in an adapter_config.json beside the file.

    InputError: the file is broken, is no LoRA, is of a kind that is not supported, or is for another model.
    """
    _, loras = _read(Path(path), name_table(networks), networks)
    for part, layers in loras.items():
        for name, weights in layers.items():
            try:
                layers[name] = fit(weights, networks[part].get_submodule(name))
            except ValueError as error:
                raise InputError(f"{path}: {part}.{name} has another shape in this model: {error}") from error
    return loras


def is_lora(path: str | Path) -> bool:
    """Whether a file of weights is a LoRA, by the names in it. InputError: it is broken."""
    return any(TENSOR.fullmatch(name) for name in read_tensors(path))


def rewrite_lora(
    source: str | Path,
    dest: str | Path,
    form: str,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the LoRA of one file into another in kohya's or PEFT's form, without its model: `write_lora` says which.

    The tensors are the same, bit by bit, in diffusers' block names, and the header's text is kept. An alpha that is
    nowhere given, and means the rank, is written out. dtype, metadata: as in `write_lora`.
    InputError: as in `read_lora`; or a layer that is in no Stable Diffusion and no student of one.
    """
    source = Path(source)
    modules, loras = _read(source, every_name(), {})
    header = read_metadata(source)
    if (
        _text_width(modules) == SDXL.cross_attention_dim
        or any(name.startswith("lora_te1_") for name in modules)
        or header.get("ss_base_model_version", "").startswith("sdxl")
    ):
        loras.setdefault("text_encoder_2", {})  # kohya's name of the first encoder depends on there being a second
    kept = {key: text for key, text in header.items() if key not in (METADATA_KEY, "format")}
    write_lora(dest, loras, form, dtype, {**kept, **(metadata or {})})


def _read(path: Path, table: Mapping[str, tuple[str, str]], networks: Mapping[str, nn.Module]) -> tuple[Modules, Loras]:
    """The modules of a file as it spells them, and by the names in `table`, which is of `networks` or `every_name`."""
    tensors = read_tensors(path)
    try:
        modules = _by_module(tensors)
        _check_family(modules, networks)
        if unknown := [spelling for spelling in modules if spelling not in table]:
            where = "this model" if networks else "any Stable Diffusion or student"
            what = f"{len(modules) - len(unknown)} of {len(modules)} modules matched"
            raise InputError(f"{what}, others do not exist in {where} ({some(unknown, 3)})")
        if torn := [spelling for spelling, roles in modules.items() if not _halves_fit(**roles)]:
            what = f"of {len(torn)} of {len(modules)} modules a half, down or up, is missing or does not fit the other"
            raise InputError(f"{what} ({some(torn, 3)}); download or save it again")
        config = _peft_config(path, any(".lora_A." in name for name in tensors))
        loras: Loras = {}
        for spelling, roles in modules.items():
            part, name = table[spelling]
            if name in loras.setdefault(part, {}):
                raise InputError(f"{part}.{name} is there twice, once as {spelling}")
            alpha = _alpha(roles, spelling.removeprefix(f"{part}."), _settings(config, part))
            loras[part][name] = LoRAWeights(roles["down"], roles["up"], alpha)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return modules, loras


def _by_module(tensors: Mapping[str, Tensor]) -> Modules:
    """The tensors of a file by module and by role. InputError: some are no part of a plain LoRA."""
    modules: Modules = {}
    foreign = []
    for key, tensor in tensors.items():
        match = TENSOR.fullmatch(key)
        if match is None:
            foreign.append(key)
            continue
        roles = modules.setdefault(match["module"].replace("base_model.model.", "").replace(".processor.", "."), {})
        role = ROLES[match["role"] or "alpha"]
        if role in roles:
            raise InputError(f"{key} is there twice, in two spellings or of two adapters")
        roles[role] = tensor
    if not any("down" in roles or "up" in roles for roles in modules.values()):
        raise InputError(f"it is not a LoRA: none of its tensors is a lora_down or lora_A ({some(tensors, 3)})")
    if foreign:
        what = f"{len(foreign)} of {len(tensors)} tensors are no part of a plain LoRA"
        raise InputError(f"{what} ({some(foreign, 3)}), and no other kind of adapter is supported")
    return modules


def _halves_fit(down: Tensor | None = None, up: Tensor | None = None, alpha: Tensor | None = None) -> bool:
    """Whether down (r, in, ...) and up (out, r, ...) are there, are matrices and agree on the rank."""
    if down is None or up is None or not (down.is_floating_point() and up.is_floating_point()):
        return False
    return min(down.dim(), up.dim()) > 1 and len(down) == up.shape[1] > 0


def _check_family(modules: Modules, networks: Mapping[str, nn.Module]) -> None:
    """InputError: the text states that a LoRA's cross-attention takes have another width than the model's."""
    theirs, ours = _text_width(modules), networks["unet"].config.cross_attention_dim if "unet" in networks else None
    if ours and theirs and ours != theirs:
        names = [FAMILIES[width][0] if width in FAMILIES else f"of text width {width}" for width in (theirs, ours)]
        raise InputError(f"it is a LoRA for another model: the LoRA is {names[0]}, the model {names[1]}")


def _text_width(modules: Modules) -> int | None:
    """The width of the text states that a LoRA's cross-attention takes; None if it has none."""
    ends = ("attn2.to_k", "attn2.to_v", "attn2_to_k", "attn2_to_v")
    downs = [roles["down"] for name, roles in modules.items() if name.endswith(ends) and "down" in roles]
    return next((down.shape[1] for down in downs if down.dim() > 1), None)


def _peft_config(path: Path, is_peft: bool) -> dict[str, Any]:
    """PEFT's LoraConfig: from the file's header, else from adapter_config.json beside it; {} if there is none."""
    header, beside = read_metadata(path), path.with_name("adapter_config.json")
    if METADATA_KEY not in header and is_peft and beside.is_file():
        return read_json(beside)
    return read_config(header, METADATA_KEY, lambda config: {**config}) or {}


def _settings(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a LoraConfig says of one part: all of it, or, where it is for several, what is under the part's name."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    return {key: value for key, value in config.items() if "." not in key} | own


def _alpha(roles: Mapping[str, Tensor], module: str, settings: Mapping[str, Any]) -> float:
    """The file's own, else PEFT's, else the rank; of rank-stabilised LoRA (alpha / sqrt(r)) that of equal scale."""
    rank = len(roles["down"])
    kind, init = settings.get("peft_type") or "LORA", settings.get("init_lora_weights")
    if kind != "LORA" or init not in KEEPS_BASE:
        raise InputError(f"it is a {kind} started by {init}, which is not supported; plain LoRA is")
    try:
        if "alpha" in roles:
            alpha = float(roles["alpha"].item())
        else:
            patterns = (settings.get("alpha_pattern") or {}).items()
            if slow := next((pattern for pattern, _ in patterns if not QUICK.fullmatch(pattern)), None):
                raise ValueError(f"alpha_pattern {slow!r} is no name of a layer, nor a plain pattern of one")
            own = [value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
            alpha = float([*own, settings.get("lora_alpha", rank)][0])
            alpha *= math.sqrt(rank) if settings.get("use_rslora") else 1
    except (RuntimeError, re.error, *MISSHAPEN) as error:
        raise InputError(f"the alpha of {module} cannot be read ({error})") from error
    if not math.isfinite(alpha):
        raise InputError(f"the alpha of {module} is {alpha}")
    return alpha


def merge_into(networks: Mapping[str, nn.Module], loras: Loras, scale: float = 1.0) -> dict[str, int]:
    """Add a LoRA to the weights, in place. Returns the number of layers by part."""
    return {part: merge_weights(networks[part], weights, scale) for part, weights in loras.items()}


def matched_line(counts: Mapping[str, int]) -> str:
    """ "788/788 modules matched", of what `merge_into` returned: a file of which one is not matched is refused."""
    total, parts = sum(counts.values()), ", ".join(f"{part} {count}" for part, count in counts.items())
    return f"{total}/{total} modules matched" + (f" ({parts})" if len(counts) > 1 else "")


def write_lora(
    path: str | Path,
    loras: Mapping[str, nn.Module | Mapping[str, LoRAWeights]],
    form: str = "kohya",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA, atomically; a network stands for its live LoRA, without the scale that is set there.

    loras: by part of the pipeline. Name all its text encoders, if only with {}: kohya's names depend on that.
    form: "kohya" is read by diffusers, ComfyUI and A1111 alike. "peft" is diffusers' own; its alpha is in the header,
    where other programs and diffusers before mid-2025 do not look: they take alpha = rank.
    dtype: of the tensors in the file, but for kohya's alpha (float32); as they are if not given.
    metadata: text for the header, beside what the form needs, and before it where both say something.
    InputError: there is no LoRA to write, or the file cannot be written.
    """
    found = {part: lora_weights(lora) if isinstance(lora, nn.Module) else lora for part, lora in loras.items()}
    if not any(found.values()):
        raise InputError(f"there is no LoRA to write to {path}: no layer has one")
    tensors, header = {"kohya": _to_kohya, "peft": _to_peft}[form](found)
    cast = {n: t if dtype is None or n.endswith(".alpha") else t.to(dtype) for n, t in tensors.items()}
    write_safetensors(path, cast, {**header, **(metadata or {})})


def _to_kohya(loras: Mapping[str, Mapping[str, LoRAWeights]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    for part, weights in loras.items():
        # SD's one text encoder is te, SDXL's two are te1 and te2
        prefix = FLAT[part][1 if part == "text_encoder" and "text_encoder_2" in loras else 0]
        for name, (down, up, alpha) in weights.items():
            key = prefix + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    width = _text_width({name: {"down": found.down} for name, found in loras.get("unet", {}).items()})
    _, version = FAMILIES.get(width, (None, None))
    header = {"ss_network_module": "networks.lora"}
    every = [found for weights in loras.values() for found in weights.values()]
    values = {"dim": {str(len(found.down)) for found in every}, "alpha": {f"{found.alpha:g}" for found in every}}
    header |= {f"ss_network_{key}": min(given) if len(given) == 1 else "Dynamic" for key, given in values.items()}
    if version:
        header |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    return tensors, header


def _to_peft(loras: Mapping[str, Mapping[str, LoRAWeights]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """PEFT's LoraConfig has, for each part, the commonest rank and alpha, and the layers that differ."""
    tensors, config = {}, {}
    for part, weights in loras.items():
        for name, (down, up, _) in weights.items():
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
        # Without transformers' prefix that comes and goes: PEFT looks for the end of a name.
        named = {name.removeprefix("text_model."): found for name, found in weights.items()}
        own = {"r": {name: len(found.down) for name, found in named.items()}}
        own["lora_alpha"] = {name: int(a) if (a := found.alpha) == int(a) else a for name, found in named.items()}
        for key, values in own.items() if named else ():
            common = Counter(values.values()).most_common(1)[0][0]
            pattern = "rank_pattern" if key == "r" else "alpha_pattern"
            config[f"{part}.{key}"] = common
            config[f"{part}.{pattern}"] = {name: value for name, value in values.items() if value != common}
            config[f"{part}.target_modules"] = list(named)
    return tensors, {METADATA_KEY: json.dumps(config)}
