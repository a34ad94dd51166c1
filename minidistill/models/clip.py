"""CLIP: the text encoders of Stable Diffusion, and the image encoder trained with them.

One file, on torch alone. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv
2103.00020). State-dict names are those of transformers 4.x, so the official `text_encoder/model.safetensors` of SD 1.x
(ViT-L/14), SD 2.x (ViT-H/14) and SDXL (ViT-L/14 and ViT-bigG/14) load without conversion.

Which output the U-Net reads depends on the model; the wrong one raises no error but gives worse images:
- SD 1.x and 2.x: `last_hidden_state`, after the final LayerNorm;
- SDXL: `hidden_states[-2]` of both encoders, without the final LayerNorm, and `pooled` of the second one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU; it differs from the exact one by up to 0.02, which changes images."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class _ConfigFile:
    """config.json <-> frozen dataclass, for the text and the image encoder.

    Files written by transformers 4.x hold dozens of keys for text generation (`top_k`, `id2label`, ...), so unknown
    keys are ignored.
    """

    @classmethod
    def from_dict(cls, d: dict) -> CLIPTextConfig | CLIPVisionConfig:
        """From the config.json of any transformers version; absent keys take the defaults of transformers.

        Of the config of a complete CLIP, the part for this encoder is read. ValueError: another architecture, or an
        unsupported activation.
        """
        if d.get("model_type", "clip") not in ("clip", cls.model_type):
            raise ValueError(f"expected a config of {cls.model_type}, found model_type {d['model_type']!r}")
        part = cls.model_type.split("_")[1] + "_config"  # "text_config" | "vision_config"
        if part in d:
            d = {**(d[part] or {}), **(d.get(part + "_dict") or {})}
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in d.items() if key in known and value is not None})

    def to_dict(self) -> dict:
        """A config.json from which transformers builds the same network."""
        return {"model_type": self.model_type, **asdict(self)}

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


@dataclass(frozen=True)
class CLIPTextConfig(_ConfigFile):
    """The text encoder, with the names and defaults of transformers' `CLIPTextConfig`.

    The pooled state is read at the first `eos_token_id`. The value 2, in configs written before mid-2023 (SD 1.x, SD
    2.x, SDXL), is not an id: it means the largest id of the row, which is the end token.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1
    model_type = "clip_text_model"  # not annotated: a class attribute, not a field


@dataclass(frozen=True)
class CLIPVisionConfig(_ConfigFile):
    """The image encoder, with the names and defaults of transformers' `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    model_type = "clip_vision_model"


@dataclass(frozen=True)
class CLIPConfig:
    """Both encoders and the width `projection_dim` of their joint embedding space.

    It overrides the encoders' own `projection_dim`, as in transformers.
    """

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512

    def __post_init__(self) -> None:
        for name in ("text_config", "vision_config"):
            tower = replace(getattr(self, name), projection_dim=self.projection_dim)
            object.__setattr__(self, name, tower)

    @classmethod
    def from_dict(cls, d: dict) -> CLIPConfig:
        """From the config.json of a `CLIPModel`. ValueError: another architecture."""
        if d.get("model_type", "clip") != "clip":
            raise ValueError(f"expected the config of a complete CLIP, found model_type {d['model_type']!r}")
        text, vision = {"text_config": None, **d}, {"vision_config": None, **d}  # an absent part takes the defaults
        return cls(CLIPTextConfig.from_dict(text), CLIPVisionConfig.from_dict(vision), d.get("projection_dim", 512))

    def to_dict(self) -> dict:
        """A config.json from which transformers builds the same `CLIPModel`."""
        return {
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "text_config": self.text_config.to_dict(),
            "vision_config": self.vision_config.to_dict(),
        }


# SD 1.x, and the first encoder of SDXL
SD1_TEXT = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
# SD 2.x: OpenCLIP ViT-H/14 without its last layer
SD2_TEXT = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu",
    bos_token_id=0, eos_token_id=2,
)  # fmt: skip
# the second encoder of SDXL: OpenCLIP ViT-bigG/14, with projection
SDXL_TEXT_2 = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
    projection_dim=1280, bos_token_id=0, eos_token_id=2,
)  # fmt: skip


class Attention(nn.Module):
    """Multi-head self-attention with biases on all four projections."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (  # (B, L, D) -> (B, heads, L, D / heads)
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, heads, L, D / heads) -> (B, L, D)


class MLP(nn.Module):
    """Two linear layers with an activation between them: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: attention, then MLP, each added to its input."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        width = config.hidden_size
        self.self_attn = Attention(width, config.num_attention_heads, causal)
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers. Returns its input and the output of each layer: n_layers + 1 tensors (B, L, D)."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class TextEmbeddings(nn.Module):
    """Token ids (B, L) -> token plus position embeddings (B, L, D)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_embedding.weight
        if ids.shape[1] > len(positions):
            raise ValueError(f"{ids.shape[1]} tokens, but this text encoder has {len(positions)} positions")
        return self.token_embedding(ids) + positions[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Token ids (B, L) -> last state after the final norm, all hidden states, pooled state before projection."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)  # no padding mask: SD is trained without one
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        states = self.encoder(self.embeddings(ids))
        last = self.final_layer_norm(states[-1])
        is_end = ids if self.eos_token_id == 2 else (ids == self.eos_token_id).int()
        end = is_end.argmax(dim=-1)  # argmax takes the first of equal values
        pooled = last[torch.arange(len(ids), device=ids.device), end]  # (B, L, D) -> (B, D)
        return last, states, pooled


class VisionEmbeddings(nn.Module):
    """Pixels (B, 3, S, S) -> embeddings of class token and patches, with positions: (B, 1 + (S / patch)**2, D)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"this CLIP reads {self.image_size} x {self.image_size} pixels, "
                f"not {pixels.shape[2]} x {pixels.shape[3]}"
            )
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, patches, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Pixels (B, 3, S, S) -> pooled state before projection (B, D): the class token after the final norm."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # sic: the name in all checkpoints
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(states[-1][:, 0])


class CLIPTextOutput(NamedTuple):
    """Output of the text encoder."""

    last_hidden_state: Tensor  # (B, L, D), after the final LayerNorm
    hidden_states: tuple[Tensor, ...]  # embeddings and each layer's output, (B, L, D), no final LayerNorm
    pooled: Tensor  # last_hidden_state at the end token, (B, D), or projected, (B, projection_dim)


class CLIPTextModel(nn.Module):
    """A text encoder of Stable Diffusion; with `projection`, transformers' `CLIPTextModelWithProjection`."""

    def __init__(self, config: CLIPTextConfig, projection: bool = False):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = None
        if projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        init_weights(self)

    def forward(self, ids: Tensor) -> CLIPTextOutput:
        """ids (B, L) int64, L at most `max_position_embeddings`: begin token, text, end token, padding."""
        last, states, pooled = self.text_model(ids)
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return CLIPTextOutput(last, states, pooled)


class CLIPModel(nn.Module):
    """Both encoders, and `logit_scale`: log of the inverse temperature of the contrastive loss."""

    def __init__(self, text_config: CLIPTextConfig, vision_config: CLIPVisionConfig):
        super().__init__()
        if text_config.projection_dim != vision_config.projection_dim:
            raise ValueError(
                f"projection_dim must be equal: text encoder {text_config.projection_dim}, "
                f"image encoder {vision_config.projection_dim}"
            )
        self.config = CLIPConfig(text_config, vision_config, text_config.projection_dim)
        self.text_model = TextTransformer(text_config)
        self.vision_model = VisionTransformer(vision_config)
        width = text_config.projection_dim
        self.visual_projection = nn.Linear(vision_config.hidden_size, width, bias=False)
        self.text_projection = nn.Linear(text_config.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07), the initial value in CLIP
        init_weights(self)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, L) int64 -> unit vectors (B, projection_dim)."""
        return F.normalize(self.text_projection(self.text_model(ids)[-1]), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, image_size, image_size), normalised -> unit vectors (B, projection_dim)."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """CLIP's initialisation for training from scratch (section 2.4 of the paper and its code).

    Layers that write to the residual stream have a standard deviation that falls with the depth of the stack.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is None:  # a projection
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif isinstance(module, TextEmbeddings):
            nn.init.normal_(module.token_embedding.weight, std=0.02)
            nn.init.normal_(module.position_embedding.weight, std=0.01)
        elif isinstance(module, VisionEmbeddings):
            width = len(module.class_embedding)
            nn.init.normal_(module.class_embedding, std=width**-0.5)
            nn.init.normal_(module.position_embedding.weight, std=width**-0.5)
        elif isinstance(module, Encoder):
            for layer in module.layers:
                width = layer.self_attn.q_proj.in_features
                out_std = (2 * width * len(module.layers)) ** -0.5
                for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    nn.init.normal_(proj.weight, std=width**-0.5)
                nn.init.normal_(layer.self_attn.out_proj.weight, std=out_std)
                nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(layer.mlp.fc2.weight, std=out_std)
