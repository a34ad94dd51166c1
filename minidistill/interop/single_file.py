"""Single-file checkpoints: a whole Stable Diffusion, or a part of it, in one .safetensors or .ckpt.

    model.diffusion_model.*     the U-Net            model_ema.*      its running average, in full checkpoints
    first_stage_model.*         the VAE              betas, ...       constants of the training code
    cond_stage_model.*          the text encoder of SD 1.x (transformers' names) or SD 2.x (open_clip's)
    conditioner.embedders.0/1.* the two text encoders of SDXL (the first in transformers' names)

The layout has no room for configs: other programs know the architectures by heart. The files written here carry
them as json in the header (`minidistill.*`), so that any architecture comes back; for files of others they are told
from the shapes. Tensors are handed on as they lie in the mapped file: nothing is copied before a model takes it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.interop import ldm
from minidistill.interop.header import (
    HEADER_KEYS,
    PREDICTION,
    SCHEDULE,
    TEXT,
    TOKENIZERS,
    UNET,
    load_tokenizers,
    read_config,
    write_configs,
)
from minidistill.interop.infer import infer_prediction, infer_text_config, infer_unet_config
from minidistill.interop.vae_file import read_file, read_vae
from minidistill.models.clip import CLIPTextConfig, CLIPTextModel
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import SD15, UNet, UNetConfig
from minidistill.models.vae import SD_VAE, SDXL_VAE, AutoencoderKL, VAEConfig
from minidistill.weights.files import write_safetensors
from minidistill.weights.layouts import without_wrappers

Tensors = dict[str, Tensor]

# prefix in the file -> the part it belongs to
PREFIXES = {
    "model.diffusion_model.": "unet",
    "model_ema.": "ema",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "clip 0",
    "cond_stage_model.model.": "open_clip 0",
    "conditioner.embedders.0.transformer.": "clip 0",
    "conditioner.embedders.0.model.": "open_clip 0",  # SD 2.x as sgm saves it: SD-Turbo
    "conditioner.embedders.1.model.": "open_clip 1",
}
TEXT_PREFIXES = {  # family -> where its text encoders are written
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
# Constants and counters of the training code, which follow from the schedule or mean nothing at rest.
UNUSED = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("logvar", "lvlb_weights", "scale_factor", "denoiser.sigmas", "cond_stage_model.logit_scale"),
}
MARKS = {"v_pred", "ztsnr"}  # empty tensors by which SDXL fine-tunes say how they were trained
UNUSED_TEXT = {"logit_scale", "attn_mask"}  # CLIP's temperature and causal mask
# What a file is, by what is in its names: the first that fits counts, and None is what can be read here.
KINDS = {
    r"[._]lora[._](down|up|A|B)\.|^lora_(unet|te)": "a LoRA: use it as --lora, or convert with --layout kohya or peft",
    r"\.(hada|lokr)_\w": "a LoHa or LoKr adapter, which is not supported",
    r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.": "a Flux model, which is not supported",
    r"(^|\.)joint_blocks\.": "a Stable Diffusion 3 model, which is not supported",
    r"^control_model\.|^controlnet_|(^|\.)zero_convs\.": "a ControlNet, which is not supported",
    r"(^|\.)motion_modules\.": "a video model (AnimateDiff), which is not supported",
    r"^edm_": "a model trained with an EDM noise schedule (Playground 2.5), which is not supported",
    r"^(model\.diffusion_model\.|input_blocks\.0\.0\.weight|down_blocks\.0\.resnets\.0\.)": None,
    r"(coder\.conv_in|decoder\.layers\.0)\.weight$": "a VAE alone: use it as --vae",
    r"token_embedding\.weight$": "a text encoder alone: a whole checkpoint, or a U-Net, is needed",
}
# The only student of SD 1.x that stable-diffusion.cpp knows, and that by the block numbers of its teacher.
CPP = "stable-diffusion.cpp"
BK_TINY = replace(
    SD15,
    block_out_channels=(320, 640, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    mid_block_type=None,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    **{name: getattr(SD15, name)[:3] for name in ("attention_head_dim", "transformer_layers_per_block")},
    layers_per_block=1,
)
NOT_FOR_CPP = (
    "stable-diffusion.cpp wants a layout of its own for bk-tiny of SD 1.x alone; SD 1.x, SD 2.x, SDXL, ssd-1b and "
    "segmind-vega it opens as --layout single-file, other students not at all"
)


@dataclass(frozen=True)
class SingleFile:
    """What a file holds: configs, and tensors in our models' names, still in the mapped file.

    vae is None and text_encoders is empty where the file has none (a U-Net alone); of such a file schedule is None
    unless it says, or shows, what it predicts. A text encoder has a projection if `text_projection.weight` is among its
    tensors. tokenizers is empty where the vocabulary is CLIP's own, which is in no single file. metadata: the header's
    text, without what was read into the configs.
    """

    family: str  # "sd1", "sd2" or "sdxl"
    unet: tuple[UNetConfig, Tensors]
    vae: tuple[VAEConfig, Tensors] | None
    text_encoders: tuple[tuple[CLIPTextConfig, Tensors], ...]
    schedule: ScheduleConfig | None
    tokenizers: tuple[CLIPTokenizer, ...]
    metadata: dict[str, str]


# reading


def read_single_file(path: str | Path, ema: bool = False) -> SingleFile:
    """Read a checkpoint of SD 1.x, SD 2.x, SDXL or a student of theirs, or a U-Net alone.

    Names may be LDM's or, for a U-Net alone, diffusers'. What the file does not say is inferred (`interop.infer`).
    A tensor of a known part that no rule explains is left for the strict loader to report.

    Args:
        ema: take the running average of the U-Net's weights, which full checkpoints have beside the last ones.

    Raises:
        InputError: another kind of file, tensors of no known part, no average where one is asked for.
    """
    tensors, metadata = read_file(path)
    try:
        return _sort_out(tensors, metadata, ema)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _sort_out(tensors: Tensors, metadata: dict[str, str], ema: bool) -> SingleFile:
    kind = f"something else ({len(tensors)} tensors: {ldm.first_few(list(tensors))})"
    kind = next((k for pattern, k in KINDS.items() if any(re.search(pattern, name) for name in tensors)), kind)
    if kind is not None:
        raise InputError(f"not a Stable Diffusion checkpoint: it seems to be {kind}")
    if not any(name.startswith("model.diffusion_model.") for name in tensors):  # a U-Net alone
        tensors = {n if n in MARKS else f"model.diffusion_model.{n}": tensor for n, tensor in tensors.items()}
    parts = _split(tensors)
    weights = _averaged(parts) if ema else parts["unet"]
    if "input_blocks.0.0.weight" in weights:
        weights = ldm.from_ldm_unet(weights)
    unet = read_config(metadata, UNET, UNetConfig.from_dict) or infer_unet_config(weights)
    encoders = _read_text_encoders(parts, metadata)
    family = _family(unet, encoders[0][0] if encoders else None)
    if len(encoders) not in (0, len(TEXT_PREFIXES[family])):
        raise InputError(f"it holds {len(encoders)} text encoders, {family} has {len(TEXT_PREFIXES[family])}")
    schedule = read_config(metadata, SCHEDULE, ScheduleConfig.from_dict)
    if schedule is None and (encoders or family == "sd2" or PREDICTION in metadata or "v_pred" in tensors):
        # All families share one schedule; they differ in what the network predicts.
        prediction = infer_prediction(unet, weights, tensors, metadata)
        schedule = ScheduleConfig(prediction_type=prediction, rescale_betas_zero_snr="ztsnr" in tensors)
        if family == "sd2" and UNET not in metadata:  # the 768- and the 512-pixel models
            unet = replace(unet, sample_size=96 if prediction == "v_prediction" else 64)
    return SingleFile(
        family=family,
        unet=(unet, weights),
        vae=read_vae(parts["vae"], metadata, SDXL_VAE if family == "sdxl" else SD_VAE) if "vae" in parts else None,
        text_encoders=encoders,
        schedule=schedule,
        tokenizers=read_config(metadata, TOKENIZERS, load_tokenizers) or (),
        metadata={key: text for key, text in metadata.items() if key not in HEADER_KEYS},
    )


def _split(tensors: Tensors) -> dict[str, Tensors]:
    """{part: its tensors, without their prefix}. InputError: a tensor that belongs to no known part."""
    parts: dict[str, Tensors] = {}
    unknown = []
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix:
            part = parts.setdefault(PREFIXES[prefix], {})
            if name.removeprefix(prefix) in part:
                raise InputError(f"{name} is there twice, in two spellings")
            part[name.removeprefix(prefix)] = tensor
        elif name not in UNUSED | MARKS:
            unknown.append(name)
    if unknown:
        raise InputError(f"{len(unknown)} of {len(tensors)} tensors belong to no known part ({ldm.first_few(unknown)})")
    return parts


def _averaged(parts: dict[str, Tensors]) -> Tensors:
    """The U-Net from `model_ema.*`, where names have lost their dots: model_ema.diffusion_modelout2bias."""
    average = parts.get("ema", {})
    flat = {name: f"diffusion_model.{name}".replace(".", "") for name in parts["unet"]}
    missing = [name for name in flat if flat[name] not in average]
    if missing:
        which = "no EMA weights" if len(average) < 3 else f"no EMA weight of {missing[0]}"
        raise InputError(f"there is {which} in it: read it without ema")
    return {name: average[spelling] for name, spelling in flat.items()}


def _read_text_encoders(
    parts: dict[str, Tensors], metadata: dict[str, str]
) -> tuple[tuple[CLIPTextConfig, Tensors], ...]:
    saved = read_config(metadata, TEXT, lambda configs: [CLIPTextConfig.from_dict(c) for c in configs])
    found = [(index, kind) for index in range(2) for kind in ("clip", "open_clip") if f"{kind} {index}" in parts]
    if [index for index, _ in found] != list(range(len(found))):
        raise InputError("its text encoders are not those of one Stable Diffusion: one too many, or the first lacks")
    encoders = []
    for index, kind in found:
        part = parts[f"{kind} {index}"].items()
        tensors = {n: t for n, t in part if n not in UNUSED_TEXT and not n.endswith("position_ids")}
        if kind == "open_clip":
            tensors = ldm.from_open_clip(tensors)
        ours = ("text_model.", "text_projection.")  # transformers leaves out text_model. since 5.6
        tensors = {n if n.startswith(ours) else f"text_model.{n}": tensor for n, tensor in tensors.items()}
        if saved:
            config = saved[min(index, len(saved) - 1)]
        else:
            if index == 0:  # a whole CLIP has what the first encoder does not use: SD 2.x reads the last states but one
                unread = ("text_projection.", "text_model.encoder.layers.23.")
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unread)}
            config = infer_text_config(tensors, "gelu" if kind == "open_clip" else "quick_gelu")
        encoders.append((config, tensors))
    return tuple(encoders)


def _family(unet: UNetConfig, text: CLIPTextConfig | None) -> str:
    if unet.addition_embed_type is not None:
        return "sdxl"
    is_sd2 = text.hidden_act == "gelu" if text else unet.cross_attention_dim == 1024
    return "sd2" if is_sd2 else "sd1"


# writing


def write_single_file(
    path: str | Path,
    unet: UNet,
    vae: AutoencoderKL,
    text_encoders: Sequence[CLIPTextModel],
    schedule: ScheduleConfig,
    tokenizers: Sequence[CLIPTokenizer] = (),
    metadata: Mapping[str, str] | None = None,
    for_cpp: bool = False,
) -> None:
    """Write a pipeline as one .safetensors file in LDM's layout (sgm's for SDXL), atomically.

    diffusers' `from_single_file` does not read the configs in the header: of a student it needs `config=FOLDER`, a
    pipeline folder of that student. One whose stages differ in their number of layers it opens as a folder only.

    Args:
        tokenizers: kept in the file's header, unless their vocabulary is CLIP's own.
        metadata: text to carry along in the header.
        for_cpp: for stable-diffusion.cpp, which wants BK-Tiny's blocks in the numbers of its teacher; ComfyUI and
            diffusers want them without gaps.

    Raises:
        InputError: parts this layout has no place for, a name that does not end in .safetensors, a full disk.
    """
    family = _family(unet.config, text_encoders[0].config if text_encoders else None)
    prefixes = TEXT_PREFIXES[family]
    for fits, problem in (
        (Path(path).suffix == ".safetensors", "a single file is written as .safetensors only"),
        (isinstance(vae, AutoencoderKL), "a tiny VAE (TAESD) has no place in a single file: use the full one"),
        (not for_cpp or replace(unet.config, sample_size=SD15.sample_size) == BK_TINY, NOT_FOR_CPP),
        (len(text_encoders) == len(prefixes), f"{family} has {len(prefixes)} text encoders, not {len(text_encoders)}"),
    ):
        if not fits:
            raise InputError(f"cannot write {path}: {problem}")
    weights, vae_weights, *texts = (
        {without_wrappers(name): tensor for name, tensor in model.state_dict().items()}
        for model in (unet, vae, *text_encoders)
    )
    parts = {
        "model.diffusion_model.": ldm.to_ldm_unet(weights, unet.config, gaps=for_cpp),
        "first_stage_model.": ldm.to_ldm_vae(vae_weights),
    }
    for prefix, text in zip(prefixes, texts, strict=True):
        parts[prefix] = ldm.to_open_clip(text) if prefix.endswith("model.") else text
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    tensors |= marks(unet.config, schedule)
    own = write_configs(unet, vae, text_encoders, schedule, tokenizers)
    write_safetensors(path, tensors, {**(metadata or {}), **own})


def marks(unet: UNetConfig, schedule: ScheduleConfig) -> Tensors:
    """The empty tensors by which other programs (ComfyUI) know an SDXL that predicts v; {} for all other models."""
    if _family(unet, None) != "sdxl" or schedule.prediction_type != "v_prediction":
        return {}
    return {name: torch.empty(0) for name in ("v_pred", *(["ztsnr"] if schedule.rescale_betas_zero_snr else []))}
