"""The miniature's networks: their configs, and what is done to them before and after training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidistill.errors import InputError
from minidistill.miniature.inside_out import LEVEL_0, copy_outer, keep_variance, unfit
from minidistill.models.clip import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from minidistill.models.tokenizer import CLIPTokenizer
from minidistill.models.unet import UNet, UNetConfig
from minidistill.models.vae import AutoencoderKL, VAEConfig

MAX_TOKENS = 32  # the longest caption of the scenes has 20
TEXT = CLIPTextConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=MAX_TOKENS, projection_dim=128,
)  # fmt: skip
VISION = CLIPVisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
    image_size=64, patch_size=8, projection_dim=128,
)  # fmt: skip
VAE = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=64)
# The text is read on level 2 and in the mid block, and for details in the decoder's level 0. If all outer levels read
# it, they leave nothing to those inside, in images as small as these; and attention is slow on a CPU, hence few, wide
# heads. Levels 2 and 3 are equally wide: recipes that remove level 3 need it.
UNET = UNetConfig(
    sample_size=16, block_out_channels=(32, 96, 96, 96), attention_head_dim=(1, 3, 3, 3), norm_num_groups=8,
    cross_attention_dim=TEXT.hidden_size,
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
ENDS = ("conv_in", "conv_out", "time_embedding")
PLACES = ("left", "right", "above", "below")  # words that CLIP hardly tells apart


def hidden_weights(unet: UNet) -> list[nn.Parameter]:
    """The matrices and convolutions between a U-Net's ends, which Muon is for."""
    return [p for name, p in unet.named_parameters() if p.ndim > 1 and not name.startswith(ENDS)]


@torch.no_grad()
def words_first(clip: CLIPModel, share: float = 0.25) -> CLIPTextModel:
    """CLIP's text encoder with embeddings of unit variance, and the residual updates of its layers scaled by `share`.

    In the miniature's CLIP the layers add 50 times the norm of an embedding, nearly the same for all words: the states
    of "circle" and "square" are 0.2 standard deviations apart, "left" and "right" 0.1, "red" and "blue" 1.6. A U-Net
    trained on these gave correct colours, but shapes and places nearly at random.
    """
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    embeddings = encoder.text_model.embeddings
    scale = 1 / embeddings.token_embedding.weight.std()
    for embedding in (embeddings.token_embedding, embeddings.position_embedding):
        embedding.weight.mul_(scale)
    for layer in encoder.text_model.encoder.layers:
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            last.weight.mul_(share)
            last.bias.mul_(share)
    return encoder


@torch.no_grad()
def redraw_places(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Reinitialise the embeddings of left, right, above and below if CLIP's training left two of them nearly equal."""
    weight = encoder.text_model.embeddings.token_embedding.weight
    rows = [int(tokenizer([word])[0, 1]) for word in PLACES]
    usual = weight.std() * weight.shape[1] ** 0.5  # norm of an embedding; independent ones are sqrt(2) of it apart
    if F.pdist(weight[rows]).min() < usual:
        weight[rows] = torch.randn(len(rows), weight.shape[1]).to(weight) * weight.std()


def trim(ids: Tensor, eos: int) -> Tensor:
    """Token ids (B, L) without the padding common to all rows; with the causal mask it has no effect."""
    return ids[:, : int((ids == eos).int().argmax(1).max()) + 1]


def near_colour(x: Tensor) -> Tensor:
    """1 within two pixels of a saturated colour, else 0: images (B, 3, H, W) in [-1, 1] -> (B, 1, H, W)."""
    chroma = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    return F.max_pool2d((chroma > 0.5).float(), 5, stride=1, padding=2)


@torch.no_grad()
def whiten(vae: AutoencoderKL, x: Tensor) -> None:
    """Whiten the scaled latents of images x (N, 3, H, W), in place: uncorrelated channels, mean 0, variance 1.

    After training, three of the four channels are nearly equal and colours are in their small differences, which noise
    hides first. The 1x1 convolutions around the latents absorb the change of basis z' = W (z - mean), W = cov^(-1/2),
    so reconstructions do not change. The variance of the posterior, tiny here, is replaced by its mean.
    """
    encoded = [vae.encode(part) for part in x.split(64)]
    z = torch.cat([mean for mean, _ in encoded]).transpose(0, 1).flatten(1).double()  # (N, 4, h, w) -> (4, N*h*w)
    noise = torch.cat([logvar for _, logvar in encoded]).exp().mean((0, 2, 3)).double()
    mean = z.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(z))
    whitening = vectors @ (values**-0.5 / vae.config.scaling_factor).diag() @ vectors.T
    encode, decode, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    into, out_of = encode.weight[:channels, :, 0, 0].double(), decode.weight[:, :, 0, 0].double()
    decode.bias += out_of @ mean
    decode.weight.copy_((out_of @ whitening.inverse())[..., None, None])
    encode.weight[:channels] = (whitening @ into)[..., None, None].float()
    encode.bias[:channels] = (whitening @ (encode.bias[:channels].double() - mean)).float()
    encode.weight[channels:] = 0
    encode.bias[channels:] = (whitening.square() @ noise).log().float()


def new_unet(teacher: UNet | None) -> UNet:
    """An untrained U-Net, its outer convolutions as those of a teacher."""
    unet = UNet(UNET)
    keep_variance(unet)
    for transformer in unet.up_blocks[-1].attentions:  # they join in the last phase, and change nothing at first
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)
    if teacher:
        copy_outer(teacher, unet)
    return unet


def check_blocks(teacher: UNet | None, first: UNet | None) -> None:
    """InputError: a teacher whose level 0 cannot be taken, or a first U-Net that is not the miniature's."""
    with torch.device("meta"):
        usual = UNet(UNET)
    found = {"--teacher": unfit(teacher, usual, LEVEL_0) if teacher else []}
    found["--start-from"] = unfit(first, usual, ("",)) + unfit(usual, first, ("",)) if first else []
    for flag, other in found.items():
        if other:
            raise InputError(f"{flag} takes a U-Net of the miniature's blocks and widths: {other[0]} is another")
