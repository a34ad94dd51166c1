"""What all phases of SDXL-Lightning share, and the students between them: in memory, and in the run folder.

A student is a model folder OUT/N-step, or a LoRA for the teacher in that folder if nothing else is trained.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from minidistill.diffusion.sampling import Sampling, sampling_metadata
from minidistill.distill.block_removal import Removal, build_student
from minidistill.distill.lightning import Stage, only_lora
from minidistill.errors import InputError
from minidistill.interop.lora_files import read_lora, write_lora
from minidistill.interop.model_card import public_name
from minidistill.models import lora
from minidistill.models.lora import LoRAWeights
from minidistill.models.unet import UNet
from minidistill.pipeline import Pipeline, TextStates
from minidistill.training import parallel
from minidistill.training.batches import Batches
from minidistill.training.device import PRECISIONS
from minidistill.training.run_folder import RunFolder
from minidistill.weights.folders import find_model, load_unet, read_sampling

LORA_FILE = "lora.safetensors"


class Settings(Protocol):
    """What stages and phases read of a command's settings."""

    teacher: str
    seed: int
    guidance: float
    pure_noise: bool
    zero_snr: bool
    precision: str
    dtype: str | None
    accumulate: int
    lora_rank: int
    lora_alpha: float
    gradient_checkpointing: bool
    parallel: str


@dataclass(frozen=True)
class Ladder:
    """What all phases share."""

    config: Settings
    settings: dict[str, Any]  # config.json: the config, the phases, and fingerprints of the model and of the data
    stages: tuple[Stage, ...]
    folder: RunFolder
    pipe: Pipeline  # the first teacher; its U-Net is frozen, in the run's precision
    exact: UNet  # that U-Net as it was loaded, perhaps on the CPU: what trains whole is copied from it
    removal: Removal | None  # of blocks of the teacher, where the students have fewer
    batches: Batches
    absent: TextStates  # of no prompt, (1, L, D)
    alpha_bar: Tensor  # of the students
    own_alpha_bar: Tensor  # of the first teacher: another one with --zero-snr
    autocast: AbstractContextManager
    scaler: torch.amp.GradScaler  # idle: fp16 is not offered

    def prediction(self, stage: Stage) -> str:
        """What the student of a stage predicts."""
        usual = "v_prediction" if self.config.zero_snr else self.pipe.schedule.prediction_type
        return "sample" if stage.predicts_x0 else usual


def first_student(ladder: Ladder) -> UNet:
    """The student before the first phase: a copy of the teacher, or of what is left of it when blocks are removed."""
    if ladder.removal:
        return build_student(ladder.removal, parallel.whole(ladder.exact), ladder.pipe.device)
    if only_lora(ladder.stages):
        return copy_unet(ladder.pipe.unet, shared=True)
    return copy_unet(parallel.whole(ladder.exact)).to(ladder.pipe.device)


def load_student(ladder: Ladder, index: int) -> UNet:
    """The student of an earlier stage, frozen, from the run folder. InputError: it is not there any more."""
    folder = ladder.folder.path / ladder.stages[index].name
    if only_lora(ladder.stages):
        unet = copy_unet(ladder.pipe.unet, shared=True)
        lora.remove_lora(unet)  # the teacher's
        lora.attach_lora(unet, read_lora(folder / LORA_FILE, ladder.pipe.networks)["unet"], dtype=torch.float32)
    else:
        unet = load_unet(folder, PRECISIONS[ladder.config.precision], ladder.pipe.device)
    return unet.eval().requires_grad_(False)


def student_pipeline(ladder: Ladder, stage: Stage, unet: UNet) -> Pipeline:
    """A pipeline that samples the student of a stage as it is trained to be."""
    student = copy.copy(ladder.pipe)
    student.unet = unet
    if ladder.config.zero_snr:
        student.schedule = replace(student.schedule, rescale_betas_zero_snr=True)
    student.set_sampling(Sampling(stage.student, prediction=ladder.prediction(stage)))
    return student


def save_student(ladder: Ladder, stage: Stage, unet: UNet) -> None:
    """Write OUT/N-step: a model folder, or a LoRA for the teacher if that is all that was trained."""
    student, folder = student_pipeline(ladder, stage, unet), ladder.folder.path / stage.name
    dtype = PRECISIONS.get(ladder.config.dtype)
    if only_lora(ladder.stages):
        about = sampling_metadata(student.sampling) | {"ss_sd_model_name": public_name(ladder.config.teacher)}
        write_lora(folder / LORA_FILE, {**student.networks, "unet": unet}, dtype=dtype, metadata=about)
        return
    if lora.lora_layers(unet):
        student.unet = copy_unet(unet)
        lora.merge_lora(student.unet)
    student.save(folder, dtype)


def copy_unet(unet: UNet, shared: bool = False) -> UNet:
    """A copy of a U-Net. shared: only of its modules and its LoRA; the other weights are the same, and stay frozen."""
    own = {id(weight) for layer in lora.lora_layers(unet).values() for weight in (layer.lora_down, layer.lora_up)}
    kept = {id(weight): weight for weight in unet.parameters() if id(weight) not in own}
    return copy.deepcopy(unet, kept if shared else None)


def attach_student(pipe: Pipeline, source: str) -> LoRAWeights:
    """Attach the LoRA of a distilled student to the teacher it is for -> one of its layers.

    InputError: it cannot be read, is for another model, or does not say for how many steps it was distilled.
    """
    path = find_model(source)
    loras, sampling = read_lora(path, pipe.networks), read_sampling(path)
    if sampling is None:
        raise InputError(f"{source} does not say for how many steps it was distilled, in its header or its name")
    if set(loras) != {"unet"}:
        raise InputError(f"{source} is a LoRA of the text encoder too, and only those of the U-Net are trained on")
    lora.attach_lora(pipe.unet, loras["unet"], dtype=torch.float32)
    pipe.set_sampling(sampling)
    return next(iter(loras["unet"].values()))
