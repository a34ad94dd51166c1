"""What all phases of SDXL-Lightning share, and the students between them: in memory, and in the run folder.

A student is a model folder OUT/N-step, or a LoRA for the teacher in that folder if nothing else is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minidistill.diffusion.sampling import Sampling, sampling_metadata
from minidistill.distill.block_removal import Removal, build_student
from minidistill.distill.lightning import Stage, legs, only_lora
from minidistill.errors import InputError
from minidistill.interop.lora_files import is_lora, read_lora, write_lora
from minidistill.interop.model_card import public_name
from minidistill.interop.replace import load_unet, replace_unet
from minidistill.models import lora
from minidistill.models.lora import LoRAWeights
from minidistill.models.unet import UNet
from minidistill.pipeline import Pipeline, TextStates
from minidistill.training import parallel
from minidistill.training.batches import Batches
from minidistill.training.device import PRECISIONS, to_precision
from minidistill.training.run_folder import RunFolder
from minidistill.weights.folders import find_model, read_sampling

LORA_FILE = "lora.safetensors"


class Settings(Protocol):
    """What stages and phases read of a command's settings."""

    teacher: str
    start_from: str | None
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
    start: Stage | None  # that has made the student which the ladder starts from; None: it starts from the teacher
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

    def stage(self, index: int) -> Stage | None:
        """A stage, or `start` for -1."""
        return self.stages[index] if index >= 0 else self.start


def keep_exact(stages: Sequence[Stage], pipe: Pipeline, precision: str) -> UNet:
    """The teacher's U-Net to `precision` -> as it was loaded, on the CPU, if a phase trains a copy of it."""
    exact = pipe.unet
    copied = any(leg.phase.backbone_rate > 0 or leg.phase.matching for leg in legs(stages))
    if precision != "fp32" and (copied or not only_lora(stages)):
        pipe.unet = copy.deepcopy(exact)
        exact.cpu()
    to_precision(pipe.unet, precision)
    return exact


def round_text_encoders(stages: Sequence[Stage], pipe: Pipeline, precision: str) -> None:
    """To `precision`, in place, unless they are saved with the students, and so as they were loaded."""
    for encoder in pipe.text_encoders if only_lora(stages) else ():
        to_precision(encoder.requires_grad_(False), precision)


def first_student(ladder: Ladder) -> UNet:
    """The student before the first phase: a copy of the teacher, or of what is left of it when blocks are removed."""
    if ladder.start:
        return read_student(ladder, -1)
    if ladder.removal:
        return build_student(ladder.removal, parallel.whole(ladder.exact), ladder.pipe.device)
    if only_lora(ladder.stages):
        return copy_unet(ladder.pipe.unet, shared=True)
    return copy_unet(parallel.whole(ladder.exact)).to(ladder.pipe.device)


def load_student(ladder: Ladder, index: int) -> UNet:
    """The student of a stage, as in `read_student`, frozen and in the run's precision."""
    unet = read_student(ladder, index).eval().requires_grad_(False)
    to_precision(unet, ladder.config.precision)
    return unet


def read_student(ladder: Ladder, index: int) -> UNet:
    """The student of a stage, from the run folder, or for -1 the one that the ladder starts from.

    A LoRA is live if nothing else is trained, else merged. InputError: it is not there any more.
    """
    config, pipe, shared = ladder.config, ladder.pipe, only_lora(ladder.stages)
    path = find_model(config.start_from if index < 0 else ladder.folder.path / ladder.stages[index].name)
    if not (path.is_file() and is_lora(path)):
        return load_unet(path, pipe.device, torch.float32)[0]
    unet = copy_unet(pipe.unet, shared=True) if shared else copy_unet(parallel.whole(ladder.exact)).to(pipe.device)
    lora.attach_lora(unet, read_lora(path, pipe.networks)["unet"], dtype=torch.float32)
    if not shared:
        lora.merge_lora(unet)
    return unet


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


class Start(NamedTuple):
    """A distilled student that a ladder starts from."""

    source: str
    pipe: Pipeline  # as it is sampled
    lora: LoRAWeights | None  # of one of the layers, if it is a LoRA

    @classmethod
    def open(cls, teacher: Pipeline, source: str) -> Start:
        """A model, a U-Net alone, or a LoRA for the teacher.

        InputError: it cannot be read, does not fit the teacher, or does not say for how many steps it was distilled.
        """
        path, student, one = find_model(source), copy.copy(teacher), None
        if path.is_file() and is_lora(path):
            weights = read_lora(path, teacher.networks)
            if set(weights) != {"unet"}:
                what = "is a LoRA of the text encoder too, and only those of the U-Net are trained on"
                raise InputError(f"--start-from {source} {what}")
            one = next(iter(weights["unet"].values()))
            student.unet = copy_unet(teacher.unet, shared=True)
            lora.attach_lora(student.unet, weights["unet"], dtype=torch.float32)
            student.set_sampling(read_sampling(path))
        else:
            try:
                replace_unet(student, source)
            except InputError as error:
                raise InputError(f"--start-from {source}: {error}") from error
        if student.sampling is None:
            raise InputError(f"--start-from {source} does not say for how many steps it was distilled")
        return cls(source, student, one)

    def check(self, teacher: Pipeline, zero_snr: bool, shared: bool) -> None:
        """InputError: the students of this ladder are of another kind. shared: they are LoRAs for the teacher."""
        what, found = f"--start-from {self.source}", self.pipe.schedule
        if shared and not self.lora:
            raise InputError(f"{what} is a U-Net, and this plan trains a LoRA alone; take --plan keep, demo or paper")
        usual = "v_prediction" if zero_snr else teacher.schedule.prediction_type
        rescaled = zero_snr or teacher.schedule.rescale_betas_zero_snr
        if found.prediction_type not in ("sample", usual) or found.rescale_betas_zero_snr != rescaled:
            ours = f"{usual} on the {'rescaled' if rescaled else 'usual'} schedule"
            raise InputError(f"{what}: the students of this ladder predict {ours}, and it does not; see --zero-snr")
