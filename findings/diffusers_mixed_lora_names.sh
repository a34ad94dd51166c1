#!/usr/bin/env bash
# diffusers 0.42.1: a LoRA on attention and on other layers, saved the way many training scripts do
# (convert_state_dict_to_diffusers), loses its attention part when it is loaded again.
#
# The conversion renames only attention layers to `.lora.down` / `.lora.up` and leaves `.lora_A` / `.lora_B` for the rest.
# load_lora_weights then takes the whole file for one in PEFT's names if its first key holds `lora_A` (proj_in's, say, which
# comes before the attention's), and the renamed attention tensors match nothing. No error; the network's output is not that of the network that was saved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "diffusers==0.42.1" "transformers==5.24.0" "peft==0.21.2"
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict


def make() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        layers_per_block=1,
    ).eval()


def pipeline(unet):
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def output(unet) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 16, 16), 500, torch.randn(1, 5, 32)).sample


def round_trip(targets: list[str], rename: bool) -> tuple[float, float]:
    """How far a LoRA moves the output, and how far the loaded one is from it."""
    saved = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), make())
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in saved.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    state = get_peft_model_state_dict(saved)
    state = convert_state_dict_to_diffusers(state) if rename else state
    StableDiffusionPipeline.save_lora_weights(sys.argv[1], unet_lora_layers=state)
    loaded = make()
    pipeline(loaded).load_lora_weights(sys.argv[1], weight_name="pytorch_lora_weights.safetensors")
    move = (output(saved) - output(make())).abs().mean().item()
    return move, (output(loaded) - output(saved)).abs().mean().item()


attention = ["to_q", "to_k", "to_v", "to_out.0"]
cases = {
    "attention, renamed": round_trip(attention, True),
    "attention and proj_in, as PEFT names them": round_trip([*attention, "proj_in"], False),
    "attention and proj_in, renamed": round_trip([*attention, "proj_in"], True),
}
for name, (move, error) in cases.items():
    print(f"{name}: the LoRA moves the output by {move:.4f}, the loaded one is {error:.6f} off")
assert cases["attention, renamed"][1] < 1e-5 and cases["attention and proj_in, as PEFT names them"][1] < 1e-5
lost = cases["attention and proj_in, renamed"]
assert lost[1] > 0.05 * lost[0]
PY
