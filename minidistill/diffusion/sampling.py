"""How a checkpoint is sampled: the settings a step-distilled model needs, and those of other models.

    sdxl_lightning_4step_unet.safetensors      4 Euler steps, trailing timesteps, guidance off
    sdxl_lightning_1step_x0.safetensors        1 step, and the network predicts x0, not eps

A distilled model gives good images with its own settings only. Files written by minidistill store them in the metadata
of the weights; for SDXL-Lightning they follow from the file name.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path

from torch import Tensor

from minidistill.diffusion.samplers import Callback, Model, ddim, euler, sigmas_at
from minidistill.diffusion.schedule import (
    PREDICTIONS,
    SPACINGS,
    ScheduleConfig,
    final_alpha_bar,
    make_alpha_bar,
    time_grid,
)

METADATA_KEY = "minidistill.sampling"
SAMPLERS = ("ddim", "euler")
USUAL_SPACING = {"ddim": "leading", "euler": "linspace"}  # defaults of their diffusers classes
LIGHTNING = re.compile(r"sdxl_lightning_(\d+)step(?:_unet|_lora)?(_x0)?$")


@dataclass(frozen=True)
class Sampling:
    """The settings a model was distilled for."""

    steps: int
    sampler: str = "euler"
    spacing: str = "trailing"
    guidance: float = 1.0  # 1 and below: off
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Integral) or self.steps < 1:
            raise ValueError(f"steps must be an integer of 1 or more, not {self.steps!r}")
        if not isinstance(self.guidance, Real) or not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, not {self.guidance!r}")
        for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    def __str__(self) -> str:
        guidance = f"guidance {self.guidance:g}" if self.guidance > 1 else "guidance off"
        count = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{count} of {self.sampler} with {self.spacing} timesteps, {guidance}"


def find_sampling(path: str | Path, metadata: Mapping[str, str]) -> Sampling | None:
    """Settings from the metadata of a weights file, else from its name; None if neither has any.

    ValueError: the metadata is not as written by `sampling_metadata`.
    """
    if METADATA_KEY in metadata:
        known = {field.name for field in fields(Sampling)}
        try:
            entry = json.loads(metadata[METADATA_KEY])
            return Sampling(**{name: value for name, value in entry.items() if name in known})
        except (AttributeError, TypeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: the metadata {METADATA_KEY} is not readable ({error})") from error
    if found := LIGHTNING.match(Path(path).stem):
        return Sampling(int(found[1]), prediction="sample" if found[2] else "epsilon")
    return None


def sampling_metadata(sampling: Sampling | None) -> dict[str, str]:
    """Metadata for a weights file, from which `find_sampling` reads the settings."""
    return {} if sampling is None else {METADATA_KEY: json.dumps(asdict(sampling))}


def as_distilled(schedule: ScheduleConfig, sampling: Sampling | None) -> ScheduleConfig:
    """The schedule with the prediction type and timestep spacing a model was distilled for; None changes nothing."""
    if sampling is None:
        return schedule
    return replace(schedule, prediction_type=sampling.prediction, timestep_spacing=sampling.spacing)


def choose_settings(
    schedule: ScheduleConfig, distilled: Sampling | None, asked: Mapping[str, object], steps: int, guidance: float
) -> Sampling:
    """The settings asked for; for None those the model was distilled for, or else the defaults.

    asked: steps, guidance, sampler and spacing. steps, guidance: defaults for a model that is not distilled. Warns of
    settings that a distilled model was not trained for and of settings of the scheduler that are ignored.
    """
    if ignored := ", ".join(schedule.ignored):
        warnings.warn(f"settings of scheduler_config.json not supported in sampling: {ignored}", stacklevel=4)
    given = {name: value for name, value in asked.items() if value is not None}
    own = distilled or Sampling(steps, *default_solver(schedule, asked["sampler"], asked["spacing"]), guidance)
    settings = replace(own, **given)
    if distilled and str(settings) != str(own):  # by their text: all values of guidance that are off are equal
        warnings.warn(f"this model is made for {own}; you ask for {settings}: expect poor images", stacklevel=4)
    return settings


def solver(
    schedule: ScheduleConfig, settings: Sampling, callback: Callback | None = None, strength: float | None = None
) -> Callable[[Model, Tensor, Tensor | None], Tensor]:
    """The sampler of these settings: solve(model, noise, init) -> x0 latents, all (B, C, h, w).

    With a `strength`, only that fraction of the steps is done, the last ones, starting from the clean latents `init`
    with noise added (SDEdit, arXiv 2108.01073). ValueError, here or in the call: settings that are not supported.
    """
    steps, is_euler = settings.steps, settings.sampler == "euler"
    total, offset = schedule.num_train_timesteps, schedule.steps_offset
    grid = time_grid(steps, settings.spacing, total, offset, fractional=is_euler)
    if strength is not None:
        valid = isinstance(strength, int | float) and 0 < strength <= 1
        done = min(math.floor(steps * strength), steps) if valid else 0
        if done < 1:
            raise ValueError(f"strength must be above 0, at most 1 and give 1 step or more: got {strength} of {steps}")
        grid = grid[steps - done :]
    alpha_bar = make_alpha_bar(schedule)
    if is_euler:
        # As in diffusers: start at variance 1 with leading steps, a little below with the others.
        solve = partial(euler, pure_noise=settings.spacing == "leading" or strength is not None)
    else:
        solve = partial(ddim, final_alpha_bar=final_alpha_bar(schedule, alpha_bar))
    solve = partial(solve, timesteps=grid, alpha_bar=alpha_bar, prediction=schedule.prediction_type, callback=callback)
    sigma = sigmas_at(alpha_bar, grid[:1]).item()

    def sample(model: Model, noise: Tensor, init: Tensor | None = None) -> Tensor:
        if init is not None:
            noise = (init.to(noise.device) + sigma * noise) / math.hypot(1, sigma)
        return solve(model, noise)

    return sample


def default_solver(schedule: ScheduleConfig, sampler: str | None = None, spacing: str | None = None) -> tuple[str, str]:
    """Defaults (sampler, spacing) for what the user (`sampler`, `spacing`) and the schedule leave open.

    The sampler is ddim, or euler for eps-prediction where the first timestep has alpha_bar = 0 (zero terminal SNR with
    trailing or linspace spacing), for which DDIM is undefined. A spacing absent from the schedule is the default of the
    sampler in diffusers, as after `from_config` with another scheduler. Unknown names are ignored.
    """
    spacing = spacing if spacing in SPACINGS else schedule.timestep_spacing
    if sampler not in SAMPLERS:
        starts_at_zero = schedule.rescale_betas_zero_snr and spacing in ("trailing", "linspace")
        sampler = "euler" if starts_at_zero and schedule.prediction_type == "epsilon" else "ddim"
    return sampler, spacing or USUAL_SPACING[sampler]
