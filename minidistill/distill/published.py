"""The settings of the published BK-SDM and Segmind students, as presets of `train_kd`. None was run here yet."""

from __future__ import annotations

from typing import Any

# Nota's released scripts: 512 pixels, fp16, checkpointing, flips, EMA, batch 256. The scripts say 400,000 steps, the
# paper and the released weights 50,000. One A100 took 300 hours for bk-base, by their account.
NOTA = {
    "resolution": 512, "flip": True, "caption_dropout": 0.0,
    "steps": 50_000, "batch_size": 64, "accumulate": 4, "seed": 1234,
    "learning_rate": 5e-5, "lr_schedule": "constant", "warmup": 0, "ema_decay": 0.9999,
    "device": "cuda", "precision": "fp16", "gradient_checkpointing": True,
    "guidance": 7.5, "log_every": 50, "sample_every": 500, "checkpoint_every": 500,
}  # fmt: skip
# Segmind's sources disagree. Learning rate: 1e-5 in the README, 1e-4 in the script and on the model cards. Batch: 32 in
# the README, 32 x 4 in the others. Loss weights: 0.5 in the README, 1 in the blog's formula. Steps: 100,000 in the blog
# for small, 95,000 on its card. Taken here: the script's numbers with the README's weights (those of the recipe).
# Realistic Vision was published as V4.0 and renamed V4.0_noVAE.
SEGMIND = NOTA | {
    "teacher": "SG161222/Realistic_Vision_V4.0_noVAE",
    "batch_size": 32, "seed": 647,
    "learning_rate": 1e-4, "lr_schedule": "cosine", "ema_decay": 0.0,
}  # fmt: skip
OURS = "give --data; not yet run here"
PUBLISHED: dict[str, dict[str, Any]] = {
    "nota-sd15": NOTA | {
        "comment": f"BK-SDM of SD 1.4 as published, 12.8 M samples: {OURS}",
        "teacher": "CompVis/stable-diffusion-v1-4", "recipe": "bk-base",
    },
    "nota-sd21": NOTA | {
        "comment": f"BK-SDM-v2 of SD 2.1-base as published, batch 128, 6.4 M samples: {OURS}",
        "teacher": "stabilityai/stable-diffusion-2-1-base", "recipe": "bk-base", "batch_size": 32,
    },
    "segmind-small": SEGMIND | {
        "comment": f"SD-Small as published, 12.8 M samples: {OURS}",
        "recipe": "segmind-small", "steps": 100_000,
    },
    "segmind-tiny": SEGMIND | {
        "comment": f"SD-Tiny as published, 16 M samples: {OURS}",
        "recipe": "segmind-tiny", "steps": 125_000,
    },
}  # fmt: skip
