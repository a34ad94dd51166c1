"""What several test files share: tiny U-Net configs, random pipelines saved by diffusers, and comparisons."""

from dataclasses import replace

import diffusers
import numpy as np
import torch
import transformers
from conftest import CAPTIONS
from conftest import TOKENS as CAPTION_TOKENS

from minidistill.models.tokenizer import EOS, CLIPTokenizer, train_bpe
from minidistill.models.unet import SD15, SD21, SDXL, UNetConfig

TINY = replace(
    SD15, block_out_channels=(16, 32, 48, 48), norm_num_groups=8, cross_attention_dim=20, attention_head_dim=4
)
TINY_SD21 = replace(
    SD21,
    block_out_channels=(16, 32, 48, 48),
    norm_num_groups=8,
    cross_attention_dim=20,
    attention_head_dim=(1, 2, 4, 4),
)
TINY_SDXL = replace(
    SDXL,
    block_out_channels=(16, 32, 48),
    norm_num_groups=8,
    cross_attention_dim=20,
    attention_head_dim=(1, 2, 4),
    transformer_layers_per_block=(1, 2, 3),
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 12,
)

TINY_SSD = replace(  # transformers of different depths within a stage, as in SSD-1B
    TINY_SDXL,
    mid_block_type="UNetMidBlock2D",
    transformer_layers_per_block=(1, (2, 1), (1, 3)),
    reverse_transformer_layers_per_block=((1, 3, 2), (2, 1, 1), 1),
)
SMALL = replace(  # two stages of one layer
    TINY,
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_head_dim=2,
    transformer_layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)

PROMPTS = ["a red circle on a blue ground", "two green squares above a ring"]
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
TOKENS, XL_TOKENS = 32, 24


@torch.no_grad()
def randomize(network: torch.nn.Module, spread: float = 1.0, seed: int = 0) -> torch.nn.Module:
    """Random weights that make every part matter: newly initialised norms and biases would be ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        scale = 0.3 if p.dim() == 1 else spread / p[0].numel() ** 0.5
        p.copy_(torch.randn(p.shape, generator=generator) * scale + 0.5 * (p.dim() == 1))
    return network


def unet_inputs(config: UNetConfig, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32):
    """(x, t, context, added_cond) for a batch of two with different timesteps."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, *size, generator=generator).to(dtype)
    context = torch.randn(2, 7, config.cross_attention_dim, generator=generator).to(dtype)
    added = None
    if config.addition_embed_type:
        pooled = torch.randn(2, 12, generator=generator).to(dtype)
        sizes = torch.tensor([[1024, 768, 0, 16, 1024, 1024], [333, 1999, 7, 0, 512, 768]])
        added = {"text_embeds": pooled, "time_ids": sizes.float()}  # bfloat16 would round pixels
    return x, torch.tensor([3, 999]), context, added


def run_diffusers(unet: diffusers.UNet2DConditionModel, x, t, context, added=None) -> torch.Tensor:
    """diffusers' U-Net, called as ours."""
    return unet(x, t, context, added_cond_kwargs=added).sample


def run_hooked(unet: diffusers.UNet2DConditionModel, names, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """diffusers' prediction, and what forward hooks on its modules of these names catch."""
    caught, hooks, modules = {}, [], dict(unet.named_modules())
    for name in names:

        def keep(_module, _inputs, output, name=name):
            caught[name] = output[0] if isinstance(output, tuple) else output

        hooks.append(modules[name].register_forward_hook(keep))
    with torch.no_grad():
        out = run_diffusers(unet, *inputs)
    for hook in hooks:
        hook.remove()
    return out, caught


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= relative, f"relative error {error:.2e}"


def assert_same_gradients(ours: torch.nn.Module, theirs: dict[str, torch.Tensor], relative: float = 1e-4) -> None:
    """theirs: parameters by our names. No gradient is zero, but for those of key biases: softmax ignores them."""
    for name, p in ours.named_parameters():
        if name.endswith(("k_proj.bias", "to_k.bias")):
            assert p.grad.abs().max() < 1e-5
        else:
            assert p.grad.abs().max() > 0, name
            assert_close(p.grad, theirs[name].grad, relative)


def noise(count: int = 2, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(5))


def levels(images) -> np.ndarray:
    """Images -> (B, H, W, 3) int."""
    return np.stack([np.asarray(image, dtype=int) for image in images])


def apart(one, other) -> list[int]:
    """The largest difference of each pair of images, in levels of 255."""
    return np.abs(levels(one) - levels(other)).max(axis=(1, 2, 3)).tolist()


def load_oracle(folder) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SCHEDULER = {  # of all Stable Diffusions
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
WITHOUT_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text_config(tokenizer: CLIPTokenizer, width: int, **settings) -> transformers.CLIPTextConfig:
    """A small text encoder for a tokenizer. Further settings: those of the config."""
    usual = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.max_length,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return transformers.CLIPTextConfig(**{**usual, **settings})


def save_tiny_sd1(folder, stages: int = 4, layers: int = 2, side: int = 32) -> None:
    """Save, by diffusers, a pipeline with SD 1.x's architecture and seeded random weights, some 200 k parameters.

    side: of its images in pixels; the latents' is a quarter of that.
    """
    torch.manual_seed(0)
    ours = train_bpe(CAPTIONS, vocab_size=600, max_length=CAPTION_TOKENS)
    ours.save(folder / "tokenizer")
    text_encoder = transformers.CLIPTextModel(text_config(ours, 16, num_hidden_layers=1))
    unet = diffusers.UNet2DConditionModel(
        sample_size=side // 4,
        block_out_channels=(8, 16, 24, 24)[:stages],
        down_block_types=(*("CrossAttnDownBlock2D",) * (stages - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (stages - 1)),
        layers_per_block=layers,
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=2,
    )
    save_sd(folder, unet, text_encoder, tiny_vae((8, 8, 8), sample_size=side))


def save_oracle(folder, kind: str) -> None:
    """Save a pipeline with the architecture of SD 1.x or 2.x in small: 8 x 8 latents, 32 x 32 images."""
    is_sd2 = kind == "sd2"
    torch.manual_seed(0)
    ours = train_bpe(PROMPTS, vocab_size=600, max_length=TOKENS)
    CLIPTokenizer(ours.vocab, ours.merges, TOKENS, "!" if is_sd2 else EOS).save(folder / "tokenizer")
    config = text_config(ours, 24, hidden_act="gelu" if is_sd2 else "quick_gelu")
    text_encoder = transformers.CLIPTextModel(config)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        norm_num_groups=8,
        attention_head_dim=(2, 4) if is_sd2 else 2,
        use_linear_projection=is_sd2,
    )
    vae = tiny_vae()
    make_prompts_matter(unet, text_encoder)
    save_sd(folder, unet, text_encoder, vae, "v_prediction" if is_sd2 else "epsilon")


def save_sd(folder, unet, text_encoder, vae, prediction: str = "epsilon") -> None:
    """Save the parts of an SD 1.x or 2.x beside the tokenizer that is in the folder."""
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER, prediction_type=prediction),
        **WITHOUT_CHECKER,
    ).save_pretrained(folder)


def tiny_vae(widths: tuple[int, ...] = (8, 16, 16), sample_size: int = 32, **settings) -> diffusers.AutoencoderKL:
    """A random VAE that makes images 4 times the side of the latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=sample_size,
        **settings,
    )


@torch.no_grad()
def make_prompts_matter(unet, text_encoder, scale: float = 4.0) -> None:
    """Fresh random weights nearly ignore the text; larger ones make a mistake in its path visible."""
    for name, weight in [*unet.named_parameters(), *text_encoder.named_parameters()]:
        if "attn2.to_" in name or "conv_out.weight" in name:
            weight.mul_(scale if "attn2" in name else 4)
        if "token_embedding" in name:
            weight.mul_(50)


def save_sdxl(folder) -> None:
    """Save a pipeline with the architecture of SDXL in small: 8 x 8 latents, 32 x 32 images."""
    torch.manual_seed(0)
    ours = train_bpe(PROMPTS, vocab_size=600, max_length=XL_TOKENS)
    ours.save(folder / "tokenizer")
    CLIPTokenizer(ours.vocab, ours.merges, XL_TOKENS, "!").save(folder / "tokenizer_2")
    text = {"intermediate_size": 48, "num_hidden_layers": 3}
    one = text_config(ours, 24, **text)
    two = text_config(ours, 32, hidden_act="gelu", projection_dim=20, **text)
    encoders = transformers.CLIPTextModel(one), transformers.CLIPTextModelWithProjection(two)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=56,
        norm_num_groups=8,
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    vae = tiny_vae(scaling_factor=0.13025)
    make_prompts_matter(unet, encoders[0])
    with torch.no_grad():
        encoders[1].text_model.embeddings.token_embedding.weight.mul_(10)
    read = transformers.CLIPTokenizer.from_pretrained
    diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=read(folder / "tokenizer"),
        tokenizer_2=read(folder / "tokenizer_2"),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    ).save_pretrained(folder)


POSITIONS = 77  # of every official text encoder
TINY_SDXL_DEEP = replace(TINY_SDXL, transformer_layers_per_block=SDXL.transformer_layers_per_block)


def save_like_official(
    folder, config: UNetConfig, prediction: str = "epsilon", vocabulary: CLIPTokenizer | None = None, seed: int = 0
) -> diffusers.DiffusionPipeline:
    """Save, by diffusers, a pipeline around a U-Net of any config, and return it; its images are 32 x 32.

    All but the widths is as in the official folders: text encoders of 77 positions with the paddings and activations
    of their kind, and the scheduler's settings. The VAE's posterior has no spread, so that an image has one latent.
    """
    torch.manual_seed(seed)
    vocabulary = vocabulary or train_bpe(PROMPTS, vocab_size=600)
    unet = diffusers.UNet2DConditionModel.from_config({**config.to_dict(), "sample_size": 8})
    is_sdxl = config.addition_embed_type == "text_time"
    is_sd2 = config.use_linear_projection and not is_sdxl
    parts = {"tokenizer": ("!" if is_sd2 else EOS, config.cross_attention_dim, "gelu" if is_sd2 else "quick_gelu")}
    if is_sdxl:
        parts = {"tokenizer": (EOS, 8, "quick_gelu"), "tokenizer_2": ("!", config.cross_attention_dim - 8, "gelu")}
    components = {}
    for part, (pad, width, activation) in parts.items():
        CLIPTokenizer(vocabulary.vocab, vocabulary.merges, POSITIONS, pad).save(folder / part)
        components[part] = transformers.CLIPTokenizer.from_pretrained(folder / part)
        kind = transformers.CLIPTextModelWithProjection if part == "tokenizer_2" else transformers.CLIPTextModel
        encoder = components[part.replace("tokenizer", "text_encoder")] = kind(
            text_config(
                vocabulary,
                width,
                intermediate_size=32,
                max_position_embeddings=POSITIONS,
                hidden_act=activation,
                projection_dim=width,
            )
        )
        # With a scale of 4 the deep networks are chaos: the last bit of a number would decide the image.
        make_prompts_matter(unet if part == "tokenizer" else torch.nn.Module(), encoder, 3.0)
    noise_schedule = {**SCHEDULER, "timestep_spacing": "leading", "prediction_type": prediction}
    components |= {"unet": unet, "vae": vae_without_spread(scaling_factor=0.13025 if is_sdxl else 0.18215)}
    if is_sdxl:
        # Euler has no use for two of the settings; the official config carries them all the same.
        scheduler = diffusers.EulerDiscreteScheduler.from_config(noise_schedule)
        pipe = diffusers.StableDiffusionXLPipeline(**components, scheduler=scheduler, add_watermarker=False)
    else:
        scheduler = diffusers.DDIMScheduler(**noise_schedule)
        pipe = diffusers.StableDiffusionPipeline(**components, scheduler=scheduler, **WITHOUT_CHECKER)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def vae_without_spread(**settings) -> diffusers.AutoencoderKL:
    """`tiny_vae`, all of whose posterior is its mean."""
    vae = tiny_vae(**settings)
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -30
    return vae
