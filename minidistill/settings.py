"""The settings that trainers share: those of every run, and those of the trainers with one loss. Each adds its own."""

from __future__ import annotations

from dataclasses import dataclass

from minidistill.cli import option
from minidistill.data.listing import CAPTION_COLUMN_HELP, SPLIT_CHOICES, SPLIT_HELP
from minidistill.miniature.scenes import Scenes
from minidistill.training.device import PRECISIONS
from minidistill.training.optim import SCHEDULES
from minidistill.training.parallel import MODES

SMALL = 50_000_000  # U-Net parameters: the defaults for smaller teachers, such as the miniature, take minutes


@dataclass(frozen=True)
class RunConfig:
    data: str = option("scenes", "scenes, a folder of images with captions, or a cache that minidistill.cache made")
    split: str | None = option(None, SPLIT_HELP, choices=SPLIT_CHOICES)
    caption_column: str | None = option(None, CAPTION_COLUMN_HELP)
    images: int = option(4096, "number of scenes to train on", minimum=1)
    resolution: int | None = option(None, "training resolution in pixels (default: the model's)", minimum=8)
    accumulate: int = option(1, "micro-batches per optimizer step (gradient accumulation)", minimum=1)
    max_grad_norm: float | None = option(1.0, "clip gradients to this norm; none: no clipping", minimum=0)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    seed: int = option(0, "random seed")
    device: str = option("auto", "cpu, cuda, cuda:N, mps, or auto: the first available of cuda, mps, cpu")
    dtype: str | None = option(None, "precision of the saved weights (default: fp32)", choices=PRECISIONS)
    parallel: str = option(
        "ddp", "what processes of torchrun share out: the batch, optimizer states too, or all weights", choices=MODES
    )
    deterministic: bool = option(False, "deterministic CUDA kernels: the same bits in every run, slower")
    judged: int = option(48, "held-out scenes to evaluate on; 0: none", minimum=0, maximum=len(Scenes("test")))
    keep_checkpoints: int = option(2, "number of checkpoints to keep", minimum=1)
    push_to_hub: str | None = option(None, "upload the result to this Hub repository (owner/name)")
    private: bool = option(False, "make the repository of --push-to-hub private")
    resume: bool = option(False, "resume the run in OUT from its last checkpoint")


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    flip: bool = option(False, "random horizontal flip, p = 0.5; not for captions that say left and right")
    caption_dropout: float = option(0.1, "share of samples with an empty caption, for guidance", minimum=0)
    lr_schedule: str = option("cosine", "learning rate after the warm-up", choices=SCHEDULES)
    weight_decay: float = option(1e-2, "weight decay of AdamW, on all trained weights", minimum=0)
