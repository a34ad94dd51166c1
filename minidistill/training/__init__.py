"""What every training loop shares. The loops themselves are in the commands; nothing here calls back into them.

batches.py     captioned images -> latents, text states, noise and timesteps, each sample by its number
inputs.py      settings, weights and data, checked before a file is written
device.py      device and precision
optim.py       learning rate, AdamW, clipping, the finite check
ema.py         exponential moving average of the weights
state.py       networks, optimizers, EMA, loss scalers <-> named tensors + JSON, exactly
run_folder.py  the output folder: config.json, atomic checkpoints, resuming after an interruption
log.py         metrics.jsonl, the line a human reads, the loss by timestep
curves.py      metrics.jsonl -> curves.png
"""
