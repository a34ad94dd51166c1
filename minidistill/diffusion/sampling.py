"""The sampling settings of a distilled model, which gives good images with these only.

    sdxl_lightning_4step_unet.safetensors      4 Euler steps, trailing timesteps, guidance off
    sdxl_lightning_1step_x0.safetensors        1 step, and the network predicts x0, not eps

Files written by minidistill store them in the metadata of the weights; for SDXL-Lightning they follow from the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minidistill.diffusion.schedule import PREDICTIONS, SPACINGS, ScheduleConfig

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
        if not (isinstance(self.steps, int) and self.steps >= 1 and isinstance(self.guidance, int | float)):
            raise ValueError(f"steps must be 1 or more and guidance a number, not {self.steps!r} and {self.guidance!r}")
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


def default_solver(schedule: ScheduleConfig, sampler: str | None = None, spacing: str | None = None) -> tuple[str, str]:
    """(sampler, spacing) where the user (`sampler`, `spacing`) or the schedule does not determine them.

    The sampler is ddim, or euler for eps-prediction where the first timestep has alpha_bar = 0 (zero terminal SNR with
    trailing or linspace spacing): there DDIM is not defined. A spacing that the schedule does not have is the default
    of the sampler in diffusers, as after a change of the scheduler by `from_config`. Unknown names are not used.
    """
    spacing = spacing if spacing in SPACINGS else schedule.timestep_spacing
    if sampler not in SAMPLERS:
        starts_at_zero = schedule.rescale_betas_zero_snr and spacing in ("trailing", "linspace")
        sampler = "euler" if starts_at_zero and schedule.prediction_type == "epsilon" else "ddim"
    return sampler, spacing or USUAL_SPACING[sampler]
