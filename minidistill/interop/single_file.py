"""Single-file checkpoints: a whole Stable Diffusion, or a part of it, in one .safetensors or .ckpt.

    model.diffusion_model.*     the U-Net            model_ema.*      its running average, in full checkpoints
    first_stage_model.*         the VAE              betas, ...       constants of the training code
    cond_stage_model.*          the text encoder of SD 1.x (transformers' names) or SD 2.x (open_clip's)
    conditioner.embedders.0/1.* the two text encoders of SDXL (the first in transformers' names)

The layout has no room for configs: `configs` keeps them in the header, or infers them from the shapes of tensors.
Tensors are handed on as they lie in the mapped file: nothing is copied before a model takes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidistill.diffusion.sampling import sampling_metadata
from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.errors import InputError
from minidistill.interop import configs, ldm
from minidistill.models.clip import SD1_TEXT, SD2_TEXT, SDXL_TEXT_2, CLIPTextConfig
from minidistill.models.taesd import TinyConfig
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import SD15, UNetConfig
from minidistill.models.vae import SD_VAE, SDXL_VAE, AutoencoderKL, VAEConfig
from minidistill.weights.files import read_metadata, read_tensors, some, write_safetensors
from minidistill.weights.loading import without_wrappers
from minidistill.weights.typed import read_as

if TYPE_CHECKING:
    from minidistill.pipeline import Pipeline

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
TRAINING = ("loss.", "model_ema.")  # the discriminator and the running average of a VAE's own training
MARKS = {"v_pred", "ztsnr"}  # empty tensors by which SDXL fine-tunes say how they were trained
UNUSED_TEXT = {"logit_scale", "attn_mask"}  # CLIP's temperature and causal mask
# Of a whole CLIP, what is not read of the first encoder: SD 2.x takes the last states but one.
UNREAD = ("text_projection.", "text_model.encoder.layers.23.")
TEXT_ENCODERS = {config.hidden_size: config for config in (SD1_TEXT, SD2_TEXT, SDXL_TEXT_2)}
# Other kinds of files, by what is in their names.
KINDS = {
    r"[._]lora[._](down|up|A|B)\.|^lora_(unet|te)": "a LoRA: use it as --lora, or convert with --layout kohya or peft",
    r"^(model\.diffusion_model\.|input_blocks\.0\.0\.weight|down_blocks\.0\.resnets\.0\.)": None,  # is read
    r"(coder\.conv_in|decoder\.layers\.0)\.weight$": "a VAE alone: use it as --vae",
    r"token_embedding\.weight$": "a text encoder alone: a whole checkpoint, or a U-Net, is needed",
}
# The only student of SD 1.x that stable-diffusion.cpp knows, and that by the block numbers of its teacher.
CPP = "stable-diffusion.cpp"
BK_TINY = {"block_out_channels": (320, 640, 1280), "layers_per_block": (1, 1, 1), "mid_block_type": None}
BK_TINY |= {"cross_attention_dim": 768, "in_channels": 4}
NOT_FOR_CPP = (
    "stable-diffusion.cpp wants a layout of its own for bk-tiny of SD 1.x alone; SD 1.x, SD 2.x, SDXL, ssd-1b and "
    "segmind-vega it opens as --layout single-file, other students not at all"
)


@dataclass(frozen=True)
class SingleFile:
    """What a file holds: configs, and tensors in our models' names, still in the mapped file.

    vae is None and text_encoders empty where the file has none (a U-Net alone); of such a file schedule is None unless
    it says, or shows, what it predicts. tokenizers is empty where they are CLIP's own, which are in no single file.
    """

    family: str  # "sd1", "sd2" or "sdxl"
    unet: tuple[UNetConfig, Tensors]
    vae: tuple[VAEConfig, Tensors] | None
    text_encoders: tuple[tuple[CLIPTextConfig, Tensors], ...]
    schedule: ScheduleConfig | None
    tokenizers: tuple[CLIPTokenizer, ...]


def read_file(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file, without torch's wrappers in their names, and the text in its header."""
    return {without_wrappers(name): tensor for name, tensor in read_tensors(path).items()}, read_metadata(path)


def read_single_file(path: str | Path, ema: bool = False) -> SingleFile:
    """Read a checkpoint of SD 1.x, SD 2.x, SDXL or a student of theirs, or a U-Net alone.

    Names may be LDM's or, for a U-Net alone, diffusers'. What the file does not say is inferred (`interop.configs`).
    A tensor of a known part that no rule explains is left for the strict loader to report.

    ema: take the running average of the U-Net's weights, which full checkpoints have beside the last ones.
    InputError: another kind of file, tensors of no known part, no average where one is asked for.
    """
    tensors, metadata = read_file(path)
    try:
        return _sort_out(tensors, metadata, ema)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _sort_out(tensors: Tensors, metadata: dict[str, str], ema: bool) -> SingleFile:
    kind = f"something else ({len(tensors)} tensors: {some(tensors, 3)})"
    kind = next((k for pattern, k in KINDS.items() if any(re.search(pattern, name) for name in tensors)), kind)
    if kind is not None:
        raise InputError(f"not a Stable Diffusion checkpoint: it seems to be {kind}")
    if not any(name.startswith("model.diffusion_model.") for name in tensors):  # a U-Net alone
        tensors = {n if n in MARKS else f"model.diffusion_model.{n}": tensor for n, tensor in tensors.items()}
    parts = _split(tensors)
    weights = _averaged(parts) if ema else parts["unet"]
    if "input_blocks.0.0.weight" in weights:
        weights = ldm.from_ldm_unet(weights)
    stored = configs.read_config(metadata, configs.UNET, partial(read_as, UNetConfig))
    unet = stored or configs.infer_unet_config(weights)
    encoders = _read_text_encoders(parts, metadata)
    family = _family(unet, encoders[0][0] if encoders else None)
    if len(encoders) not in (0, len(TEXT_PREFIXES[family])):
        raise InputError(f"it holds {len(encoders)} text encoders, {family} has {len(TEXT_PREFIXES[family])}")
    schedule = configs.read_config(metadata, configs.SCHEDULE, partial(read_as, ScheduleConfig))
    if schedule is None and (encoders or family == "sd2" or configs.PREDICTION in metadata or "v_pred" in tensors):
        # All families share one schedule; they differ in what the network predicts.
        prediction = configs.infer_prediction(unet, weights, tensors, metadata)
        schedule = ScheduleConfig(prediction_type=prediction, rescale_betas_zero_snr="ztsnr" in tensors)
        if family == "sd2" and configs.UNET not in metadata:  # the 768- and the 512-pixel models
            unet = replace(unet, sample_size=96 if prediction == "v_prediction" else 64)
    return SingleFile(
        family=family,
        unet=(unet, weights),
        vae=read_vae(parts["vae"], metadata, SDXL_VAE if family == "sdxl" else SD_VAE) if "vae" in parts else None,
        text_encoders=encoders,
        schedule=schedule,
        tokenizers=configs.read_config(metadata, configs.TOKENIZERS, configs.load_tokenizers) or (),
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
        raise InputError(f"{len(unknown)} of {len(tensors)} tensors belong to no known part ({some(unknown, 3)})")
    return parts


def _averaged(parts: dict[str, Tensors]) -> Tensors:
    """The U-Net from `model_ema.*`, where names have lost their dots: model_ema.diffusion_modelout2bias."""
    average = parts.get("ema", {})
    flat = {name: f"diffusion_model.{name}".replace(".", "") for name in parts["unet"]}
    if missing := [name for name in flat if flat[name] not in average]:
        raise InputError(f"it has no EMA weights of {len(missing)} tensors ({some(missing, 3)}): read it without ema")
    return {name: average[spelling] for name, spelling in flat.items()}


def _read_text_encoders(
    parts: dict[str, Tensors], metadata: dict[str, str]
) -> tuple[tuple[CLIPTextConfig, Tensors], ...]:
    saved = configs.read_config(metadata, configs.TEXT, lambda saved: [read_as(CLIPTextConfig, one) for one in saved])
    encoders = []
    for part in (part for part in ("clip 0", "open_clip 0", "open_clip 1") if part in parts):
        tensors = {name: tensor for name, tensor in parts[part].items() if name not in UNUSED_TEXT}
        if part.startswith("open_clip"):
            tensors = ldm.from_open_clip(tensors)
        if saved:
            config = saved[min(len(encoders), len(saved) - 1)]
        else:
            if part.endswith("0"):
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNREAD)}
            widths = [t.shape[-1] for name, t in tensors.items() if name.endswith("token_embedding.weight")]
            config = TEXT_ENCODERS.get(*widths or [None])
            if config is None:
                what = f"its text encoder ({part}) is {widths} wide, not 768, 1024 or 1280"
                raise InputError(f"{what}, and it carries no config: use the model's folder")
        encoders.append((config, tensors))
    return tuple(encoders)


def _family(unet: UNetConfig, text: CLIPTextConfig | None) -> str:
    if unet.addition_embed_type is not None:
        return "sdxl"
    is_sd2 = text.hidden_act == "gelu" if text else unet.cross_attention_dim == 1024
    return "sd2" if is_sd2 else "sd1"


def read_vae_file(path: str | Path, base: VAEConfig = SD_VAE) -> tuple[VAEConfig | TinyConfig, Tensors]:
    """Read a VAE alone, in diffusers' or LDM's names, that of a whole checkpoint, or a TAESD in diffusers' names.

    base: the config of a full VAE whose header has none. All Stable Diffusions share one architecture and differ
    in the scaling_factor, which no file says, so this should be the config of the VAE that is replaced.
    Returns (config, tensors in our names), for AutoencoderKL or, with a TinyConfig, AutoencoderTiny.
    InputError: there is no VAE in the file.
    """
    tensors, metadata = read_file(path)
    try:
        for prefix in ("first_stage_model.", "vae."):  # of a whole checkpoint, its VAE
            inside = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
            tensors = inside or tensors
        if "decoder.layers.0.weight" in tensors:
            width = configs.shape_of(tensors, "encoder.layers.0.weight", 4)[0]
            latents = configs.shape_of(tensors, "decoder.layers.0.weight", 4)[1]
            return TinyConfig(width=width, latent_channels=latents), tensors
        if not any(name.endswith("coder.conv_in.weight") for name in tensors):
            raise InputError(f"not a VAE: it holds {len(tensors)} tensors, {some(tensors, 3)}")
        return read_vae(tensors, metadata, base)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_vae(tensors: Tensors, metadata: Mapping[str, str], base: VAEConfig) -> tuple[VAEConfig, Tensors]:
    """A VAE's config, from the header or else `base`, and its tensors in our names, from diffusers' or LDM's.

    The attention may still have its old names, or convolutions for matrices: `load_into` knows both.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(TRAINING)}
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in tensors):
        tensors = ldm.from_ldm_vae(tensors)
    return configs.read_config(metadata, configs.VAE, partial(read_as, VAEConfig)) or base, tensors


def write_single_file(path: str | Path, pipe: Pipeline, for_cpp: bool = False) -> None:
    """Write a pipeline as one .safetensors file in LDM's layout (sgm's for SDXL), atomically.

    diffusers' `from_single_file` does not read the configs in the header: of a student it needs `config=FOLDER`, a
    pipeline folder of that student. One whose stages differ in their number of layers it opens as a folder only.

    for_cpp: for stable-diffusion.cpp, which wants BK-Tiny's blocks in the numbers of its teacher; others want no gaps.
    InputError: parts this layout has no place for, a name that does not end in .safetensors, a full disk.
    """
    config, encoders = pipe.unet.config, pipe.text_encoders
    family = _family(config, encoders[0].config)
    for fits, problem in (
        (Path(path).suffix == ".safetensors", "a single file is written as .safetensors only"),
        (isinstance(pipe.vae, AutoencoderKL), "a tiny VAE (TAESD) has no place in a single file: use the full one"),
        (not for_cpp or BK_TINY.items() <= vars(config).items(), NOT_FOR_CPP),
    ):
        if not fits:
            raise InputError(f"cannot write {path}: {problem}")
    parts = {
        "model.diffusion_model.": ldm.to_ldm_unet(pipe.unet.state_dict(), SD15 if for_cpp else config),
        "first_stage_model.": ldm.to_ldm_vae(pipe.vae.state_dict()),
    }
    for prefix, encoder in zip(TEXT_PREFIXES[family], encoders, strict=True):
        text = encoder.state_dict()
        parts[prefix] = ldm.to_open_clip(text) if prefix.endswith("model.") else text
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    tensors |= marks(config, pipe.schedule)
    content = {
        configs.UNET: config.to_dict(),
        configs.VAE: pipe.vae.config.to_dict(),
        configs.TEXT: [encoder.config.to_dict() for encoder in encoders],
        configs.SCHEDULE: pipe.schedule.to_dict(),
        **configs.tokenizer_entry(pipe.tokenizers),
    }
    header = {key: json.dumps(value, ensure_ascii=False) for key, value in content.items()}
    header |= sampling_metadata(pipe.sampling) | configs.prediction_entry(pipe.schedule)
    write_safetensors(path, tensors, header)


def marks(unet: UNetConfig, schedule: ScheduleConfig) -> Tensors:
    """The empty tensors by which other programs (ComfyUI) know an SDXL that predicts v; {} for all other models."""
    if _family(unet, None) != "sdxl" or schedule.prediction_type != "v_prediction":
        return {}
    return {name: torch.empty(0) for name in ("v_pred", *(["ztsnr"] if schedule.rescale_betas_zero_snr else []))}
