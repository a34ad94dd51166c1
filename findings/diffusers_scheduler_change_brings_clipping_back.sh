#!/usr/bin/env bash
# diffusers 0.42.1: StableDiffusionPipeline corrects an old scheduler_config.json in memory (clip_sample False, steps_offset 1),
# but `DDIMScheduler.from_config(pipe.scheduler.config)`, the documented way to change the sampler, takes the correction back.
#
# Where the file lacks both keys, from_config sees them among the values that were not set by the user and gives the new
# scheduler its own defaults: clip_sample True clips the predicted latents to [-1, 1], steps_offset is 0 again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "diffusers==0.42.1" "transformers==5.24.0"
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

old = {  # as early folders of Stable Diffusion 1.x have it
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.2.2",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
place = Path(sys.argv[1]) / "scheduler"
place.mkdir()
(place / "scheduler_config.json").write_text(json.dumps(old))
unet = UNet2DConditionModel(
    block_out_channels=(32, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=8,
    layers_per_block=1,
    sample_size=64,
)
parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
pipe = StableDiffusionPipeline(
    unet=unet, scheduler=DDIMScheduler.from_pretrained(place), requires_safety_checker=False, **parts
)
changed = DDIMScheduler.from_config(pipe.scheduler.config)
other = DDIMScheduler.from_config(PNDMScheduler.from_config(pipe.scheduler.config).config)
seen = {
    name: (scheduler.config.clip_sample, scheduler.config.steps_offset)
    for name, scheduler in {"in the pipeline": pipe.scheduler, "from_config": changed, "by way of PNDM": other}.items()
}
for name, (clip, offset) in seen.items():
    print(f"{name}: clip_sample {clip}, steps_offset {offset}")
assert seen["in the pipeline"] == (False, 1)
assert seen["from_config"] == (True, 0)
PY
