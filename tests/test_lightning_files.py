"""SDXL-Lightning's files in the forms they are published in, through the command: images, settings, warnings.

    sdxl_lightning_4step_unet.safetensors      a U-Net in diffusers' names, for the place of SDXL's
    sdxl_lightning_4step_lora.safetensors      a LoRA in kohya's names with diffusers' blocks: rank 64, alpha 8
    sdxl_lightning_4step.safetensors           a whole model in sgm's names
    sdxl_lightning_1step_unet_x0.safetensors   a U-Net that puts out x0; 1step_x0 is the whole model with it

All are float16, and none has metadata: the name alone says how to sample. What is made here has random weights and
few layers, but SDXL's widths of text (768 and 1280, pooled 1280), by which the architecture of such files is known.
"""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pipeline import levels, run_generate
from test_sdxl import oracle_of
from tiny import PROMPTS, make_prompts_matter

from minidistill.diffusion.schedule import ScheduleConfig
from minidistill.interop.single_file import write_single_file
from minidistill.models.clip import SD1_TEXT, SDXL_TEXT_2, CLIPTextModel
from minidistill.models.lora import ALL, find_targets
from minidistill.models.tokenizer import CLIPTokenizer, train_bpe
from minidistill.models.unet import SDXL, UNet
from minidistill.models.vae import SDXL_VAE, AutoencoderKL
from minidistill.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "sdxl_lightning_{}.safetensors"
RANK, ALPHA = 64, 8.0
SIZE = 32  # pixels; the latents' is a quarter of that
AS_MADE = ["--steps", "4", "--sampler", "euler", "--spacing", "trailing", "--guidance", "0"]
MADE_FOR = "this model is made for 4 steps of euler with trailing timesteps, guidance off; you ask for "


def make_pipeline() -> Pipeline:
    """An SDXL with its widths of text and few layers, float16."""
    torch.manual_seed(0)
    words = train_bpe(PROMPTS, vocab_size=600)
    few = {"vocab_size": words.vocab_size, "num_hidden_layers": 2, "intermediate_size": 64}
    unet = UNet(
        replace(SDXL, block_out_channels=(32, 64, 64), attention_head_dim=1, transformer_layers_per_block=(1, 1, 2))
    )
    encoders = [CLIPTextModel(replace(SD1_TEXT, **few)), CLIPTextModel(replace(SDXL_TEXT_2, **few), True)]
    for encoder in encoders:
        make_prompts_matter(unet, encoder)
    return Pipeline(
        unet.half(),
        AutoencoderKL(replace(SDXL_VAE, block_out_channels=(32, 32, 64))).half(),
        [encoder.half() for encoder in encoders],
        [words, CLIPTokenizer(words.vocab, words.merges, pad_token="!")],
        ScheduleConfig(timestep_spacing="leading"),
        zero_unconditional=True,
    )


def lightning_lora(unet: UNet) -> dict[str, torch.Tensor]:
    """Three tensors a layer, as in the published file."""
    tensors = {}
    for name in find_targets(unet, ALL):
        out, into, *kernel = unet.get_submodule(name).weight.shape
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {
            f"{key}.lora_down.weight": 0.3 * torch.randn(RANK, into, *kernel),
            f"{key}.lora_up.weight": 0.1 * torch.randn(out, RANK, *[1 for _ in kernel]),
            f"{key}.alpha": torch.tensor(ALPHA),
        }
    return {name: tensor.half() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/ is the pipeline folder; beside it lie the files, and the noise.safetensors all start from."""
    folder = tmp_path_factory.mktemp("lightning")
    pipe = make_pipeline()
    pipe.save(folder / "base")
    save_file(lightning_lora(pipe.unet), folder / NAME.format("4step_lora"))
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    for name in ("4step_unet", "1step_unet_x0"):
        save_file(pipe.unet.state_dict(), folder / NAME.format(name))
    whole = folder / NAME.format("4step")
    write_single_file(whole, pipe.unet, pipe.vae, pipe.text_encoders, pipe.schedule)
    extra = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6).half(),
    }
    tensors = {name: tensor.clone() for name, tensor in load_file(whole).items()} | extra
    for name in ("4step", "1step_x0"):
        save_file(tensors, folder / NAME.format(name))
    pipe.tokenizers[0].save(folder / "tokenizer")  # in place of CLIP's own vocabulary
    save_file({"latents": torch.randn(1, 4, SIZE // 4, SIZE // 4)}, folder / "noise.safetensors")
    return folder


def draw(folder, form: str, *words: str) -> np.ndarray:
    """The image of the command for the U-Net, the LoRA, the whole file or the folder alone: (1, H, W, 3)."""
    file, base = str(folder / NAME.format(form)), ["--model", str(folder / "base")]
    model = {"base": base, "unet": [*base, "--unet", file], "lora": [*base, "--lora", file], "whole": ["--model", file]}
    kind = next((kind for kind in ("base", "unet", "lora") if kind in form), "whole")
    out = folder / "image.png"
    common = ["--prompt", PROMPTS[0], "--latents", str(folder / "noise.safetensors"), "--out", str(out)]
    assert run_generate(*model[kind], *common, *words) == 0
    return levels([Image.open(out)])


def draw_oracle(folder, form: str, steps: int, **scheduler: str) -> np.ndarray:
    """The same of diffusers, by the lines on SDXL-Lightning's model card."""
    pipe = oracle_of(folder / "base").to(torch.float32)
    file = folder / NAME.format(form)
    if "lora" in form:
        pipe.load_lora_weights(str(folder), weight_name=file.name)
        pipe.fuse_lora()
    else:
        pipe.unet.load_state_dict(load_file(file))
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", **scheduler
    )
    latents = load_file(folder / "noise.safetensors")["latents"]
    settings = {"num_inference_steps": steps, "guidance_scale": 0, "height": SIZE, "width": SIZE}
    return levels(pipe(PROMPTS[0], latents=latents, **settings).images)


def differ(one: np.ndarray, other: np.ndarray) -> int:
    return np.abs(one - other).max()


def test_the_unet_and_the_whole_file_draw_one_image_and_diffusers_the_same(folder, recwarn):
    unet, whole = draw(folder, "4step_unet"), draw(folder, "4step")
    assert np.array_equal(unet, whole)
    assert differ(unet, draw_oracle(folder, "4step_unet", 4)) <= 2
    assert np.array_equal(draw(folder, "4step_unet", *AS_MADE), unet)
    assert not [warning for warning in recwarn if "made for" in str(warning.message)]
    assert differ(draw(folder, "base", *AS_MADE), unet) > 20, "the file's weights must be seen in its image"


def test_the_lora_draws_what_it_draws_in_diffusers(folder, capsys):
    lora = draw(folder, "4step_lora")
    count = len(load_file(folder / NAME.format("4step_lora"))) // 3
    assert f"4step_lora.safetensors: {count}/{count} modules matched" in capsys.readouterr().err
    assert differ(lora, draw_oracle(folder, "4step_lora", 4)) <= 2
    assert differ(draw(folder, "base", *AS_MADE), lora) > 20


def test_the_files_of_one_step_put_out_the_image_itself(folder):
    found = draw(folder, "1step_unet_x0")
    assert np.array_equal(found, draw(folder, "1step_x0"))
    assert differ(found, draw_oracle(folder, "1step_unet_x0", 1, prediction_type="sample")) <= 2
    assert differ(found, draw_oracle(folder, "1step_unet_x0", 1)) > 20, "read as noise it is another image"


@pytest.mark.parametrize(
    ("form", "words", "asked"),
    [
        ("4step_lora", "--guidance 7.5", "4 steps of euler with trailing timesteps, guidance 7.5"),
        ("4step", "--spacing leading", "4 steps of euler with leading timesteps, guidance off"),
        ("4step_unet", "--steps 5 --guidance 3 --sampler ddim", "5 steps of ddim with trailing timesteps, guidance 3"),
    ],
)
def test_a_flag_against_the_file_is_warned_of_once(folder, recwarn, form, words, asked):
    draw(folder, form, *words.split())
    assert [str(warning.message) for warning in recwarn] == [MADE_FOR + asked + ": expect poor images"]
