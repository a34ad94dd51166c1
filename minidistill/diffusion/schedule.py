"""The noise schedule and all conversions between eps, x0, v and x_t.

Timesteps are 0-based integers t = 0 .. T-1; t = -1 is the clean latent (alpha_bar = 1). The papers count 1 .. T, with 0
for clean. `alpha_bar` is the cumulative product of 1 - beta, float32, shape (T,).

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps        (DDPM, arXiv 2006.11239, eq. 4)
    v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x0        (progressive distillation, arXiv 2202.00512, app. D)

Functions of latents take (B, ...) tensors, and t as an int, a 0-d or a (B,) integer tensor. They return float32
(float64 for float64 input) for any dtype of the latents: at t = 999 an error in eps is amplified 14.6 times in x0, so
half precision is not enough. Divisions by zero (eps -> x0 at abar = 0, x0 -> eps at abar = 1) raise ValueError on the
CPU; on an accelerator the check would synchronise the device, so there the result is inf or nan (the samplers check
their grid first).
"""

import warnings
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("scaled_linear", "linear")

# Settings that change the noise or the timesteps given to the network, with their only supported values.
_NOISE_SETTINGS = {"trained_betas": None, "use_flow_sigmas": False, "timestep_type": "discrete"}
# Settings of diffusers' solvers that are not supported, with the values that have no effect.
_SOLVER_SETTINGS = {
    "clip_sample": False, "thresholding": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_lu_lambdas": False, "interpolation_type": "linear", "final_sigmas_type": "zero",
    "sigma_min": None, "sigma_max": None,
}  # fmt: skip
_CLIPPING = ("DDIM", "DDPM", "RePaint", "UnCLIP")  # schedulers of diffusers that clip x0 unless told otherwise


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule of a diffusers scheduler_config.json. Defaults: those of Stable Diffusion."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    timestep_spacing: str | None = "leading"  # None: not in the file, so the default of the sampler
    rescale_betas_zero_snr: bool = False
    ignored: tuple[str, ...] = field(default=(), compare=False)  # settings of solvers in the file

    def __post_init__(self) -> None:
        _check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _check_choice("prediction_type", self.prediction_type, PREDICTIONS)
        if self.timestep_spacing is not None:
            _check_choice("timestep_spacing", self.timestep_spacing, SPACINGS)
        if self.num_train_timesteps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            given = f"T = {self.num_train_timesteps}, betas {self.beta_start} .. {self.beta_end}"
            raise ValueError(f"not a noise schedule: {given}; need T >= 1 and 0 < start <= end < 1")

    @classmethod
    def from_dict(cls, config: dict) -> "ScheduleConfig":
        """From the scheduler_config.json of any diffusers scheduler.

        Absent keys take the defaults of the class that wrote the file (`_class_name`), not those of Stable Diffusion.
        Settings of solvers (`clip_sample`, `use_karras_sigmas`, ...) do not matter for training and conversion; they
        are listed in `ignored`. Warns of LCM and TCD schedulers. ValueError: a setting that changes the noise
        (`trained_betas`, ...), or a flow-matching or EDM scheduler.
        """
        writer = config.get("_class_name", "DDIMScheduler")
        if not isinstance(writer, str):
            raise ValueError(f"scheduler config: _class_name = {writer!r} is no name")
        if "FlowMatch" in writer or "EDM" in writer:
            raise ValueError(f"scheduler config: {writer} is not supported; a DDPM noise schedule is needed")
        for key, only in _NOISE_SETTINGS.items():
            if key in config and config[key] not in (only, None):
                raise ValueError(f"scheduler config: {key} = {config[key]!r} is not supported; set it to {only!r}")
        if writer in ("LCMScheduler", "TCDScheduler"):
            what = "this model is distilled for consistency sampling in a few steps"
            warnings.warn(f"{writer}: {what}, which is not supported: expect poor images here", stacklevel=2)
        solver = {"clip_sample": config.get("_class_name", "").startswith(_CLIPPING), **config}
        ignored = [
            f"{key} = {solver[key]}" for key, off in _SOLVER_SETTINGS.items() if solver.get(key) not in (off, None)
        ]
        absent = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 0}
        absent |= {"set_alpha_to_one": writer != "PNDMScheduler", "timestep_spacing": None}
        names = [field.name for field in fields(cls) if field.name != "ignored"]
        return cls(**(absent | {name: config[name] for name in names if name in config}), ignored=tuple(ignored))

    def to_dict(self) -> dict:
        """A scheduler_config.json for diffusers' DDIMScheduler."""
        d = {"_class_name": "DDIMScheduler", **asdict(self), "clip_sample": False, "trained_betas": None}
        absent = ("ignored",) if self.timestep_spacing else ("ignored", "timestep_spacing")
        return {key: value for key, value in d.items() if key not in absent}


def make_alpha_bar(config: ScheduleConfig) -> Tensor:
    """abar_t for t = 0 .. T-1: (T,) float32 on the CPU. With `rescale_betas_zero_snr` the last is exactly 0."""
    T = config.num_train_timesteps
    if config.beta_schedule == "scaled_linear":  # linear in sqrt(beta): Stable Diffusion, not DDPM
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=torch.float32) ** 2
    else:
        betas = torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float32)
    if config.rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    return torch.cumprod(1 - betas, dim=0)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) rescaled so that abar_{T-1} = 0, with abar_0 unchanged (arXiv 2305.08891, algorithm 1). T >= 2."""
    if len(betas) < 2:
        raise ValueError("zero terminal SNR needs at least 2 timesteps")
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def final_alpha_bar(config: ScheduleConfig, alpha_bar: Tensor) -> float:
    """Target of DDIM's last step: 1 (clean), or abar_0 if `set_alpha_to_one` is false (Stable Diffusion)."""
    return 1.0 if config.set_alpha_to_one else float(alpha_bar[0])


def alpha_at(alpha_bar: Tensor, t: int | Tensor, like: Tensor) -> Tensor:
    """abar_t on the device of `like`, broadcastable to it: (B, 1, ..., 1), or (1, ..., 1) for a single t.

    t = -1 gives 1 (clean). ValueError: t is not an integer, or (checked on the CPU only) outside -1 .. T-1.
    """
    t = torch.as_tensor(t, device=like.device)
    if t.is_floating_point():
        raise ValueError(f"t must be integer, got {t.dtype}: only the Euler sampler takes fractional timesteps")
    if t.device.type == "cpu" and bool(((t < -1) | (t >= len(alpha_bar))).any()):
        raise ValueError(f"t must be -1 .. {len(alpha_bar) - 1}, got {t.tolist()}")
    alpha_bar = alpha_bar.to(like.device)
    a = torch.where(t < 0, torch.ones_like(alpha_bar[0]), alpha_bar[t.clamp(min=0)])
    # Not 0-d for a single t: a 0-d factor would not promote half-precision latents to float32.
    return a.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, t: int | Tensor, alpha_bar: Tensor, pure_noise_at_end: bool = False) -> Tensor:
    """x_t (B, ...) from clean x0 and standard-normal eps (DDPM eq. 4; SDXL-Lightning, 2402.13929, eq. 1).

    pure_noise_at_end: x_t = eps at t = T-1 (SDXL-Lightning eq. 24). Sampling starts from pure noise although abar_{T-1}
    is not 0, and a student must be trained on the same input.
    """
    a = alpha_at(alpha_bar, t, x0)
    if pure_noise_at_end:
        at_end = torch.as_tensor(t, device=x0.device).reshape(a.shape) == len(alpha_bar) - 1
        a = torch.where(at_end, torch.zeros_like(a), a)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def to_x0(out: Tensor, x_t: Tensor, t: int | Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """Model output -> x0 (from eps: SDXL-Lightning eq. 3). Undefined for eps at abar = 0."""
    _check_choice("prediction", prediction, PREDICTIONS)
    a = alpha_at(alpha_bar, t, x_t)
    if prediction == "epsilon":
        _refuse_zero(a, "eps does not determine x0 where alpha_bar = 0 (zero terminal SNR): use v_prediction")
        return (x_t - (1 - a).sqrt() * out) / a.sqrt()
    if prediction == "v_prediction":
        return a.sqrt() * x_t - (1 - a).sqrt() * out
    return out.to(torch.promote_types(out.dtype, a.dtype))


def to_eps(out: Tensor, x_t: Tensor, t: int | Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """Model output -> eps (from x0: SDXL-Lightning eq. 4). Undefined for x0 at abar = 1 (t = -1)."""
    _check_choice("prediction", prediction, PREDICTIONS)
    a = alpha_at(alpha_bar, t, x_t)
    if prediction == "sample":
        _refuse_zero(1 - a, "x0 does not determine eps where alpha_bar = 1 (t = -1, clean)")
        return (x_t - a.sqrt() * out) / (1 - a).sqrt()
    if prediction == "v_prediction":
        return a.sqrt() * out + (1 - a).sqrt() * x_t
    return out.to(torch.promote_types(out.dtype, a.dtype))


def training_target(x0: Tensor, eps: Tensor, t: int | Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """The regression target of the network: eps, x0, or v = sqrt(abar) eps - sqrt(1 - abar) x0."""
    _check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x0
    a = alpha_at(alpha_bar, t, x0)
    return a.sqrt() * eps - (1 - a).sqrt() * x0


def move(
    x_t: Tensor, out: Tensor, t: int | Tensor, t_next: int | Tensor, alpha_bar: Tensor, prediction: str = "epsilon"
) -> Tensor:
    """x_t moved along the probability flow from t to t_next, -1 = clean (SDXL-Lightning eq. 5; DDIM with eta = 0)."""
    a_next = alpha_at(alpha_bar, t_next, x_t)
    x0 = to_x0(out, x_t, t, alpha_bar, prediction)
    if isinstance(t_next, int) and t_next == -1:
        return x0  # also for t = -1, where x0-prediction has no eps
    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * to_eps(out, x_t, t, alpha_bar, prediction)


def time_grid(
    steps: int, spacing: str, num_train_timesteps: int = 1000, offset: int = 1, fractional: bool = False
) -> Tensor:
    """The timesteps of a sampler, descending: (steps,) int64. Spacings: arXiv 2305.08891, table 2.

    With T = 1000 and 4 steps: leading 751 501 251 1, trailing 999 749 499 249, linspace 999 666 333 0. The end (-1,
    clean) is not part of the grid. A single step is at t = offset (leading), T-1 (trailing) or 0 (linspace), so only
    trailing can sample in one. offset: steps_offset of scheduler_config.json, for leading only. fractional: float32,
    and linspace is not rounded, as Euler uses it.

    ValueError: steps outside 1 .. T, an unknown spacing, or an offset that leaves 0 .. T-1.
    """
    T = num_train_timesteps
    _check_choice("spacing", spacing, SPACINGS)
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1 .. {T}, got {steps}")
    if spacing == "leading":
        grid = np.arange(steps)[::-1] * (T // steps) + offset
    elif spacing == "trailing":
        # [:steps]: for some counts (61, 103, ...) rounding leaves a value just above 0, one more step at t = -1.
        grid = np.arange(T, 0, -T / steps)[:steps].round() - 1
    else:
        grid = np.linspace(0, T - 1, steps)[::-1]
        grid = grid if fractional else grid.round()
    if grid[0] > T - 1 or grid[-1] < 0:
        raise ValueError(f"{steps} {spacing} steps with offset {offset} leave 0 .. {T - 1}: change steps or offset")
    return torch.from_numpy(grid.astype(np.float32 if fractional else np.int64))


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}; got {value!r}")


def _refuse_zero(divisor: Tensor, message: str) -> None:
    if divisor.device.type == "cpu" and bool((divisor == 0).any()):
        raise ValueError(message)
