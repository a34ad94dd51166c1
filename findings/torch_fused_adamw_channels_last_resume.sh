#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU: a training in the memory format channels_last, with the fused AdamW, goes wrong after it is
# resumed from a file that keeps tensors contiguous, as safetensors does. `load_state_dict` takes the moments with the
# strides of the file, and the fused kernel combines weights, gradients and moments by their place in memory: no error,
# but each weight is updated with the moments of another one. The plain AdamW of the same version resumes exactly.
#
# The output seen:
#
#   torch 2.13.0+cpu
#   strides of a 3x3 convolution's weight (27, 1, 9, 3), of its first moment after resuming (27, 9, 3, 1)
#   fused=False: largest difference between the resumed weights and those of a run never stopped: 0
#   fused=True: largest difference between the resumed weights and those of a run never stopped: 0.28
#   fused=True, moments in channels_last after resuming: 0
#
# Exits with 0 as long as this is what happens, with 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "safetensors==0.8.0" "numpy==2.4.6" "packaging>=24"

"$folder/venv/bin/python" - "$folder/moments.safetensors" <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file, save_file

LAST = {"memory_format": torch.channels_last}


def train(fused, resume, restride=False):
    """The weight after six steps; with `resume` the optimizer is saved and loaded after the third."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(**LAST))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    for step, gradient in enumerate(torch.randn(6, 4, 3, 3, 3)):
        if step == 3 and resume:
            state = optimizer.state_dict()
            save_file({k: v.contiguous() for k, v in state["state"][0].items()}, sys.argv[1])
            optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
            optimizer.load_state_dict({**state, "state": {0: load_file(sys.argv[1])}})
            moments = optimizer.state[weight]
            if restride:
                moments.update({k: v.to(**LAST) for k, v in moments.items() if v.dim() == 4})
            strides.update(weight=weight.stride(), moment=moments["exp_avg"].stride())
        weight.grad = gradient.to(**LAST)
        optimizer.step()
    return weight.detach()


strides = {}
found = {fused: float((train(fused, False) - train(fused, True)).abs().max()) for fused in (False, True)}
print(f"torch {torch.__version__}")
print(f"strides of a 3x3 convolution's weight {strides['weight']}, of its first moment after resuming {strides['moment']}")
for fused, difference in found.items():
    print(f"fused={fused}: largest difference between the resumed weights and those of a run never stopped: {difference:.2g}")
mended = float((train(True, False) - train(True, True, restride=True)).abs().max())
print(f"fused=True, moments in channels_last after resuming: {mended:.2g}")
sys.exit(0 if found[False] == 0 and found[True] > 0.01 and mended == 0 else 1)
PYTHON
