"""CLIP against transformers: outputs, gradients, parameter names and config files."""

from dataclasses import replace

import pytest
import torch
import transformers
from tiny import assert_close, assert_same_gradients

from minidistill.models.clip import (
    SD1_TEXT,
    SD2_TEXT,
    SDXL_TEXT_2,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
)

VIT_L_14 = CLIPConfig(  # OpenAI's
    SD1_TEXT,
    CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    ),
    projection_dim=768,
)
BOS, EOS = 98, 99
TINY = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 16, "projection_dim": 24,
}  # fmt: skip
TINY_VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=30,
    patch_size=8, projection_dim=24,
)  # fmt: skip


def text_config(**changes) -> CLIPTextConfig:
    return CLIPTextConfig(**{**TINY, "eos_token_id": EOS, **changes})


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Change all weights from their neutral initial values, so that a missing bias or norm has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def transformers_4_names(state: dict) -> dict:
    """The names in files: transformers 5 has no prefix "text_model." in its bare text encoder."""
    return {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in state.items()}


def text_pair(config: CLIPTextConfig, projection: bool = False):
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    oracle = shake(cls(transformers.CLIPTextConfig(**config.to_dict())))
    ours = CLIPTextModel(config, projection)
    ours.load_state_dict(transformers_4_names(oracle.state_dict()))
    return ours, oracle


def prompts(*lengths: int, pad: int = EOS) -> torch.Tensor:
    """Rows of 16 ids: begin, `length` words, end, padding."""
    ids = torch.full((len(lengths), 16), pad)
    for i, length in enumerate(lengths):
        words = torch.randint(1, BOS, (length,), generator=torch.Generator().manual_seed(i))
        ids[i, : length + 2] = torch.tensor([BOS, *words.tolist(), EOS])
    return ids


@pytest.mark.parametrize(("act", "pad"), [("quick_gelu", EOS), ("gelu", 0)])
@pytest.mark.parametrize("eos_in_config", [EOS, 2])
def test_text_encoder_equals_transformers(act, pad, eos_in_config):
    """`eos_token_id: 2`, in all official SD configs, means the largest id."""
    ours, oracle = text_pair(text_config(hidden_act=act, eos_token_id=eos_in_config))
    lengths = (0, 1, 7, 13, 14)
    ids = prompts(*lengths, pad=pad)
    with torch.no_grad():
        found, wanted = ours(ids), oracle(ids, output_hidden_states=True)
    assert_close(found.last_hidden_state, wanted.last_hidden_state)
    assert_close(found.pooled, wanted.pooler_output)
    for row, length in enumerate(lengths):
        assert torch.equal(found.pooled[row], found.last_hidden_state[row, length + 1])
    assert len(found.hidden_states) == len(wanted.hidden_states) == TINY["num_hidden_layers"] + 1
    for a, b in zip(found.hidden_states[:-1], wanted.hidden_states[:-1], strict=True):
        assert_close(a, b)
    # SDXL reads hidden_states[-2], one layer and the final norm before the output
    last = ours.text_model.encoder.layers[-1](found.hidden_states[-2])
    assert_close(ours.text_model.final_layer_norm(last), wanted.last_hidden_state)
    assert_close(ours(ids[:, :9])[0], oracle(ids[:, :9]).last_hidden_state)


def test_the_two_end_rules_differ_when_a_larger_id_exists():
    ids = torch.tensor([[1, 99, 5, 60, 7, 60]])
    for eos_in_config, position in ((60, 3), (2, 1)):
        ours, oracle = text_pair(text_config(eos_token_id=eos_in_config))
        with torch.no_grad():
            found = ours(ids)
            assert_close(found.pooled, oracle(ids).pooler_output)
        assert torch.equal(found.pooled[0], found.last_hidden_state[0, position])


def test_text_encoder_with_projection_equals_transformers_with_gradients():
    ours, oracle = text_pair(text_config(), projection=True)
    ids = prompts(2, 14)
    found, wanted = ours(ids), oracle(ids, output_hidden_states=True)
    assert_close(found.pooled, wanted.text_embeds)
    assert_close(found.hidden_states[-2], wanted.hidden_states[-2])
    assert found.pooled.shape == (2, 24)
    (found.last_hidden_state.square().mean() + found.pooled.square().mean()).backward()
    (wanted.last_hidden_state.square().mean() + wanted.text_embeds.square().mean()).backward()
    assert_same_gradients(ours, transformers_4_names(dict(oracle.named_parameters())))


def test_clip_equals_transformers_with_gradients():
    config = CLIPConfig(text_config(), TINY_VISION, projection_dim=24)
    oracle = shake(transformers.CLIPModel(transformers.CLIPConfig(**config.to_dict())))
    ours = CLIPModel(config.text_config, config.vision_config)
    ours.load_state_dict(oracle.state_dict())
    ids, pixels = prompts(3, 14), torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    text, image = ours.encode_text(ids), ours.encode_image(pixels)
    wanted = oracle(input_ids=ids, pixel_values=pixels)
    assert_close(text, wanted.text_embeds)
    assert_close(image, wanted.image_embeds)
    assert_close(ours.logit_scale.exp() * text @ image.T, wanted.logits_per_text)
    assert_close(text.norm(dim=-1), torch.ones(2))
    (ours.logit_scale.exp() * text @ image.T).square().mean().backward()
    wanted.logits_per_text.square().mean().backward()
    assert_same_gradients(ours, dict(oracle.named_parameters()))


@pytest.mark.parametrize(
    ("config", "projection", "tensors", "parameters"),
    [
        (SD1_TEXT, False, 196, 123_060_480),
        (SD2_TEXT, False, 372, 340_387_840),
        (SDXL_TEXT_2, True, 517, 694_659_840),
    ],
)
def test_full_size_text_encoders_have_the_official_tensors(config, projection, tensors, parameters):
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    with torch.device("meta"):
        ours = CLIPTextModel(config, projection)
        oracle = cls(transformers.CLIPTextConfig(**config.to_dict()))
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {k: t.shape for k, t in transformers_4_names(oracle.state_dict()).items()}
    assert len(shapes) == tensors
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


def test_full_size_clip_has_the_official_tensors():
    with torch.device("meta"):
        ours = CLIPModel(VIT_L_14.text_config, VIT_L_14.vision_config)
        oracle = transformers.CLIPModel(transformers.CLIPConfig(**VIT_L_14.to_dict()))
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in oracle.state_dict().items()}
    assert (len(shapes), sum(parameter.numel() for parameter in ours.parameters())) == (590, 427_616_513)


def test_config_round_trips_through_transformers_and_defaults_are_its():
    config = text_config(hidden_act="gelu", eos_token_id=2)
    oracle = transformers.CLIPTextConfig(**config.to_dict())
    assert CLIPTextConfig.from_dict(config.to_dict()) == config
    assert CLIPTextConfig.from_dict(oracle.to_dict()) == config
    oracle = transformers.CLIPVisionConfig(**TINY_VISION.to_dict())
    assert CLIPVisionConfig.from_dict(oracle.to_dict()) == TINY_VISION
    oracle = transformers.CLIPConfig(**VIT_L_14.to_dict())
    assert CLIPConfig.from_dict(oracle.to_dict()) == VIT_L_14
    assert CLIPConfig.from_dict(VIT_L_14.to_dict()) == VIT_L_14
    for ours, theirs in (
        (CLIPTextConfig, transformers.CLIPTextConfig),
        (CLIPVisionConfig, transformers.CLIPVisionConfig),
        (CLIPConfig, transformers.CLIPConfig),
    ):
        assert ours.from_dict({}) == ours() == ours.from_dict(theirs().to_dict())


def test_one_encoder_is_read_from_the_config_of_a_complete_clip():
    """As in openai/clip-vit-large-patch14, with duplicates and keys that are not architecture."""
    file = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"top_k": 50, "id2label": {"0": "LABEL_0"}, "eos_token_id": 2, "bos_token_id": 0},
        "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": VIT_L_14.vision_config.to_dict(),
    }
    assert CLIPTextConfig.from_dict(file) == replace(SD1_TEXT, projection_dim=512)
    assert CLIPVisionConfig.from_dict(file) == VIT_L_14.vision_config
    assert CLIPConfig.from_dict(file) == VIT_L_14


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("gelu_new", lambda: CLIPTextConfig(hidden_act="gelu_new")),
        ("num_attention_heads 5", lambda: CLIPTextConfig(num_attention_heads=5)),
        ("t5", lambda: CLIPTextConfig.from_dict({"model_type": "t5"})),
        ("clip_vision_model", lambda: CLIPTextConfig.from_dict(TINY_VISION.to_dict())),
        ("clip_text_model", lambda: CLIPConfig.from_dict(text_config().to_dict())),
        ("16 positions", lambda: CLIPTextModel(text_config())(torch.zeros(1, 17, dtype=torch.int64))),
        ("30 x 30", lambda: CLIPModel(text_config(), TINY_VISION).encode_image(torch.zeros(1, 3, 32, 32))),
        ("projection_dim", lambda: CLIPModel(text_config(projection_dim=8), TINY_VISION)),
    ],
)
def test_invalid_configs_and_inputs_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
