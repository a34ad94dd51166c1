#!/usr/bin/env bash
# diffusers 0.42.1: with timestep_spacing="trailing", set_timesteps(61) makes 62 steps, and the last one is at t = -1.
#
# np.arange(1000, 0, -1000/61) has 62 elements: the last is a rounding error above 0, and it becomes timestep -1. It happens
# for 62 of the step counts from 1 to 1000 (61, 103, 121, 122, ...). Euler is unharmed: its sigma there is about that of t = 0.
# DDIM reads alphas_cumprod[-1], which Python takes as that of t = 999, so the last step treats a clean sample as noise: with
# an exact noise prediction, 60 and 62 steps return the clean sample but for a few per cent, 61 steps do not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "diffusers==0.42.1" "transformers==5.24.0"
"$folder/venv/bin/python" - <<'PY'
import torch
from diffusers import DDIMScheduler


def make():
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )


def error(steps: int) -> tuple[int, int, float]:
    """Number of timesteps, the last one, and the RMS error of DDIM with an exact noise prediction."""
    scheduler = make()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    abar = scheduler.alphas_cumprod[scheduler.timesteps[0]]
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    for t in scheduler.timesteps:
        x = scheduler.step(eps, t, x).prev_sample
    return len(scheduler.timesteps), int(scheduler.timesteps[-1]), float((x - x0).square().mean().sqrt())


seen = {steps: error(steps) for steps in (60, 61, 62)}
for steps, (count, last, rms) in seen.items():
    print(f"set_timesteps({steps}): {count} timesteps, the last is {last}, RMS error {rms:.3g}")
longer = []
for steps in range(1, 1001):
    scheduler = make()
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) != steps:
        longer.append(steps)
print(f"{len(longer)} of 1 ... 1000 step counts make one timestep more: {longer[:6]} ...")
assert seen[61][:2] == (62, -1) and seen[60][:2] == (60, 16)
assert seen[61][2] > 10 and max(seen[60][2], seen[62][2]) < 0.2
assert len(longer) == 62 and longer[:3] == [61, 103, 121]
PY
