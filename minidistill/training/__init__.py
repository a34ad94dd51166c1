"""What every training loop shares: settings, run folder, checkpoints, log, EMA, optimizer, curves.

The loops themselves are in the commands (`train_kd.py`, ...), flat and visible: they call these
functions, and nothing here calls back.

    config.py      a frozen dataclass -> command line flags, presets, exit codes
    run_folder.py  the output folder: config.json, atomic checkpoints, going on after an interruption
    state.py       networks, optimizers, EMA, loss scalers <-> named tensors + JSON, exactly
    seeds.py       a random generator for (seed, what, step): nothing random has to be saved
    log.py         metrics.jsonl, the line a human reads, the loss by timestep
    optim.py       learning rate, AdamW, clipping, precision, the finite check
    ema.py         exponential moving average of the weights
    curves.py      metrics.jsonl -> curves.png
"""
